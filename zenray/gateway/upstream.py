"""The way to the replicas: what they are asked, what is tried when one cannot be reached, how a sleeper is woken."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Collection, Sequence

import aiohttp

from zenray.gateway import failures
from zenray.gateway.homes import Homes
from zenray.gateway.http_client import Client, Connection, Lost, Unreachable
from zenray.gateway.metrics import Metrics
from zenray.gateway.replica_choice import Chooser
from zenray.gateway.snapshot import Directory, Route
from zenray.gateway.tracing import RequestTrace
from zenray.spec.clock import Clock
from zenray.spec.edge import CanaryRoute, RouteState
from zenray.spec.edge import Endpoint as Replica
from zenray.spec.errors import ModelNotReady, Unavailable, UpstreamFailed, ZenrayError

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 3.0
_SUSPECT_S, _MOST_SUSPECT_S = 2.0, 30.0
_WAKE_POLL_S = 0.05


class Answer:
    """A replica's answer, begun. `release` must be called, once it is read or no longer wanted."""

    __slots__ = ("_upstream", "_work", "fell_back", "replica_id", "response")

    def __init__(
        self, upstream: Upstream, replica_id: str, response: Connection, work: int, *, fell_back: bool
    ) -> None:
        self._upstream = upstream
        self._work = work
        self.replica_id = replica_id
        self.response = response
        self.fell_back = fell_back  # the canary that was drawn could not answer

    def failed(self, model: str, request_id: str, error: OSError) -> None:
        """It broke off, or does not move: others are preferred to its replica for a while."""
        how = "silent" if isinstance(error, TimeoutError) else "lost"
        self._upstream.suspect(self.replica_id, model, request_id, how, error)

    def release(self) -> None:
        """Unless it has been read to its end, the connection is closed, and the engine stops computing."""
        self.response.release()
        self._upstream.done(self.replica_id, self._work)


