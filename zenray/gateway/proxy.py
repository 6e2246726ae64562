"""One question from admission to bill: `/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

import orjson

from zenray.gateway import admission, failures
from zenray.gateway.admission import Asked, Bounds, Endpoint
from zenray.gateway.canaries import Canaries
from zenray.gateway.credit import Credit
from zenray.gateway.logs import RequestLog
from zenray.gateway.metering import Charge, Meter
from zenray.gateway.metrics import Metrics
from zenray.gateway.replica_choice import name_blocks, prompt_prefix
from zenray.gateway.reply import ClientGone, Disconnect, Reply
from zenray.gateway.snapshot import Directory, Key, Route
from zenray.gateway.stream import EventStream, read_usage
from zenray.gateway.upstream import Answer, Upstream, Waker
from zenray.spec.edge import CanaryRoute, RouteState
from zenray.spec.errors import Unavailable, UpstreamFailed, ZenrayError
from zenray.spec.openai import ENGINE_ONLY_CHOICE_FIELDS, ENGINE_ONLY_FIELDS
from zenray.spec.usage import Outcome, Usage

log = logging.getLogger(__name__)

_MAX_ERROR_BYTES = 1 << 20


@dataclass(slots=True)
class _Bill:
    """A charge with what was reserved for it, and how it ends."""

    charge: Charge
    reserved_nano_usd: int
    canary: CanaryRoute | None  # if it was drawn
    usage: Usage | None = None  # the engine's final one; None: what the slots hold
    finish_reason: str | None = None
    outcome: Outcome = Outcome.UPSTREAM_FAILED
    fell_back: bool = False  # from the canary that was drawn to the route's own replicas
    refused: bool = False  # the request itself was wrong


class Proxy:
    """Answers questions by asking replicas, and bills what they counted."""

    def __init__(
        self,
        *,
        directory: Directory,
        credit: Credit,
        meter: Meter,
        upstream: Upstream,
        waker: Waker,
        metrics: Metrics,
        request_log: RequestLog,
        ping_interval_s: float,
        canaries: Canaries,
    ) -> None:
        self._directory = directory
        self._credit = credit
        self._meter = meter
        self._upstream = upstream
        self._waker = waker
        self._metrics = metrics
        self._request_log = request_log
        self._ping_interval_s = ping_interval_s
        self._canaries = canaries

    async def answer(self, endpoint: Endpoint, key: Key, raw: bytes, reply: Reply, disconnect: Disconnect) -> None:
        """Answer one question. Raises ZenrayError for what the client is to be told, ClientGone when it hung up."""
        asked = admission.read_request(endpoint, raw)
        route = admission.find_route(asked.model, key, self._directory)
        reply.model = asked.model
        admission.check_ready(route)
        self._check_parts(asked, route, key)
        org = key.entry.org
        reply.belongs_to(org)
        salt = self._directory.orgs.get(org)
        if salt is None:
            raise Unavailable("Your organisation is not known to this gateway yet.", hint="Retry.", retry_after_s=2)
        try:
            bounds, reserved_nano_usd = await self._reserve(asked, route, org, reply)
        except asyncio.CancelledError:
            if disconnect.gone:
                raise ClientGone from None
            raise
        bill = self._open(asked, route, key, reserved_nano_usd, reply)
        try:
            route = await self._awake(asked, route, reply)
            body = admission.engine_body(asked, route, bounds, salt.cache_salt)
            answer = await self._upstream.ask(
                asked.model,
                endpoint.value,
                body,
                reply.request_id,
                work=asked.choices,
                # Organisations share no cache, by their salts.
                prefix=lambda: name_blocks(f"{asked.model}:{org}", prompt_prefix(asked.body)),
                canary=bill.canary.revision if bill.canary is not None else None,
                trace=reply.trace,
            )
            if answer.fell_back:
                bill.fell_back = True
                bill.charge.answered_with(route.entry.quantization)
            await self._pass_on(asked, route, answer, bill, reply)
        except ZenrayError as error:
            bill.refused = error.status < 500
            raise
        except asyncio.CancelledError:
            bill.outcome = Outcome.CLIENT_GONE if disconnect.gone else Outcome.INTERRUPTED
            if disconnect.gone:
                raise ClientGone from None
            raise
        finally:
            self._close(asked, org, bill, reply)

    def _open(self, asked: Asked, route: Route, key: Key, reserved_nano_usd: int, reply: Reply) -> _Bill:
        """Record that the request begins. Raises MeterFull, and then nothing stays reserved."""
        canary = self._upstream.draw_canary(route)
        try:
            charge = self._meter.open(
                request_id=reply.request_id,
                org=key.entry.org,
                key_id=key.entry.key_id,
                user_id=key.entry.user_id,
                model_asked=asked.model,
                model_answered=asked.model,
                adapter=None,
                quantization=canary.quantization if canary else route.entry.quantization,
                price=route.entry.price,
                reserve_nano_usd=reserved_nano_usd,
                choices=asked.choices,
                prompts=asked.prompts,
            )
        except BaseException:
            self._credit.settle(key.entry.org, reserved_nano_usd, 0)
            raise
        if reply.trace is not None:
            reply.trace.admitted()
        return _Bill(charge, reserved_nano_usd, canary)

    def _check_parts(self, asked: Asked, route: Route, key: Key) -> None:
        if asked.endpoint is Endpoint.CHAT and any(
            type(message.get("content")) is list for message in asked.body["messages"]
        ):
            visible = {one.entry.model: one.entry.modalities for one in self._directory.visible_to(key)}
            admission.check_modalities(asked, route, visible)

    async def _reserve(self, asked: Asked, route: Route, org: str, reply: Reply) -> tuple[Bounds, int]:
        """Bounds that are covered, and what is reserved for them. Raises InsufficientQuota, Unavailable."""
        bounds = admission.bound(asked, route)
        if bounds is not None:
            needed = admission.reserve_nano_usd(asked, route, bounds)
            if self._credit.reserve(org, needed) or await self._credit.reserve_or_ask(org, needed):
                return bounds, needed
            if self._credit.book.available(org) <= 0:
                raise admission.no_credit(org, needed, 0)
        route = await self._awake(asked, route, reply)
        if bounds is None or not asked.media_bytes:  # what images cost, the tokenizer does not know
            bounds = admission.bound(asked, route, exact_input_tokens=await self._tokenize(asked, route, reply))
        assert bounds is not None
        needed = admission.reserve_nano_usd(asked, route, bounds)
        if await self._credit.reserve_or_ask(org, needed):
            return bounds, needed
        available = self._credit.book.available(org)
        fitting = admission.fit_to_credit(asked, route, bounds, available)
        if fitting is not None:
            affordable = admission.reserve_nano_usd(asked, route, fitting)
            if self._credit.reserve(org, affordable):
                return fitting, affordable
        raise admission.no_credit(org, needed, available)

    async def _tokenize(self, asked: Asked, route: Route, reply: Reply) -> int:
        """The true number of input tokens of the longest prompt, from an engine."""
        prompt: Any = asked.body.get("prompt")
        if asked.endpoint is Endpoint.CHAT or isinstance(prompt, str):
            prompts: list[Any] = [prompt]
        elif isinstance(prompt[0], int):
            return len(prompt)
        elif isinstance(prompt[0], list):
            return max(len(one) for one in prompt)
        else:
            prompts = prompt
        longest = 0
        for one in prompts:
            body = admission.tokenize_body(asked, route, one)
            answer = await self._upstream.ask(asked.model, "/tokenize", body, reply.request_id)
            try:
                raw = await answer.response.read()
            except OSError as error:
                answer.failed(asked.model, reply.request_id, error)
                raise failures.died(started=False) from None
            finally:
                answer.release()
            if answer.response.status != 200:
                raise self._refusal(answer.response.status, raw, asked, route)
            try:
                longest = max(longest, int(orjson.loads(raw)["count"]))
            except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
                raise UpstreamFailed("The engine's answer to /tokenize cannot be read.") from None
        return longest

    async def _awake(self, asked: Asked, route: Route, reply: Reply) -> Route:
        """The route once it has a replica. A stream that waits is kept alive with comments."""
        if route.entry.state is not RouteState.ASLEEP:
            return route
        task = self._waker.wake(asked.model)
        while not task.done():
            await asyncio.wait({task}, timeout=self._ping_interval_s if asked.stream else None)
            if not task.done():
                await reply.ping()
        task.result()
        return self._directory.routes.get(asked.model, route)

    async def _pass_on(self, asked: Asked, route: Route, answer: Answer, bill: _Bill, reply: Reply) -> None:
        try:
            if answer.response.status != 200:
                bill.usage = Usage()
                raw = await answer.response.read(_MAX_ERROR_BYTES)
                raise self._refusal(answer.response.status, raw, asked, route)
            if asked.stream:
                await self._pass_stream(asked, route, answer, bill, reply)
            else:
                await self._pass_whole(asked, answer, bill, reply)
        except OSError as error:
            answer.failed(asked.model, reply.request_id, error)
            raise failures.died(started=reply.streaming) from None
        finally:
            answer.release()

    async def _pass_whole(self, asked: Asked, answer: Answer, bill: _Bill, reply: Reply) -> None:
        raw = await answer.response.read()
        try:
            body = orjson.loads(raw)
            usage, choices = body["usage"], body["choices"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise UpstreamFailed("The engine's answer cannot be read.") from None
        bill.usage = read_usage(usage)
        body["model"] = asked.model
        _strip(body, ENGINE_ONLY_FIELDS)
        for choice in choices:
            _strip(choice, ENGINE_ONLY_CHOICE_FIELDS)
            bill.finish_reason = choice.get("finish_reason") or bill.finish_reason
        bill.outcome = Outcome.COMPLETED
        await reply.whole(200, orjson.dumps(body))

    async def _pass_stream(self, asked: Asked, route: Route, answer: Answer, bill: _Bill, reply: Reply) -> None:
        events = EventStream(bill.charge, model=asked.model, choices=asked.choices, include_usage=asked.include_usage)
        await reply.start_stream()
        last = b""

        def take(data: bytes) -> bool:
            """Called by the replica's connection. True: the stream is over, or the client is slow."""
            nonlocal last
            passed = events.feed(data)
            if events.done or events.error is not None:
                last = passed
                return True
            return reply.write(passed) if passed else False

        try:
            while await answer.response.pour(take):
                if events.error is not None:
                    if last:
                        await reply.more(last)
                    raise failures.from_event(
                        events.error, upstream_model=route.entry.upstream_model, model=asked.model
                    )
                if events.done:
                    # Set before the send, which may find that the client is gone: the answer is complete.
                    bill.outcome = Outcome.COMPLETED
                    await reply.end_stream(last)
                    return
                await reply.drain()
        finally:
            bill.usage, bill.finish_reason = events.final, events.finish_reason
        raise failures.died(started=True)

    def _refusal(self, status: int, raw: bytes, asked: Asked, route: Route) -> ZenrayError:
        error = failures.from_answer(status, raw, upstream_model=route.entry.upstream_model, model=asked.model)
        if error.status >= 500:
            log.warning("engine_error", extra={"model": asked.model, "status": status})
        return error

    def _close(self, asked: Asked, org: str, bill: _Bill, reply: Reply) -> None:
        """End the charge, free the reserve. Runs whatever happened."""
        try:
            event = bill.charge.close(bill.outcome, bill.usage, bill.finish_reason)
        except ValueError as error:
            # An engine's final usage that cannot be: what its stream counted is billed, and nothing stays reserved.
            log.error(
                "impossible_usage", extra={"request_id": reply.request_id, "model": asked.model, "reason": str(error)}
            )
            event = bill.charge.close(bill.outcome, None, bill.finish_reason)
        cost_nano_usd = bill.charge.cost_nano_usd
        self._credit.settle(org, bill.reserved_nano_usd, cost_nano_usd)
        if reply.trace is not None:
            reply.trace.closed(event)
        ttft_s = None if event.ttft_ms is None else event.ttft_ms / 1e3
        self._metrics.usage(asked.model, event.usage, ttft_s)
        if bill.canary is not None:
            self._metrics.canary(asked.model, bill.canary.revision, bill.outcome.value)
            if bill.outcome in (Outcome.COMPLETED, Outcome.UPSTREAM_FAILED):  # else it says nothing of the canary
                lost = bill.outcome is Outcome.UPSTREAM_FAILED and not bill.refused
                self._canaries.note(bill.canary, failed=lost or bill.fell_back)
        self._request_log.write(
            {
                "request_id": reply.request_id,
                "org": org,
                "key_id": event.key_id,
                "model": asked.model,
                "stream": asked.stream,
                "status": reply.status,
                "outcome": event.outcome,
                "input_tokens": event.usage.input_tokens,
                "cached_input_tokens": event.usage.cached_input_tokens,
                "output_tokens": event.usage.output_tokens,
                "cost_nano_usd": cost_nano_usd,
                "latency_ms": round((time.perf_counter() - reply.started_s) * 1e3, 3),
                "ttft_ms": event.ttft_ms,
            }
        )


def _strip(fields: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        fields.pop(name, None)
