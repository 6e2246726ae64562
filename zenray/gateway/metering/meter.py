"""The meter: a request is opened in the log, counted in its slots, closed in the log, and kept until it is shipped."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import orjson

from zenray.gateway.metering.replay import Scan, slots_path
from zenray.gateway.metering.slots import OUTPUT_BITS, OUTPUT_MASK, SlotFile, counter_index, total
from zenray.gateway.metering.wal import MeterFull, Segment, Wal
from zenray.spec.clock import Clock
from zenray.spec.errors import Conflict
from zenray.spec.money import Price
from zenray.spec.usage import Outcome, Usage, UsageEvent

log = logging.getLogger(__name__)

COMMIT_INTERVAL_S = 0.05
MAX_EVENTS_IN_MEMORY = 20_000
CLOSE_EXTRA_BYTES = 512  # a close record is its open record and at most this


class Charge:
    """One open request: counts while tokens stream, then is closed once. Made by `Meter.open`, for one thread."""

    __slots__ = (
        "_closed", "_first_token_s", "_indices", "_meter", "_opened_s", "_words", "billing_key", "fields", "head",
        "open_payload", "prompts", "segment", "sequence", "slots",
    )  # fmt: skip

    def __init__(self, meter: Meter, sequence: int, slots: list[int], prompts: int) -> None:
        self._meter = meter
        self._words = meter.words
        self._indices = [counter_index(slot) for slot in slots]
        self._closed = False
        self._first_token_s: float | None = None
        self._opened_s = meter.clock.monotonic()
        self.sequence = sequence
        self.slots = slots
        self.prompts = prompts
        self.billing_key = f"{meter.key_prefix}{sequence}"
        self.fields: dict[str, Any] = {}
        self.head = b""
        self.open_payload = b""
        self.segment: Segment

    def count(self, choice: int, input_tokens: int, output_tokens: int) -> None:
        """Store a choice's running usage: one aligned 64-bit store. Neither leg ever goes down; ValueError past 2³²."""
        if self._closed or not 0 <= choice < len(self._indices):
            raise ValueError(f"{self.billing_key} has no open choice {choice}")
        index = self._indices[choice]
        counter = input_tokens << OUTPUT_BITS | output_tokens
        if counter < self._words[index] or not 0 <= output_tokens <= OUTPUT_MASK:
            counter = _at_least(self._words[index], input_tokens, output_tokens)
        self._words[index] = counter

    def first_token(self) -> None:
        """Note the time of the first token; later calls change nothing."""
        if self._first_token_s is None:
            self._first_token_s = self._meter.clock.monotonic()

    def counted(self) -> Usage:
        """What the slots hold now."""
        if self._closed:
            raise ValueError(f"{self.billing_key} is closed: its slots belong to others")
        input_tokens, output_tokens = total([self._words[index] for index in self._indices], self.prompts)
        return Usage(input_tokens=input_tokens, output_tokens=output_tokens)

    def close(self, outcome: Outcome, usage: Usage | None = None, finish_reason: str | None = None) -> UsageEvent:
        """End the request with the engine's final usage; None: with what the slots hold. Not twice (ValueError).

        Never refused: if the disk is full the event waits in memory and its counts in the slots, until it can be
        written; new requests are refused until then.
        """
        if self._closed:
            raise ValueError(f"{self.billing_key} was closed before")
        final = usage if usage is not None else self.counted()
        now_s = self._meter.clock.monotonic()
        ttft_s = None if self._first_token_s is None else self._first_token_s - self._opened_s
        end: dict[str, Any] = {
            "outcome": outcome,
            "finish_reason": finish_reason[:64] if finish_reason else None,
            "latency_ms": round((now_s - self._opened_s) * 1e3, 3),
            "ttft_ms": None if ttft_s is None else round(ttft_s * 1e3, 3),
        }
        event = UsageEvent(**self.fields, usage=final, **end)
        end["usage"] = {
            "input_tokens": final.input_tokens,
            "cached_input_tokens": final.cached_input_tokens,
            "output_tokens": final.output_tokens,
        }
        payload = b'{"t":"close","event":' + self.head[:-1] + b"," + orjson.dumps(end)[1:] + b"}"
        self._meter._close(self, event, payload)
        self._closed = True
        return event

    def store_final(self, usage: Usage) -> None:
        """Make the slots sum to the final usage, for a close that cannot be written yet. Never lowers a slot."""
        counted = self.counted()
        index = self._indices[0]
        held = self._words[index]
        self._words[index] = _at_least(
            held,
            (held >> OUTPUT_BITS) + max(0, usage.input_tokens - counted.input_tokens),
            (held & OUTPUT_MASK) + max(0, usage.output_tokens - counted.output_tokens),
        )


