"""One open request: what the gateway does with it between admission and the end of its stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from zenray.gateway.metering.slots import OUTPUT_BITS, OUTPUT_MASK, counter_index, total
from zenray.spec.usage import Outcome, Usage, UsageEvent

if TYPE_CHECKING:
    from zenray.gateway.metering.meter import Meter
    from zenray.gateway.metering.wal import Segment


class Charge:
    """One open request: counts while tokens stream, then is closed once. Made by `Meter.open`, for one thread."""

    __slots__ = (
        "_closed", "_fields", "_first_token_s", "_head", "_indices", "_meter", "_opened_s", "_prompts", "_words",
        "billing_key", "cost_nano_usd", "head_bytes", "open_payload", "segment", "sequence", "slots",
    )  # fmt: skip

    def __init__(
        self,
        meter: Meter,
        words: memoryview,
        sequence: int,
        slots: list[int],
        prompts: int,
        fields: dict[str, Any],
        head: bytes,
        open_payload: bytes,
        segment: Segment,
    ) -> None:
        self.billing_key: str = fields["billing_key"]
        self.cost_nano_usd = 0  # known once it is closed
        self.sequence = sequence
        self.slots = slots
        self.head_bytes = len(head)
        self.open_payload = open_payload
        self.segment = segment  # where its open record is
        self._head = head
        self._meter = meter
        self._words = words
        self._indices = [counter_index(slot) for slot in slots]
        self._prompts = prompts
        self._fields = fields
        self._closed = False
        self._first_token_s: float | None = None
        self._opened_s = meter.clock.monotonic()

    def count(self, choice: int, input_tokens: int, output_tokens: int) -> None:
        """Store a choice's running usage: one aligned 64-bit store. Neither leg ever goes down; ValueError past 2³²."""
        if not 0 <= choice < len(self._indices):  # no index is left once it is closed
            raise ValueError(f"{self.billing_key} has no open choice {choice}")
        index = self._indices[choice]
        held = self._words[index]
        counter = input_tokens << OUTPUT_BITS | output_tokens
        if counter < held or not held & OUTPUT_MASK <= output_tokens <= OUTPUT_MASK:
            counter = _at_least(held, input_tokens, output_tokens)
        self._words[index] = counter

    def first_token(self) -> None:
        """Note the time of the first token; later calls change nothing."""
        if self._first_token_s is None:
            self._first_token_s = self._meter.clock.monotonic()

    def answered_with(self, quantization: str | None) -> None:
        """The answer comes from another revision than `open` was told of."""
        self._fields["quantization"] = quantization
        self._head = self._meter.head(self._fields)

    def counted(self) -> Usage:
        """What the slots hold now."""
        if self._closed:
            raise ValueError(f"{self.billing_key} is closed: its slots belong to others")
        input_tokens, output_tokens = total([self._words[index] for index in self._indices], self._prompts)
        return Usage(input_tokens=input_tokens, output_tokens=output_tokens)

    def close(self, outcome: Outcome, usage: Usage | None = None, finish_reason: str | None = None) -> UsageEvent:
        """End the request with the engine's final usage; None: with what the slots hold. Its cost is `cost_nano_usd`.

        Never refused for want of room: on a full disk the event waits in memory and its counts in the slots until it
        can be written, and new requests are refused until then. ValueError, and nothing is changed, if it was closed
        before or if the usage is impossible (more cached than read).
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
        event = UsageEvent(**self._fields, usage=final, **end)
        end["usage"] = {
            "input_tokens": final.input_tokens,
            "cached_input_tokens": final.cached_input_tokens,
            "output_tokens": final.output_tokens,
        }
        payload = b'{"t":"close","event":' + self._head[:-1] + b"," + orjson.dumps(end)[1:] + b"}"
        self.cost_nano_usd = event.cost_nano_usd()
        self._meter.finish(self, event, payload)
        return event

    def forget_slots(self) -> None:
        """From now on the slots are others': a late count or a second close is an error."""
        self._closed = True
        self._indices = []

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
