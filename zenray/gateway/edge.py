"""The gateway's talk with control: the long poll of the snapshot, leases up and down, usage and canaries' counts up."""

from __future__ import annotations

import asyncio
import gc
import logging
from typing import TypeVar

import aiohttp
from pydantic import BaseModel, ValidationError

from zenray.gateway.snapshot import Directory
from zenray.spec.edge import CanaryReport, Lease, LeaseRequest, UsageAck, UsageBatch
from zenray.spec.errors import Unavailable

log = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)


_LEASES = "/edge/leases"
_LONG_POLL_LIMIT_S = 90.0
_RETRY_FROM_S, _RETRY_MOST_S = 0.1, 1.0


class Replaced(Unavailable):
    """Control lends nothing to this start of the gateway any more: a younger one has asked, or it was declared lost."""


class EdgeClient:
    """Control's edge routes. Every failure to get an answer is Unavailable, with the reason but without the token."""

    def __init__(self, session: aiohttp.ClientSession, control_url: str, token: str, gateway_id: str) -> None:
        self._session = session
        self._url = control_url.rstrip("/")
        self._headers = {"authorization": f"Bearer {token}"}
        self._gateway_id = gateway_id

    async def snapshot(self, since: int) -> bytes | None:
        """Control's next snapshot after version `since`; None: nothing has changed. Waits as long as control does."""
        return await self._ask(
            "GET",
            "/edge/snapshot",
            timeout_s=_LONG_POLL_LIMIT_S,
            params={"gateway_id": self._gateway_id, "since": str(since)},
        )

    async def lease(self, request: LeaseRequest, timeout_s: float) -> Lease:
        """Raises Replaced when only a new start of this gateway can get credit."""
        raw = await self._ask("POST", _LEASES, timeout_s=timeout_s, body=request)
        return _read(Lease, raw)

    async def ship(self, batch: UsageBatch) -> UsageAck:
        raw = await self._ask("POST", "/edge/usage", timeout_s=30, body=batch)
        return _read(UsageAck, raw)

    async def tell_canaries(self, report: CanaryReport) -> None:
        await self._ask("POST", "/edge/canaries", timeout_s=5, body=report)

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        timeout_s: float,
        params: dict[str, str] | None = None,
        body: BaseModel | None = None,
    ) -> bytes | None:
        headers = self._headers if body is None else self._headers | {"content-type": "application/json"}
        try:
            async with self._session.request(
                method,
                self._url + path,
                params=params,
                data=None if body is None else body.model_dump_json().encode(),
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=2),
            ) as response:
                raw = await response.read()
                if response.status in (204, 304):
                    return None
                if response.status == 409 and path == _LEASES:
                    raise Replaced(f"Control lends nothing to this start of the gateway: {_reason(raw)}")
                if response.status != 200:
                    raise Unavailable(f"Control answered {path} with {response.status}: {_reason(raw)}")
                return raw
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unavailable(f"Control cannot be reached at {path}: {error or type(error).__name__}.") from None


def _read(schema: type[M], raw: bytes | None) -> M:
    try:
        return schema.model_validate_json(raw or b"")
    except ValidationError as error:
        raise Unavailable(f"Control's answer is no {schema.__name__}: {error.error_count()} errors.") from None


def _reason(raw: bytes) -> str:
    return raw[:300].decode("utf-8", "replace")


async def follow_snapshot(client: EdgeClient, directory: Directory) -> None:
    """Keep `directory` up to date until cancelled. What control sends malformed is logged and asked for again."""
    wait_s = _RETRY_FROM_S
    reached = True
    while True:
        started_s = asyncio.get_running_loop().time()
        try:
            raw = await client.snapshot(directory.version)
            if raw is None:
                directory.confirm()
            else:
                before = directory.version
                update = directory.apply(raw)
                if update.full:
                    # What was just read stays for long: the collector need not walk over it again and again.
                    gc.collect()
                    gc.freeze()
                if update.full or update.version != before:
                    log.info("snapshot_applied", extra={"version": update.version, "full": update.full})
            if not reached:
                log.info("control_reached")
            reached, wait_s = True, _RETRY_FROM_S
        except (Unavailable, ValidationError) as error:
            if reached:
                log.warning("snapshot_failed", extra={"reason": _describe(error)})
            reached = False
            directory.lose_touch()
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, _RETRY_MOST_S)
        else:
            # A control that answers "nothing new" at once, instead of holding the poll, must not be hammered.
            if raw is None and asyncio.get_running_loop().time() - started_s < _RETRY_FROM_S:
                await asyncio.sleep(_RETRY_FROM_S)


def _describe(error: Exception) -> str:
    # A ValidationError's own text quotes its input, and the snapshot holds secrets.
    return f"malformed snapshot: {error.error_count()} errors" if isinstance(error, ValidationError) else str(error)
