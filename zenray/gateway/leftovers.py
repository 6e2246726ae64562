"""What processes left that are no more: a gateway that is started with fewer of them ships what the others logged."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from zenray.gateway.config import GatewayConfig
from zenray.gateway.edge import EdgeClient
from zenray.gateway.metering import Meter, Shipper
from zenray.gateway.snapshot import Directory
from zenray.spec.clock import Clock
from zenray.spec.edge import LeaseRequest
from zenray.spec.errors import Conflict, Unavailable

log = logging.getLogger(__name__)

_RETRY_S = 1.0
_HELD_RETRY_S = 30.0


async def take_over(
    config: GatewayConfig,
    edge: EdgeClient,
    directory: Directory,
    clock: Clock,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Ship the logs of the processes past `config.processes`, one after another, and give their leases back.

    Returns when all is shipped. A folder that a process still holds is tried again until it does not; one that cannot
    be taken over is named in the log, and left as it is.
    """
    folders = config.folders_of_others()
    while folders:
        held = []
        for gateway_id, folder in folders:
            about = {"of": gateway_id, "folder": str(folder)}
            try:
                await _take_over(gateway_id, folder, config, edge, directory, clock)
            except Conflict as error:
                log.warning("leftover_usage_held", extra=about | {"reason": str(error)})
                held.append((gateway_id, folder))
            except Exception:
                log.exception("leftover_usage", extra=about)
        folders = held
        if held:
            await sleep(_HELD_RETRY_S)


async def _take_over(
    gateway_id: str, folder: Path, config: GatewayConfig, edge: EdgeClient, directory: Directory, clock: Clock
) -> None:
    meter = await asyncio.to_thread(
        Meter, folder / "usage", gateway_id, max_streams=1, max_wal_bytes=config.max_wal_bytes, clock=clock
    )
    try:
        events = await Shipper(meter, edge.ship).drain()
        await _free_leases(gateway_id, meter.boot_id, edge, directory)
        left = meter.unshipped_events
    finally:
        meter.close()
    damaged = list((folder / "usage").glob("*.damaged"))
    if not left and not damaged:
        shutil.rmtree(folder)
    log.info("leftover_usage_shipped", extra={"of": gateway_id, "events": events, "damaged": len(damaged)})


async def _free_leases(gateway_id: str, boot_id: str, edge: EdgeClient, directory: Directory) -> None:
    """The first lease of a younger start, and be it of nothing, frees what the older ones held of any organisation."""
    while True:
        org = next(iter(directory.orgs), None)
        try:
            if org is not None:
                await edge.lease(
                    LeaseRequest(gateway_id=gateway_id, boot_id=boot_id, org=org, wanted_nano_usd=0), timeout_s=5
                )
                return
        except Unavailable as error:
            log.warning("lease_failed", extra={"org": org, "reason": str(error)})
        await asyncio.sleep(_RETRY_S)