def _at_least(held: int, input_tokens: int, output_tokens: int) -> int:
    """A counter with each leg the greater of what is held and what is new."""
    if not (0 <= input_tokens <= OUTPUT_MASK and 0 <= output_tokens <= OUTPUT_MASK):
        raise ValueError(f"impossible usage: input {input_tokens}, output {output_tokens}")
    return max(held >> OUTPUT_BITS, input_tokens) << OUTPUT_BITS | max(held & OUTPUT_MASK, output_tokens)


class Meter:
    """Counts one gateway process's usage so that a kill at any moment loses nothing and bills nothing twice.

    Owns `folder` (Conflict if another process does, or another gateway's log is in it). What an earlier boot left is
    read when the meter is made: closed events wait for the shipper, open ones become INTERRUPTED. A thread writes the
    log to the disk every 50 ms. `open`, `close`, `pending` and `acknowledge` may be called from any thread.
    """

    def __init__(
        self,
        folder: Path,
        gateway_id: str,
        *,
        max_streams: int,
        max_wal_bytes: int,
        clock: Clock,
        on_closed: Callable[[], None] | None = None,
        commit_interval_s: float = COMMIT_INTERVAL_S,
    ) -> None:
        self.gateway_id = gateway_id
        self.boot_id = uuid.uuid4().hex[:16]
        self.key_prefix = f"{gateway_id}:{self.boot_id}:"
        self.clock = clock
        self.max_streams = max_streams
        self._max_wal_bytes = max_wal_bytes
        self._on_closed = on_closed
        self._mutex = threading.Lock()
        self._commit_mutex = threading.Lock()
        self._sequence = 0
        self._open: dict[int, Charge] = {}
        self._streams = 0
        self._owed_bytes = 0
        self._freed: list[int] = []
        self._unwritten: deque[tuple[Charge, UsageEvent, bytes]] = deque()
        self._unshipped_nano_usd: dict[str, int] = {}
        self._events_in_memory = 0
        self._prices: dict[int, tuple[Price, orjson.Fragment]] = {}
        self._dirty = False
        self._broken: str | None = None
        self._stopped = threading.Event()
        self._lock_fd = _lock_folder(folder, gateway_id)
        try:
            # Twice the slots: what was closed is not given out again before its close is on the disk.
            self._slots = SlotFile(slots_path(folder, self.boot_id), 2 * max_streams)
            self.words = self._slots.words
            self._free = deque(range(2 * max_streams))
            self._wal = self._take_over(folder)
        except BaseException:
            os.close(self._lock_fd)
            raise
        self._thread = threading.Thread(
            target=self._commit_often, args=(commit_interval_s,), name="usage-log-commit", daemon=True
        )
        self._thread.start()

    def open(
        self,
        *,
        request_id: str,
        org: str,
        key_id: str,
        user_id: str | None,
        model_asked: str,
        model_answered: str,
        adapter: str | None,
        quantization: str | None,
        price: Price,
        reserve_nano_usd: int,
        choices: int = 1,
        prompts: int = 1,
        attempt: int = 1,
    ) -> Charge:
        """Record that a request begins, with one write(2). `choices` counts all of them: n × prompts.

        Raises MeterFull when `max_streams` choices are open, when the log has reached its bound because control
        takes nothing, or when the disk is full. Then nothing was recorded and nothing may be asked of the engine.
        """
        if choices < 1 or prompts < 1 or choices % prompts:
            raise ValueError(f"{choices} choices are not the same number for each of {prompts} prompts")
        with self._mutex:
            slots = self._take_slots(choices)
            self._sequence += 1
            charge = Charge(self, self._sequence, slots, prompts)
            charge.fields = {
                "billing_key": charge.billing_key,
                "request_id": request_id,
                "attempt": attempt,
                "org": org,
                "user_id": user_id,
                "key_id": key_id,
                "model_asked": model_asked,
                "model_answered": model_answered,
                "adapter": adapter,
                "quantization": quantization,
                "price": price,
                "at": self.clock.now(),
            }
            charge.head = orjson.dumps({**charge.fields, "price": self._price_json(price)})
            charge.open_payload = b'{"t":"open","seq":%d,"slots":[%b],"prompts":%d,"reserve":%d,"event":%b}' % (
                charge.sequence, b",".join(b"%d" % slot for slot in slots), prompts, reserve_nano_usd, charge.head,
            )  # fmt: skip
            owed_bytes = _owed(charge)
            for slot in slots:
                self._slots.claim(slot, charge.sequence)
            try:
                self._refuse_if_full(len(charge.open_payload) + owed_bytes)
                charge.segment = self._wal.append(charge.open_payload)
            except MeterFull:
                self._free.extendleft(slots)
                raise
            self._streams += choices
            self._owed_bytes += owed_bytes
            self._open[charge.sequence] = charge
            self._dirty = True
        return charge

    def pending(self, limit: int) -> list[UsageEvent]:
        """The oldest closed events that are not acknowledged, at most `limit`. Reads the disk after a restart."""
        found: list[UsageEvent] = []
        for segment in list(self._wal.segments):
            if segment.events is None and segment.unshipped_events:
                loaded = segment.load()
                with self._mutex:
                    self._events_in_memory += len(loaded)
            with self._mutex:
                for event in (segment.events or {}).values():
                    if len(found) == limit:
                        return found
                    found.append(event)
        return found

    def acknowledge(self, billing_keys: Iterable[str]) -> None:
        """Control has these in its ledger: forget them. The next commit deletes segments that hold nothing else."""
        left = set(billing_keys)
        with self._mutex:
            for segment in self._wal.segments:
                if not left:
                    break
                for key in left & (segment.events or {}).keys():
                    assert segment.events is not None
                    event = segment.events.pop(key)
                    segment.unshipped_events -= 1
                    self._events_in_memory -= 1
                    self._add_unshipped(event, -1)
                    left.discard(key)
            self._dirty = True

    def unshipped_nano_usd(self, org: str) -> int:
        """What an organisation's closed, unacknowledged events cost."""
        return self._unshipped_nano_usd.get(org, 0)

    @property
    def unshipped_events(self) -> int:
        return sum(segment.unshipped_events for segment in self._wal.segments) + len(self._unwritten)

    @property
    def open_streams(self) -> int:
        return self._streams

    @property
    def wal_bytes(self) -> int:
        return self._wal.total_bytes

    def commit(self) -> None:
        """Bring all that was recorded to the disk, then free what nothing needs any more. The thread does this."""
        with self._commit_mutex:
            with self._mutex:
                self._dirty = False
                self._write_what_waited()
                finished = self._carry_open_records()
                freed, self._freed = self._freed, []
                sync = self._wal.sync_work()
            try:
                sync()
                if self._open:
                    self._slots.sync()
            except OSError as error:
                # After a failed sync the kernel may have thrown the pages away; only a new boot can tell.
                self._broken = f"The usage log could not be synced to the disk: {error.strerror}."
                log.error("%s Requests are refused until the gateway is restarted on a sound disk.", self._broken)
                raise
            with self._mutex:
                self._free.extend(freed)
                for _ in range(finished):
                    self._wal.delete_oldest()

    def close(self) -> None:
        """Stop. What is open stays open in the log, and the next boot bills it by its slots. Idempotent."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._thread.join()
        if self._broken is None:
            self.commit()
        with self._mutex:
            self._broken = "The meter is closed."
            self._wal.close()
            self._slots.close()
            os.close(self._lock_fd)

    def _take_over(self, folder: Path) -> Wal:
        """Read what earlier boots left, end what they left open, and only then forget their slots."""
        scan = Scan(folder)
        for segment, event in scan.closed():
            segment.unshipped_events += 1
            self._add_unshipped(event, 1)
        interrupted = list(scan.interrupted())
        wal = Wal(folder, self.boot_id, scan.segments, max_bytes=self._max_wal_bytes)
        for event in interrupted:
            segment = wal.append(b'{"t":"close","event":' + event.model_dump_json().encode() + b"}")
            self._keep(segment, event)
            self._add_unshipped(event, 1)
        wal.sync_work()()
        for path in folder.glob("slots-*"):
            if path != slots_path(folder, self.boot_id):
                path.unlink()
        if interrupted:
            log.warning("usage log %s: %d requests had been interrupted", folder, len(interrupted))
        return wal

    def _take_slots(self, choices: int) -> list[int]:
        if self._streams + choices > self.max_streams:
            raise MeterFull(
                f"This gateway has {self._streams} of at most {self.max_streams} streams open.",
                hint="Try again in a moment, or raise max_streams.",
                retry_after_s=1,
            )
        if len(self._free) < choices:
            # More was closed since the last commit than there are spare slots: wait for the disk, as it must.
            self._slots.sync()
            self._wal.sync_work()()
            self._free.extend(self._freed)
            self._freed = []
        return [self._free.popleft() for _ in range(choices)]

    def _refuse_if_full(self, record_bytes: int) -> None:
        if self._broken is not None:
            raise MeterFull(self._broken, hint="Restart the gateway on a sound disk.")
        if self._unwritten:
            raise MeterFull(f"{len(self._unwritten)} closed requests wait for room on the disk.", retry_after_s=5)
        if not self._wal.has_room(self._owed_bytes + record_bytes):
            raise MeterFull(
                f"{self._wal.total_bytes} bytes of usage wait to be shipped; at most {self._max_wal_bytes} may.",
                hint="Requests are answered again when control takes them.",
                retry_after_s=5,
            )

    def _close(self, charge: Charge, event: UsageEvent, payload: bytes) -> None:
        with self._mutex:
            self._add_unshipped(event, 1)
            try:
                if self._unwritten:
                    raise MeterFull("Others wait for room.")
                self._keep(self._wal.append(payload), event)
            except MeterFull as full:
                log.error("a closed request waits: %s", full)
                charge.store_final(event.usage)
                self._unwritten.append((charge, event, payload))
            else:
                self._release(charge)
            self._dirty = True
        if self._on_closed is not None:
            self._on_closed()

    def _release(self, charge: Charge) -> None:
        del self._open[charge.sequence]
        self._freed.extend(charge.slots)
        self._streams -= len(charge.slots)
        self._owed_bytes -= _owed(charge)

    def _keep(self, segment: Segment, event: UsageEvent) -> None:
        """Hold a closed event for the shipper: in memory as long as there are few, else the log holds it anyway."""
        segment.unshipped_events += 1
        if segment.events is not None:
            segment.events[event.billing_key] = event
            self._events_in_memory += 1
        if self._events_in_memory > MAX_EVENTS_IN_MEMORY:
            self._forget_newer_segments()

    def _forget_newer_segments(self) -> None:
        """Leave the events of finished segments to the disk, all but the oldest's, which is being shipped."""
        for segment in self._wal.segments[1:-1]:
            if segment.events and len(segment.events) == segment.unshipped_events:
                self._events_in_memory -= len(segment.events)
                segment.events = None

    def _add_unshipped(self, event: UsageEvent, sign: int) -> None:
        held = self._unshipped_nano_usd.get(event.org, 0) + sign * event.cost_nano_usd()
        if held:
            self._unshipped_nano_usd[event.org] = held
        else:
            self._unshipped_nano_usd.pop(event.org, None)

    def _price_json(self, price: Price) -> orjson.Fragment:
        known = self._prices.get(id(price))
        if known is None or known[0] is not price:
            if len(self._prices) > 1000:  # prices change with snapshots; old ones must not pile up
                self._prices.clear()
            known = self._prices[id(price)] = (price, orjson.Fragment(price.model_dump_json()))
        return known[1]

    def _write_what_waited(self) -> None:
        while self._unwritten:
            charge, event, payload = self._unwritten[0]
            try:
                self._keep(self._wal.append(payload), event)
            except MeterFull:
                return
            self._unwritten.popleft()
            self._release(charge)

    def _carry_open_records(self) -> int:
        """How many of the oldest segments hold nothing unshipped; what is open in them is recorded anew first."""
        finished = 0
        for segment in self._wal.segments[:-1]:
            if segment.unshipped_events:
                break
            try:
                for charge in [charge for charge in self._open.values() if charge.segment is segment]:
                    charge.segment = self._wal.append(charge.open_payload)
            except MeterFull:
                break
            finished += 1
        return finished

    def _commit_often(self, interval_s: float) -> None:
        while not self._stopped.wait(interval_s):
            if self._dirty and self._broken is None:
                try:
                    self.commit()
                except OSError:
                    return


def _owed(charge: Charge) -> int:
    """Room that an open request's close record will need."""
    return len(charge.head) + CLOSE_EXTRA_BYTES


def _lock_folder(folder: Path, gateway_id: str) -> int:
    """Take the folder for this process until it ends; the lock file says who has it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "owner.json"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        text = os.pread(fd, 4096, 0)
        owner = json.loads(text) if text else {"gateway_id": gateway_id, "pid": None}
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"The usage log in {folder} belongs to the running process {owner['pid']}.",
                hint="Stop that gateway, or give this one a folder of its own.",
            ) from None
        if owner["gateway_id"] != gateway_id:
            raise Conflict(
                f"The usage log in {folder} is gateway {owner['gateway_id']!r}'s, not {gateway_id!r}'s.",
                hint="Start it with its own gateway id, so that what it recorded is billed under the right leases.",
            )
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps({"gateway_id": gateway_id, "pid": os.getpid()}).encode(), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd
