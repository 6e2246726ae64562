"""What a request leaves behind when its engine reports what cannot be."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import orjson
import pytest

from tests.gateway.fake_control import route
from zenray.gateway import proxy
from zenray.gateway.admission import Endpoint
from zenray.gateway.canaries import Canaries
from zenray.gateway.credit import Credit
from zenray.gateway.logs import RequestLog
from zenray.gateway.metering import LeaseBook, Meter
from zenray.gateway.metering.replay import replay
from zenray.gateway.metrics import Metrics
from zenray.gateway.reply import Disconnect, Reply
from zenray.gateway.snapshot import Directory, Key
from zenray.spec.clock import FakeClock
from zenray.spec.edge import CanaryRoute, KeyEntry, OrgEntry, Snapshot
from zenray.spec.errors import UpstreamFailed
from zenray.spec.usage import Usage

ANSWER = {
    "choices": [{"message": {"content": "x"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1},
}
BODY = orjson.dumps({"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4})


class Engine:
    """Upstream, answer and connection in one: it always says `raw`."""

    status = 200
    replica_id = "r"
    released = 0

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self.response = self

    async def ask(self, *_: object, **__: object) -> Engine:
        return self

    fell_back = False
    canary: CanaryRoute | None = None

    def draw_canary(self, _: object) -> CanaryRoute | None:
        return self.canary

    async def read(self) -> bytes:
        return self._raw

    def release(self) -> None:
        self.released += 1


async def ask(tmp_path: Path, engine: Engine) -> tuple[Meter, LeaseBook, list[dict[str, Any]]]:
    clock = FakeClock()
    directory = Directory(tmp_path / "snapshot.jsonl", clock, max_age_s=60)
    org = OrgEntry(org="acme", cache_salt="s" * 32)
    snapshot = Snapshot(
        version=1,
        full=True,
        issued_at=0,
        orgs={"acme": org},
        routes={"tiny": route("tiny", ["http://x"], quantization="fp8")},
    )
    directory.apply(snapshot.model_dump_json().encode())
    book = LeaseBook(clock)
    book.granted("acme", 10**12)

    async def ship() -> None:
        return None

    credit = Credit(
        book, cast(Any, None), gateway_id="g", boot_id="b", wait_s=1, ship_first=ship, on_replaced=lambda: None
    )
    meter = Meter(tmp_path / "usage", "g", max_streams=4, max_wal_bytes=1 << 20, clock=clock)
    answering = proxy.Proxy(
        directory=directory,
        credit=credit,
        meter=meter,
        upstream=cast(Any, engine),
        waker=cast(Any, None),
        metrics=Metrics(),
        request_log=RequestLog("g"),
        ping_interval_s=1,
        canaries=Canaries(directory),
    )
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.Event().wait()

    disconnect = Disconnect({}, receive)
    try:
        key = Key(KeyEntry(key_id="k", org="acme"))
        await answering.answer(Endpoint.CHAT, key, BODY, Reply(send, "req_1"), disconnect)
    finally:
        disconnect.stop()
    return meter, book, sent


async def test_impossible_usage_leaks_neither_slot_nor_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    impossible = Usage(input_tokens=1, cached_input_tokens=5, output_tokens=1)
    monkeypatch.setattr(proxy, "read_usage", lambda _: impossible)
    engine = Engine(orjson.dumps(ANSWER))
    meter, book, sent = await ask(tmp_path, engine)
    assert sent[0]["status"] == 200 and engine.released == 1
    assert meter.open_streams == 0 and book.available("acme") == 10**12
    (event,) = meter.pending(10)
    assert event.usage == Usage()
    assert "impossible_usage" in caplog.text
    meter.close()


async def test_what_is_billed_is_what_was_settled(tmp_path: Path) -> None:
    meter, book, _ = await ask(tmp_path, Engine(orjson.dumps(ANSWER)))
    (event,) = meter.pending(10)
    assert event.usage == Usage(input_tokens=1, output_tokens=1)
    assert book.available("acme") == 10**12 - event.cost_nano_usd() == 10**12 - meter.unshipped_nano_usd("acme")
    meter.close()


@pytest.mark.parametrize(("fell_back", "quantization"), [(False, "int4"), (True, "fp8")])
async def test_the_event_tells_the_quantization_of_the_revision_that_answered(
    tmp_path: Path, fell_back: bool, quantization: str
) -> None:
    engine = Engine(orjson.dumps(ANSWER))
    engine.canary = CanaryRoute(revision="new", weight=0.5, endpoints=(), engine_key="k", quantization="int4")
    engine.fell_back = fell_back
    meter, _, _ = await ask(tmp_path, engine)
    (event,) = meter.pending(10)
    assert event.quantization == quantization
    meter.close()
    (logged,) = replay(tmp_path / "usage")
    assert logged == event


@pytest.mark.parametrize("usage", [{"prompt_tokens": 2**32}, {"prompt_tokens": 1, "completion_tokens": 10**30}, {}])
async def test_usage_that_no_engine_can_mean_is_refused(tmp_path: Path, usage: dict[str, int]) -> None:
    raw = orjson.dumps(ANSWER | {"usage": {}}).replace(
        b'"usage":{}', b'"usage":' + str(usage).replace("'", '"').encode()
    )
    with pytest.raises(UpstreamFailed, match="usage cannot be read"):
        await ask(tmp_path, Engine(raw))
