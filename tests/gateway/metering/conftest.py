"""Meters over a temporary folder, whose commits happen when a test says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from zenray.gateway.metering import Charge, Meter
from zenray.spec.clock import FakeClock
from zenray.spec.money import Price

MakeMeter = Callable[..., Meter]


def price(version: str = "p1", output: str = "0.0006") -> Price:
    return Price(
        version=version,
        input_usd_per_1k=Decimal("0.0003"),
        cached_input_usd_per_1k=Decimal("0.00015"),
        output_usd_per_1k=Decimal(output),
    )


def open_charge(meter: Meter, **changes: Any) -> Charge:
    fields: dict[str, Any] = {
        "request_id": "chatcmpl-1",
        "org": "acme",
        "key_id": "key-1",
        "user_id": None,
        "model_asked": "zen-7b",
        "model_answered": "zen-7b",
        "adapter": None,
        "quantization": "awq-int4",
        "price": price(),
        "reserve_nano_usd": 1_000_000,
    }
    return meter.open(**{**fields, **changes})


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def make_meter(tmp_path: Path, clock: FakeClock) -> Iterator[MakeMeter]:
    meters: list[Meter] = []

    def make(**changes: Any) -> Meter:
        options: dict[str, Any] = {
            "folder": tmp_path / "wal",
            "gateway_id": "gw-1",
            "max_streams": 64,
            "max_wal_bytes": 1 << 20,
            "clock": clock,
            "commit_interval_s": 3600,
        }
        meters.append(Meter(**{**options, **changes}))
        return meters[-1]

    yield make
    for meter in meters:
        meter.close()


def die(meter: Meter) -> None:
    """As kill -9 leaves it: nothing more is written, and the folder is free for the next boot."""
    meter._stopping.set()
    meter._thread.join()
    meter._refusal = "The process was killed."
    meter._undo.close()
