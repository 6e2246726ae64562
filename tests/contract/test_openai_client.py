"""The unmodified `openai` client against the gateway as a real process: what it asks, is told, and is billed for."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from tests.gateway.running import KEY, Engine, FakeControl, RunningGateway, route, until
from zenray.gateway.server import REPLACED_STATUS
from zenray.spec.edge import RouteState
from zenray.spec.usage import Outcome

pytestmark = [pytest.mark.contract, pytest.mark.asyncio(loop_scope="module")]
GATEWAY = {"max_body_bytes": 100_000}

POOR, EXPIRED, REVOKED, NARROW = "sk-zen-poor", "sk-zen-expired", "sk-zen-revoked", "sk-zen-narrow"
HELLO: Any = [{"role": "user", "content": "hello there"}]


def script(words: str) -> Any:
    return [{"role": "user", "content": f"go on [[{words}]]"}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def control(engine: Engine) -> AsyncIterator[FakeControl]:
    fake = FakeControl()
    fake.add_key(KEY)
    fake.add_key(POOR, "poor", balance_nano_usd=0)
    fake.add_key(EXPIRED, expires_at=1.0)
    fake.add_key(REVOKED, revoked=True)
    fake.add_key(NARROW, scopes=("other-*",))
    fake.routes["tiny"] = route("tiny", [engine.url])
    fake.routes["loading"] = route("loading", state=RouteState.LOADING)
    await fake.start()
    fake.publish()
    yield fake
    await fake.stop()


async def billed(control: FakeControl, answer_id: str) -> Any:
    """The usage event of an answer, once it has been shipped."""
    request_id = answer_id.partition("-")[2]

    def find() -> list[Any]:
        return [event for event in control.events.values() if event.request_id == request_id]

    await until(find)
    (event,) = find()
    return event


async def test_whole_chat(gateway: RunningGateway, control: FakeControl, engine: Engine) -> None:
    raw = await gateway.client().chat.completions.with_raw_response.create(model="tiny", messages=HELLO, max_tokens=5)
    answer = raw.parse()
    assert answer.choices[0].message.content == " t0 t1 t2 t3 t4"
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == "tiny"
    assert raw.headers["x-request-id"].startswith("req_")
    assert int(raw.headers["openai-processing-ms"]) >= 0
    event = await billed(control, answer.id)
    assert answer.usage
    assert (event.usage.input_tokens, event.usage.output_tokens) == (answer.usage.prompt_tokens, 5)
    assert event.outcome is Outcome.COMPLETED and event.finish_reason == "length" and event.org == "acme"
    truth = await engine.emitted(answer.id)
    assert (truth["prompt_tokens"], truth["completion_tokens"]) == (event.usage.input_tokens, 5)


async def test_synchronous_client(gateway: RunningGateway) -> None:
    def ask() -> tuple[str | None, str]:
        with openai.OpenAI(base_url=gateway.url + "/v1", api_key=KEY) as client:
            whole = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2)
            stream = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2, stream=True)
            return whole.choices[0].message.content, "".join(c.choices[0].delta.content or "" for c in stream)

    assert await asyncio.to_thread(ask) == (" t0 t1", " t0 t1")


async def test_completions_of_several_prompts(gateway: RunningGateway, control: FakeControl) -> None:
    answer = await gateway.client().completions.create(model="tiny", prompt=["one", "two words"], n=2, max_tokens=3)
    assert [choice.text for choice in answer.choices] == [" t0 t1 t2"] * 4
    event = await billed(control, answer.id)
    assert answer.usage and event.usage.output_tokens == answer.usage.completion_tokens == 12


async def test_stream_without_usage_shows_none(gateway: RunningGateway, control: FakeControl) -> None:
    stream = await gateway.client().chat.completions.create(model="tiny", messages=HELLO, max_tokens=4, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == " t0 t1 t2 t3"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)
    assert {(chunk.id, chunk.model) for chunk in chunks} == {(chunks[0].id, "tiny")}
    event = await billed(control, chunks[0].id)
    assert event.usage.output_tokens == 4 and event.ttft_ms is not None


async def test_stream_with_usage_has_it_last_and_null_before(gateway: RunningGateway, control: FakeControl) -> None:
    stream = await gateway.client().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks[:-1])
    last = chunks[-1]
    assert last.choices == [] and last.usage and last.usage.completion_tokens == 4
    event = await billed(control, last.id)
    assert (event.usage.input_tokens, event.usage.output_tokens) == (last.usage.prompt_tokens, 4)


async def test_several_choices_in_a_stream(gateway: RunningGateway, control: FakeControl) -> None:
    stream = await gateway.client().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=4, n=3, stream=True
    )
    texts = ["", "", ""]
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        answer_id = chunk.id
    assert texts == [" t0 t1 t2 t3"] * 3
    event = await billed(control, answer_id)
    assert (event.usage.input_tokens, event.usage.output_tokens) == (6, 12)


async def test_cached_tokens_are_billed_as_cached(gateway: RunningGateway, control: FakeControl) -> None:
    answer = await gateway.client().chat.completions.create(
        model="tiny", messages=script("cached_tokens=4 prompt_tokens=10"), max_tokens=1
    )
    assert answer.usage and answer.usage.prompt_tokens_details and answer.usage.prompt_tokens_details.cached_tokens == 4
    assert (await billed(control, answer.id)).usage.cached_input_tokens == 4


async def test_models(gateway: RunningGateway) -> None:
    client = gateway.client()
    assert [model.id async for model in client.models.list()] == ["loading", "tiny"]
    assert (await client.models.retrieve("tiny")).object == "model"
    with pytest.raises(openai.NotFoundError) as refused:
        await client.models.retrieve("tinny")
    assert refused.value.code == "model_not_found" and "'tiny'" in refused.value.message
    assert [model.id async for model in gateway.client(NARROW).models.list()] == []
    with pytest.raises(openai.NotFoundError):
        await gateway.client(NARROW).models.retrieve("tiny")


@pytest.mark.parametrize(
    ("key", "changes", "error", "code"),
    [
        ("sk-zen-wrong", {}, openai.AuthenticationError, "invalid_api_key"),
        (EXPIRED, {}, openai.AuthenticationError, "invalid_api_key"),
        (REVOKED, {}, openai.AuthenticationError, "invalid_api_key"),
        (NARROW, {}, openai.PermissionDeniedError, "model_not_allowed"),
        (KEY, {"model": "tin"}, openai.NotFoundError, "model_not_found"),
        (KEY, {"model": "loading"}, openai.InternalServerError, "model_not_ready"),
        (KEY, {"max_tokens": -1}, openai.BadRequestError, "invalid_value"),
        (KEY, {"max_tokens": 10**9}, openai.BadRequestError, "context_length_exceeded"),
        (KEY, {"n": 0}, openai.BadRequestError, "invalid_value"),
        (KEY, {"temperature": 3}, openai.BadRequestError, "invalid_value"),
        (KEY, {"messages": []}, openai.BadRequestError, "invalid_value"),
        (KEY, {"extra_body": {"priority": -5}}, openai.BadRequestError, "unknown_parameter"),
        (KEY, {"extra_body": {"cache_salt": "x"}}, openai.BadRequestError, "unknown_parameter"),
        (KEY, {"extra_body": {"chat_template": "x"}}, openai.BadRequestError, "unknown_parameter"),
        (
            KEY,
            {"messages": script("prompt_tokens=8000"), "max_tokens": 1000},
            openai.BadRequestError,
            "context_length_exceeded",
        ),
        (KEY, {"messages": script("status=500")}, openai.InternalServerError, "upstream_failed"),
        (KEY, {"messages": script("status=404")}, openai.InternalServerError, "upstream_failed"),
        (KEY, {"messages": script("status=503")}, openai.InternalServerError, "server_is_overloaded"),
        (KEY, {"messages": script("fail_after=1 fail=cut")}, openai.InternalServerError, "upstream_failed"),
        (POOR, {}, openai.RateLimitError, "insufficient_quota"),
    ],
)
async def test_errors(
    gateway: RunningGateway, key: str, changes: dict[str, Any], error: type[openai.APIStatusError], code: str
) -> None:
    with pytest.raises(error) as refused:
        await gateway.client(key).chat.completions.create(**({"model": "tiny", "messages": HELLO} | changes))
    assert refused.value.code == code
    assert refused.value.request_id and refused.value.request_id.startswith("req_")
    assert set(refused.value.response.json()["error"]) == {"message", "type", "param", "code"}
    assert key not in refused.value.response.text


async def test_body_that_is_too_large(gateway: RunningGateway) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        await gateway.client().chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x" * 200_000}]
        )
    assert refused.value.status_code == 413 and refused.value.code == "request_too_large"


async def test_insufficient_quota_is_tried_once_and_overload_again(
    gateway: RunningGateway, control: FakeControl
) -> None:
    tries: list[str] = []

    async def note(request: httpx.Request) -> None:
        tries.append(request.headers["x-stainless-retry-count"])

    def counting(key: str) -> openai.AsyncOpenAI:
        http = httpx.AsyncClient(event_hooks={"request": [note]})
        return gateway.client(key, max_retries=1, http_client=http)

    with pytest.raises(openai.RateLimitError):
        await counting(POOR).chat.completions.create(model="tiny", messages=HELLO)
    assert tries == ["0"]
    tries.clear()
    with pytest.raises(openai.InternalServerError) as refused:
        await counting(KEY).chat.completions.create(model="tiny", messages=script("status=503"))
    assert tries == ["0", "1"]
    assert refused.value.response.headers["retry-after"] == "1"
    with pytest.raises(openai.InternalServerError) as refused:
        await gateway.client().chat.completions.create(model="loading", messages=HELLO)
    assert int(refused.value.response.headers["retry-after"]) >= 1


@pytest.mark.parametrize(("fail", "message"), [("cut", "lost in the middle"), ("error", "failed")])
async def test_error_in_the_middle_of_a_stream(
    gateway: RunningGateway, control: FakeControl, fail: str, message: str
) -> None:
    stream = await gateway.client().chat.completions.create(
        model="tiny", messages=script(f"fail_after=3 fail={fail} tokens=9 delay_ms=5"), stream=True
    )
    seen, answer_id = 0, ""
    with pytest.raises(openai.APIError, match=message) as broken:
        async for chunk in stream:
            seen += bool(chunk.choices[0].delta.content)
            answer_id = chunk.id
    assert broken.value.code == "upstream_failed" and seen == 3
    event = await billed(control, answer_id)
    assert event.outcome is Outcome.UPSTREAM_FAILED and event.usage.output_tokens == 3
    if fail == "cut":  # its replica is avoided now
        await gateway.logged("replica_failed", request_id=event.request_id, how="lost")


async def test_hanging_up_stops_the_engine_and_bills_what_was_counted(
    gateway: RunningGateway, control: FakeControl, engine: Engine
) -> None:
    stream = await gateway.client().chat.completions.create(
        model="tiny", messages=script("tokens=200 delay_ms=20"), max_tokens=200, stream=True
    )
    seen = 0
    async for chunk in stream:
        seen += bool(chunk.choices[0].delta.content)
        answer_id = chunk.id
        if seen == 5:
            break
    await stream.close()
    event = await billed(control, answer_id)
    assert event.outcome is Outcome.CLIENT_GONE
    entry = await engine.emitted(answer_id)
    assert entry["state"] == "cut"
    assert 5 <= event.usage.output_tokens <= entry["completion_tokens"] <= event.usage.output_tokens + 1


async def test_small_balance_shortens_the_answer_and_then_refuses(
    gateway: RunningGateway, control: FakeControl
) -> None:
    # 6 tokens in at 1,000 nano-dollars, then 2,000 for each token out, and 2 for rounding.
    control.add_key("sk-zen-few", "few", balance_nano_usd=6 * 1000 + 10 * 2000 + 2)
    control.publish()
    version = control.version
    await gateway.logged("snapshot_applied", version=version)
    client = gateway.client("sk-zen-few")
    answer = await client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=100)
    assert answer.usage and answer.usage.completion_tokens == 10
    await billed(control, answer.id)
    with pytest.raises(openai.RateLimitError) as refused:
        await client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=100)
    assert refused.value.code == "insufficient_quota"


async def test_long_prompt_without_max_tokens_gets_what_the_context_leaves(
    gateway: RunningGateway, control: FakeControl
) -> None:
    # 20,000 bytes cannot be told from 20,000 tokens without a tokenizer; the context is 8,192.
    words: Any = [{"role": "user", "content": "word " * 4000 + "[[tokens=3]]"}]
    answer = await gateway.client().chat.completions.create(model="tiny", messages=words)
    assert answer.usage and answer.usage.completion_tokens == 3


async def test_revoked_key_stops_within_two_seconds(gateway: RunningGateway, control: FakeControl) -> None:
    control.add_key("sk-zen-gone")
    control.publish()
    await gateway.logged("snapshot_applied", version=control.version)
    client = gateway.client("sk-zen-gone")
    await client.models.list()
    control.revoke("sk-zen-gone")
    revoked_at = time.monotonic()
    while True:
        try:
            await client.models.list()
        except openai.AuthenticationError:
            break
        assert time.monotonic() - revoked_at < 2


async def test_answers_without_control_and_bills_when_it_is_back(tmp_path: Path, engine: Engine) -> None:
    control = FakeControl()
    control.add_key(KEY)
    control.routes["tiny"] = route("tiny", [engine.url])
    await control.start()
    control.publish()
    port = int(control.url.rpartition(":")[2])
    gateway = await RunningGateway(tmp_path, control).start()
    try:
        await gateway.client().chat.completions.create(model="tiny", messages=HELLO, max_tokens=3)
        await until(lambda: len(control.events) == 1)
        await control.stop()
        answer = await gateway.client().chat.completions.create(model="tiny", messages=HELLO, max_tokens=3)
        assert answer.choices[0].message.content == " t0 t1 t2"
        async with httpx.AsyncClient(base_url=gateway.url) as anybody:
            await until(lambda: any("could not be shipped" in str(line) for line in gateway.log))
            assert control.url not in (await anybody.get("/readyz")).text
        # Killed while control is away, it starts from its folder: it knows the keys, but has no credit to lend.
        await gateway.stop(signal.SIGKILL)
        gateway = await RunningGateway(tmp_path, control).start(wait_for_snapshot=False)
        assert [model.id async for model in gateway.client().models.list()] == ["tiny"]
        with pytest.raises(openai.InternalServerError) as refused:
            await gateway.client().chat.completions.create(model="tiny", messages=HELLO, max_tokens=3)
        assert refused.value.code == "server_is_overloaded"
        await control.start(port)
        await until(lambda: len(control.events) == 2)
        await gateway.client(max_retries=5).chat.completions.create(model="tiny", messages=HELLO, max_tokens=3)
        await until(lambda: len(control.events) == 3)
    finally:
        await gateway.stop()
        await control.stop()


async def test_sleeping_model_is_woken_and_streams_are_kept_alive(tmp_path: Path, engine: Engine) -> None:
    control = FakeControl()
    control.add_key(KEY)
    asleep = {"state": RouteState.ASLEEP, "wake_url": engine.url}
    control.routes["tiny"] = route("tiny", **asleep)
    await control.start()
    control.publish()
    gateway = await RunningGateway(tmp_path, control, ping_interval_s=0.05).start()

    async def wake_later() -> None:
        await asyncio.sleep(0.3)
        control.set_route(route("tiny", [engine.url]))

    try:
        waking = asyncio.create_task(wake_later())
        async with httpx.AsyncClient() as client:
            body = {"model": "tiny", "messages": HELLO, "max_tokens": 2, "stream": True}
            headers = {"authorization": f"Bearer {KEY}"}
            answer = await client.post(gateway.url + "/v1/chat/completions", json=body, headers=headers)
        assert answer.text.startswith(": ping\n\n") and answer.text.endswith("data: [DONE]\n\n")
        control.set_route(route("tiny", **asleep))
        await gateway.logged("snapshot_applied", version=control.version)
        waking = asyncio.create_task(wake_later())
        whole = await gateway.client().chat.completions.create(model="tiny", messages=HELLO, max_tokens=2)
        assert whole.choices[0].message.content == " t0 t1"
        await waking
    finally:
        await gateway.stop()
        await control.stop()


@pytest.mark.parametrize("known", [RouteState.READY, RouteState.ASLEEP])
async def test_without_control_a_model_that_fell_asleep_is_asked_through_serve_s_proxy(
    tmp_path: Path, engine: Engine, known: RouteState
) -> None:
    """What the gateway knows is old: its replica is gone, or there is one whose address nobody can tell."""
    control = FakeControl()
    control.add_key(KEY)
    gone = ["http://127.0.0.1:9"] if known is RouteState.READY else []
    control.routes["tiny"] = route("tiny", gone, state=known, wake_url=engine.url)
    await control.start()
    control.publish()
    gateway = await RunningGateway(tmp_path, control, wake_timeout_s=1).start()
    try:
        with pytest.raises(openai.InternalServerError):  # it has credit now, and a replica control would tell of
            await gateway.client().chat.completions.create(model="tiny", messages=HELLO, max_tokens=2)
        await control.stop()
        await gateway.logged("snapshot_failed")
        answer = await gateway.client().chat.completions.create(model="tiny", messages=HELLO, max_tokens=2)
        assert answer.choices[0].message.content == " t0 t1"
    finally:
        await gateway.stop()
        await control.stop()


async def test_a_dead_replica_is_passed_over(tmp_path: Path, engine: Engine) -> None:
    control = FakeControl()
    control.add_key(KEY)
    control.routes["tiny"] = route("tiny", ["http://127.0.0.1:9", engine.url])
    await control.start()
    control.publish()
    gateway = await RunningGateway(tmp_path, control, processes=2).start()
    try:
        for _ in range(6):
            await gateway.client().chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
        await until(lambda: len(control.events) == 6)
        control.set_route(route("tiny", ["http://127.0.0.1:9"]))
        await gateway.logged("snapshot_applied", version=control.version, gateway_id="gateway-0")
        await gateway.logged("snapshot_applied", version=control.version, gateway_id="gateway-1")
        with pytest.raises(openai.InternalServerError) as refused:
            await gateway.client().chat.completions.create(model="tiny", messages=HELLO)
        assert refused.value.code == "server_is_overloaded"
    finally:
        assert await gateway.stop() == 0
        await control.stop()


@pytest.mark.parametrize("processes", [1, 2])
async def test_a_gateway_that_control_replaced_ends_to_be_started_anew(
    tmp_path: Path, engine: Engine, processes: int
) -> None:
    control = FakeControl()
    control.add_key(KEY, balance_nano_usd=0)
    control.routes["tiny"] = route("tiny", [engine.url])
    await control.start()
    control.publish()
    gateway = await RunningGateway(tmp_path, control, processes=processes).start()
    try:
        boots = {
            (await gateway.logged("started", gateway_id=f"gateway-{number}"))["boot_id"] for number in range(processes)
        }
        control.replaced_boots |= boots
        async with httpx.AsyncClient(base_url=gateway.url, headers={"authorization": f"Bearer {KEY}"}) as client:
            refused = await client.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO})
        assert refused.status_code == 503
        lost = (await gateway.logged("replaced"))["gateway_id"]
        if processes == 1:
            assert await gateway.wait() == REPLACED_STATUS
            gateway = await RunningGateway(tmp_path, control).start(wait_for_snapshot=False)
        else:
            await gateway.logged("process_lost", status=REPLACED_STATUS)
        await until(
            lambda: any(
                line["event"] == "started" and line["gateway_id"] == lost and line["boot_id"] not in boots
                for line in gateway.log
            )
        )
        control.free_nano_usd["acme"] = 10**12
        control.replaced_boots.clear()
        answer = await gateway.client().chat.completions.create(model="tiny", messages=HELLO, max_tokens=2)
        assert answer.usage and answer.usage.completion_tokens == 2
    finally:
        await gateway.stop()
        await control.stop()