class Upstream:
    """Asks replicas for one gateway process."""

    def __init__(
        self,
        client: Client,
        directory: Directory,
        clock: Clock,
        metrics: Metrics,
        homes: Homes | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`homes`: shared with the gateway's other processes. `draw`: evenly from [0, 1)."""
        self.outstanding: dict[str, int] = {}
        self._client = client
        self._directory = directory
        self._clock = clock
        self._metrics = metrics
        self._suspect_until: dict[str, float] = {}
        self._suspect_for_s: dict[str, float] = {}
        self._chooser = Chooser(homes or Homes())
        self._draw = draw

    def suspects(self) -> int:
        """Replicas that failed within the last seconds."""
        now = self._clock.monotonic()
        return sum(until > now for until in self._suspect_until.values())

    def outstanding_by_model(self) -> dict[str, int]:
        """Choices that are asked for and not answered, of models that have any."""
        found: dict[str, int] = {}
        if self.outstanding:
            for model, route in self._directory.routes.items():
                count = sum(self.outstanding.get(replica.replica_id, 0) for replica in _replicas(route))
                if count:
                    found[model] = count
        return found

    def draw_canary(self, route: Route) -> CanaryRoute | None:
        """The route's canary for as large a share of the requests as its weight, None for the others."""
        canary = route.entry.canary
        return canary if canary is not None and self._draw() < canary.weight else None

    async def ask(
        self,
        model: str,
        path: str,
        body: bytes,
        request_id: str,
        *,
        work: int = 1,
        prefix: Callable[[], list[int]] | None = None,
        canary: str | None = None,
        trace: RequestTrace | None = None,
    ) -> Answer:
        """Send to the replica that `choose` names; return when its answer has begun, whatever its status.

        `work`: the choices that are asked for. `prefix`: the prompt's first blocks, asked for when there is a choice.
        `canary`: the revision that was drawn; its replicas are tried first, and the route's own after them.
        A replica that cannot be reached, or says 503, is passed over for the next. When one breaks the connection
        before it has answered anything, the request is sent once more, and not a third time, since the request itself
        may be what kills them. When none is left while control is away, which would name those that came since,
        Serve's proxy is asked; it starts one if need be. Raises Unavailable (503) when none is left, UpstreamFailed
        (502) when it was lost.
        """
        tried: set[str] = set()
        lost = busy = asked_canary = False
        traceparent = trace.traceparent if trace is not None else None
        while True:
            picked = self._pick(model, tried, prefix, canary)
            if picked is None:
                break
            replica, engine_key, of_canary = picked
            asked_canary = asked_canary or of_canary
            tried.add(replica.replica_id)
            self.outstanding[replica.replica_id] = self.outstanding.get(replica.replica_id, 0) + work
            answered = False
            if trace is not None:
                trace.chosen(replica.replica_id)
            try:
                response = await self._client.post(
                    replica.url, path, bearer=engine_key, request_id=request_id, body=body, traceparent=traceparent
                )
                if replica.replica_id in self._suspect_until:
                    del self._suspect_until[replica.replica_id], self._suspect_for_s[replica.replica_id]
                if response.status == 503:
                    response.release()
                    self._metrics.failure(model, "busy")
                    busy = True
                    continue
                answered = True
                if trace is not None:
                    trace.begun()
                return Answer(self, replica.replica_id, response, work, fell_back=asked_canary and not of_canary)
            except (Unreachable, ValueError) as error:  # ValueError: its address is none
                self.suspect(replica.replica_id, model, request_id, "unreachable", error)
            except TimeoutError as error:
                self.suspect(replica.replica_id, model, request_id, "silent", error)
                raise UpstreamFailed("The model's replica did not answer in time.", hint="Retry.") from None
            except Lost as error:
                self.suspect(replica.replica_id, model, request_id, "lost", error)
                if lost:
                    raise failures.died(started=False) from None
                lost = True
                # It may only have closed a connection that was kept too long: where there is no other, ask it again.
                tried.discard(replica.replica_id)
            finally:
                if not answered:
                    self.done(replica.replica_id, work)
        if lost:
            raise failures.died(started=False)
        why = "All its replicas are busy." if busy else "None of its replicas can be reached."
        raise Unavailable(f"The model '{model}' cannot answer at the moment. {why}", hint="Retry.", retry_after_s=1)

    def done(self, replica_id: str, work: int) -> None:
        left = self.outstanding[replica_id] - work
        if left:
            self.outstanding[replica_id] = left
        else:
            del self.outstanding[replica_id]

    def _pick(
        self, model: str, tried: Collection[str], prefix: Callable[[], list[int]] | None, canary: str | None
    ) -> tuple[Replica, str, bool] | None:
        """The replica to ask next, of the canary that was drawn or else of the route; its key; if it is a canary's."""
        route = self._directory.routes.get(model)
        if route is None:
            return None
        entry, trial = route.entry, route.entry.canary
        if trial is not None and trial.revision == canary:
            replica = self._next(model, trial.endpoints, tried, prefix)
            if replica is not None:
                return replica, trial.engine_key, True
        replica = self._next(model, entry.endpoints, tried, prefix)
        if replica is None and entry.wake_url is not None and not self._directory.in_touch:
            proxy = Replica(replica_id=f"{entry.revision}@proxy", url=entry.wake_url)
            if proxy.replica_id not in tried:
                self._metrics.choice(model, "proxy")
                replica = proxy
        return None if replica is None else (replica, entry.engine_key, False)

    def _next(
        self, model: str, replicas: Sequence[Replica], tried: Collection[str], prefix: Callable[[], list[int]] | None
    ) -> Replica | None:
        if len(replicas) == 1 and not tried:
            self._metrics.choice(model, "only")
            return replicas[0]
        blocks = prefix() if prefix is not None and replicas else []
        chosen, why = self._chooser.choose(
            replicas, self.outstanding, self._suspect_until, tried, self._clock.monotonic(), blocks
        )
        if chosen is not None:
            self._metrics.choice(model, why)
        return chosen

    def suspect(self, replica_id: str, model: str, request_id: str, how: str, error: Exception) -> None:
        """Prefer others to this replica: for 2 s, then for twice as long each time, until it answers.

        Requests that were under way when it fell under suspicion, and fail too, say nothing new.
        """
        self._metrics.failure(model, how)
        log.warning(
            "replica_failed",
            extra={
                "request_id": request_id,
                "model": model,
                "replica_id": replica_id,
                "how": how,
                "reason": f"{type(error).__name__}: {error}",
            },
        )
        now = self._clock.monotonic()
        if self._suspect_until.get(replica_id, now) > now:
            return
        listed = {replica.replica_id for route in self._directory.routes.values() for replica in _replicas(route)}
        for gone in self._suspect_until.keys() - listed:
            del self._suspect_until[gone], self._suspect_for_s[gone]
        for_s = min(2 * self._suspect_for_s.get(replica_id, _SUSPECT_S / 2), _MOST_SUSPECT_S)
        self._suspect_for_s[replica_id], self._suspect_until[replica_id] = for_s, now + for_s


def _replicas(route: Route) -> tuple[Replica, ...]:
    trial = route.entry.canary
    return (*route.entry.endpoints, *(trial.endpoints if trial else ()))


class Waker:
    """Wakes sleeping models; all requests for one wait for one call."""

    def __init__(self, session: aiohttp.ClientSession, directory: Directory, *, timeout_s: float) -> None:
        self._session = session
        self._directory = directory
        self._timeout_s = timeout_s
        self._waking: dict[str, asyncio.Task[None]] = {}

    def wake(self, model: str) -> asyncio.Task[None]:
        """A task that ends when the model has a replica, or raises why it has none. Shared: never cancel it.

        While control is away it ends when Serve's proxy has answered, though no replica's address is known.
        """
        task = self._waking.get(model)
        if task is None:
            task = self._waking[model] = asyncio.get_running_loop().create_task(self._wake(model))
            task.add_done_callback(lambda _: self._waking.pop(model, None))
        return task

    async def _wake(self, model: str) -> None:
        log.info("waking", extra={"model": model})
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    poke = asyncio.ensure_future(self._poke(model))
                    try:
                        while not poke.done():
                            if self._is_up(model):
                                return
                            await asyncio.wait({poke}, timeout=_WAKE_POLL_S)
                    finally:
                        poke.cancel()
                    if poke.result() and not self._directory.in_touch:
                        return  # nobody can tell us where it runs, but Serve's proxy knows
                    if await self._appears(model, within_s=2.0):
                        return
        except TimeoutError:
            raise ModelNotReady(
                f"The model '{model}' did not wake within {self._timeout_s:.0f} s.", hint="Retry.", retry_after_s=10
            ) from None

    async def _appears(self, model: str, *, within_s: float) -> bool:
        """The proxy has answered, so control sees the replica soon, and tells us."""
        for _ in range(round(within_s / _WAKE_POLL_S)):
            if self._is_up(model):
                return True
            await asyncio.sleep(_WAKE_POLL_S)
        return False

    def _is_up(self, model: str) -> bool:
        route = self._directory.routes.get(model)
        if route is None or route.entry.state is RouteState.FAILED:
            raise self._gone(model, route)
        return route.entry.state is RouteState.READY and bool(route.entry.endpoints)

    def _gone(self, model: str, route: Route | None) -> ZenrayError:
        why = (route.entry.message if route else None) or "it is no longer deployed"
        return ModelNotReady(f"The model '{model}' did not wake: {why}.", retry_after_s=10)

    async def _poke(self, model: str) -> bool:
        """Any request through the Serve proxy wakes the application; it is answered when a replica runs: True."""
        route = self._directory.routes.get(model)
        if route is None or route.entry.wake_url is None:
            return False
        try:
            async with self._session.get(
                route.entry.wake_url + "/health",
                timeout=aiohttp.ClientTimeout(total=self._timeout_s, sock_connect=_CONNECT_TIMEOUT_S),
            ) as response:
                await response.read()
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            log.warning("wake_failed", extra={"model": model, "reason": f"{type(error).__name__}: {error}"})
            return False


def new_session() -> aiohttp.ClientSession:
    """A client session for control and for Serve's proxy: no cookies, no proxies, no limit on connections."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
        trust_env=False,
    )
