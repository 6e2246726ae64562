"""The meter: a request is opened in the log, counted in its slots, closed in the log, and kept until it is shipped."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import orjson

from zenray.gateway.metering.charge import Charge
from zenray.gateway.metering.outbox import Outbox
from zenray.gateway.metering.owner import own_folder
from zenray.gateway.metering.replay import Scan, slots_path
from zenray.gateway.metering.slots import SlotFile
from zenray.gateway.metering.wal import MeterFull, Wal
from zenray.spec.clock import Clock
from zenray.spec.money import Price
from zenray.spec.usage import UsageEvent

log = logging.getLogger(__name__)

COMMIT_INTERVAL_S = 0.05
# Bounds on what a record has beyond its head (the fields that an open and its close share): JSON and frame.
MAX_OPEN_BYTES = 128
MAX_SLOT_BYTES = 11
MAX_END_BYTES = 768
MAX_HEAD_BYTES = 1 << 16


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
        self._folder = folder
        self.boot_id = uuid.uuid4().hex[:16]
        self.clock = clock
        self.max_streams = max_streams
        self._key_prefix = f"{gateway_id}:{self.boot_id}:"
        self._max_wal_bytes = max_wal_bytes
        self._on_closed = on_closed
        self._mutex = threading.Lock()
        self._commit_mutex = threading.Lock()  # taken before _mutex
        self._sequence = itertools.count(1)
        self._open: dict[int, Charge] = {}
        self._streams = 0
        self._owed_bytes = 0
        self._free = deque(range(2 * max_streams))
        self._freed: list[int] = []  # since the last commit
        self._unwritten: deque[tuple[Charge, UsageEvent, bytes]] = deque()
        self._prices: dict[int, tuple[Price, orjson.Fragment]] = {}
        self._dirty = False
        self._refusal: str | None = None
        self._stopping = threading.Event()
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, own_folder(folder, gateway_id))
            # Twice the slots: what was closed is not given out again before its close is on the disk.
            slots = _new_slots(slots_path(folder, self.boot_id), 2 * max_streams)
            undo.callback(slots.close)
            scan = Scan(folder)
            self._wal = Wal(folder, self.boot_id, list(scan.segments), max_bytes=max_wal_bytes)
            undo.callback(self._wal.close)
            self._outbox = Outbox(self._wal, self._mutex, self._key_prefix)
            self._take_over(scan)
            self._slots, self._words = slots, slots.words
            self._undo = undo.pop_all()
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
        sequence = next(self._sequence)
        fields: dict[str, Any] = {
            "billing_key": f"{self._key_prefix}{sequence}",
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
        head = self.head(fields)
        if len(head) > MAX_HEAD_BYTES:
            raise ValueError(f"{len(head)} bytes to say who asks for what; at most {MAX_HEAD_BYTES} are recorded")
        if len(self._free) < choices <= self.max_streams - self._streams:
            self._commit_or_refuse()  # more was closed since the last commit than there are spare slots
        owed_bytes = len(head) + MAX_END_BYTES
        with self._mutex:
            self._refuse_if_full(choices, len(head) + MAX_OPEN_BYTES + MAX_SLOT_BYTES * choices + owed_bytes)
            slots = [self._free.popleft() for _ in range(choices)]
            payload = b'{"t":"open","seq":%d,"slots":[%b],"prompts":%d,"reserve":%d,"event":%b}' % (
                sequence, b",".join([b"%d" % slot for slot in slots]), prompts, reserve_nano_usd, head,
            )  # fmt: skip
            for slot in slots:
                self._slots.claim(slot, sequence)
            try:
                segment = self._wal.append(payload)
            except MeterFull:
                self._free.extendleft(slots)
                raise
            charge = Charge(self, self._words, sequence, slots, prompts, fields, head, payload, segment)
            self._open[sequence] = charge
            self._streams += choices
            self._owed_bytes += owed_bytes
            self._dirty = True
        return charge

    def pending(self, limit: int) -> list[UsageEvent]:
        """The oldest closed events that are not acknowledged, at most `limit`; for one caller at a time.

        Blocks while a segment is read, after a restart or when control was away for long: call it in a thread.
        """
        return self._outbox.pending(limit)

    def acknowledge(self, billing_keys: Iterable[str]) -> None:
        """Control has these in its ledger: forget them. The next commit deletes segments that hold nothing else."""
        self._outbox.acknowledge(billing_keys)
        self._dirty = True

    def unshipped_nano_usd(self, org: str) -> int:
        """What an organisation's closed, unacknowledged events cost."""
        return self._outbox.unshipped_nano_usd(org)

    @property
    def unshipped_events(self) -> int:
        return self._outbox.unshipped_events + len(self._unwritten)

    @property
    def inherited_events(self) -> int:
        """Events of earlier boots that are not acknowledged. While there are any, no lease may be asked for."""
        return self._outbox.inherited_events

    @property
    def open_streams(self) -> int:
        return self._streams

    @property
    def wal_bytes(self) -> int:
        return self._wal.total_bytes

    def commit(self) -> None:
        """Bring all that was recorded to the disk, then free what nothing needs any more. The thread does this.

        Raises OSError when the disk fails; from then on every `open` is refused.
        """
        with self._commit_mutex:
            with self._mutex:
                self._dirty = False
                self._write_what_waited()
                finished = self._carry_open_records()
                freed, self._freed = self._freed, []
                sync = self._wal.sync_work()
                has_open = bool(self._open)
            try:
                sync()
                if has_open:
                    self._slots.sync()
            except OSError as error:
                # After a failed sync the kernel may have thrown the pages away; only a new boot can tell.
                self._refusal = f"The usage log could not be synced to the disk: {error.strerror}."
                log.error("%s Requests are refused until the gateway is restarted on a sound disk.", self._refusal)
                raise
            with self._mutex:
                self._free.extend(freed)
                useless = [self._wal.drop_oldest() for _ in range(finished)]
            for path in useless:  # in order, so that an event's close never goes before its open
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop. What is open stays open in the log, and the next boot bills it by its slots. Idempotent.

        When all is closed and shipped, the log is deleted.
        """
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self.commit()
        with self._mutex:
            self._refusal = "The meter is closed."
            if not self._open and self.unshipped_events == 0:
                for segment in self._wal.segments:
                    segment.path.unlink(missing_ok=True)
                slots_path(self._folder, self.boot_id).unlink(missing_ok=True)
            self._undo.close()

    def _take_over(self, scan: Scan) -> None:
        """Queue what earlier boots closed, end what they left open, and only then forget their slots."""
        for segment, event in scan.closed():
            self._outbox.inherit(segment, event)
        interrupted = list(scan.interrupted())
        for event in interrupted:
            segment = self._wal.append(b'{"t":"close","event":' + event.model_dump_json().encode() + b"}")
            self._outbox.add(segment, event, event.cost_nano_usd())
            self._outbox.owe(event.org, event.cost_nano_usd())
        self._wal.sync_work()()
        for path in {path for path, damage in scan.damage if not damage.is_tail}:
            shutil.copy(path, path.with_suffix(".damaged"))  # the segment goes when it is shipped; the evidence stays
        for path in self._folder.glob("slots-*"):
            if path != slots_path(self._folder, self.boot_id):
                path.unlink()
        if interrupted:
            log.warning("usage log %s: %d requests had been interrupted", self._folder, len(interrupted))

    def _commit_or_refuse(self) -> None:
        try:
            self.commit()
        except OSError as error:
            raise MeterFull(self._refusal or str(error), hint=_RESTART) from error

    def _refuse_if_full(self, choices: int, record_bytes: int) -> None:
        if self._refusal is not None:
            raise MeterFull(self._refusal, hint=_RESTART)
        if self._streams + choices > self.max_streams or len(self._free) < choices:
            raise MeterFull(
                f"This gateway has {self._streams} of at most {self.max_streams} streams open.",
                hint="Try again in a moment, or raise max_streams.",
                retry_after_s=1,
            )
        if self._unwritten:
            raise MeterFull(f"{len(self._unwritten)} closed requests wait for room on the disk.", retry_after_s=5)
        if not self._wal.has_room(self._owed_bytes + record_bytes):
            raise MeterFull(
                f"{self._wal.total_bytes} bytes of usage wait to be shipped; at most {self._max_wal_bytes} may.",
                hint="Requests are answered again when control takes them.",
                retry_after_s=5,
            )

    def finish(self, charge: Charge, event: UsageEvent, payload: bytes) -> None:
        """Charge.close's other half: log the end, free the slots, queue the event."""
        with self._mutex:
            if self._stopping.is_set() and self._refusal is not None:
                raise ValueError(f"{charge.billing_key}: the meter is closed; the next boot bills what the slots hold")
            self._outbox.owe(event.org, charge.cost_nano_usd)
            try:
                if self._unwritten:
                    raise MeterFull("Others wait for room on the disk.")
                segment = self._wal.append(payload)
            except MeterFull as full:
                log.error("a closed request waits: %s", full)
                charge.store_final(event.usage)
                self._unwritten.append((charge, event, payload))
            else:
                self._outbox.add(segment, event, charge.cost_nano_usd)
                self._release(charge)
            charge.forget_slots()
            self._dirty = True
        if self._on_closed is not None:
            self._on_closed()

    def _release(self, charge: Charge) -> None:
        del self._open[charge.sequence]
        self._freed.extend(charge.slots)
        self._streams -= len(charge.slots)
        self._owed_bytes -= charge.head_bytes + MAX_END_BYTES

    def head(self, fields: dict[str, Any]) -> bytes:
        """What an open and its close share, as JSON."""
        return orjson.dumps({**fields, "price": self._price_json(fields["price"])})

    def _price_json(self, price: Price) -> orjson.Fragment:
        known = self._prices.get(id(price))  # a price that is held here keeps its id to itself
        if known is None:
            if len(self._prices) > 1000:  # prices change with snapshots; old ones must not pile up
                self._prices.clear()
            known = self._prices[id(price)] = (price, orjson.Fragment(price.model_dump_json()))
        return known[1]

    def _write_what_waited(self) -> None:
        while self._unwritten:
            charge, event, payload = self._unwritten[0]
            try:
                segment = self._wal.append(payload)
            except MeterFull:
                return
            self._outbox.add(segment, event, charge.cost_nano_usd)
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
        while not self._stopping.wait(interval_s):
            if self._dirty or self._open:
                try:
                    self.commit()
                except OSError:
                    return  # every open is refused from now on


def _new_slots(path: Path, slots: int) -> SlotFile:
    try:
        return SlotFile(path, slots)
    except OSError as error:
        raise MeterFull(
            f"No room for {slots} slots in {path}: {error.strerror}.", hint="Free space on the gateway's disk."
        ) from error


_RESTART = "Restart the gateway on a sound disk."
