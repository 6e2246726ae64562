"""Images and recordings on their way through the gateway, sent by the openai client."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

import openai
import orjson
import pytest
import pytest_asyncio
from aiohttp import web
from openai.types.chat import ChatCompletionUserMessageParam

from tests.gateway.running import KEY, FakeControl, RunningGateway, route, until
from zenray.serving.engine.wire import Wire

pytestmark = [pytest.mark.contract, pytest.mark.asyncio(loop_scope="module")]

PIXELS = base64.b64encode(bytes(range(256)) * 400).decode()
MESSAGE: ChatCompletionUserMessageParam = {
    "role": "user",
    "content": [
        {"type": "text", "text": "What is this, and who speaks?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXELS}", "detail": "low"}},
        {"type": "input_audio", "input_audio": {"data": PIXELS, "format": "wav"}},
    ],
}
PROMPT_TOKENS, OUTPUT_TOKENS = 3000, 7


class Encoder:
    """An engine that encodes images: it keeps what it was asked, and counts more tokens than the text has."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.url = ""

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_post("/tokenize", self._tokenize)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _tokenize(self, request: web.Request) -> web.Response:
        assert (await request.json())["messages"][0]["content"][1:] == MESSAGE["content"][1:]  # type: ignore[index]
        return web.json_response({"count": 8000})

    async def _answer(self, request: web.Request) -> web.Response:
        self.asked.append(orjson.loads(await request.read()))
        wire = Wire(chat=True, id="chatcmpl-1", model="scripted")
        body = wire.whole([("A heron.", "stop")], PROMPT_TOKENS, OUTPUT_TOKENS, 0)
        return web.Response(body=body, content_type="application/json")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def encoder() -> AsyncIterator[Encoder]:
    running = Encoder()
    await running.start()
    yield running
    await running.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def control(encoder: Encoder) -> AsyncIterator[FakeControl]:
    fake = FakeControl()
    fake.add_key(KEY, balance_nano_usd=10**15)
    fake.routes["omni"] = route("omni", [encoder.url], modalities=("text", "vision", "audio"))
    fake.routes["eye"] = route("eye", [encoder.url], modalities=("text", "vision"))
    fake.routes["plain"] = route("plain", [encoder.url])
    await fake.start()
    fake.publish()
    yield fake
    await fake.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(control: FakeControl, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningGateway]:
    running = await RunningGateway(tmp_path_factory.mktemp("gateway"), control, lease_wait_s=30).start()
    yield running
    assert await running.stop() == 0


async def test_parts_go_through_as_they_are_and_the_engine_s_count_is_billed(
    gateway: RunningGateway, encoder: Encoder, control: FakeControl
) -> None:
    async with gateway.client() as client:
        answer = await client.chat.completions.create(model="omni", messages=[MESSAGE], max_tokens=50)
    assert encoder.asked[-1]["messages"] == [MESSAGE]
    assert answer.usage is not None and answer.usage.prompt_tokens == PROMPT_TOKENS
    await until(lambda: control.events)
    (event,) = control.events.values()
    assert (event.usage.input_tokens, event.usage.output_tokens) == (PROMPT_TOKENS, OUTPUT_TOKENS)


@pytest.mark.parametrize(("text", "max_tokens"), [("Who speaks?", 256), ("word " * 1800, 192)])
async def test_without_max_tokens_the_engine_is_told_no_more_than_fits(
    gateway: RunningGateway, encoder: Encoder, text: str, max_tokens: int
) -> None:
    message: Any = {"role": "user", "content": [{"type": "text", "text": text}, *list(MESSAGE["content"])[1:]]}
    async with gateway.client() as client:
        await client.chat.completions.create(model="omni", messages=[message])
    assert encoder.asked[-1]["max_tokens"] == max_tokens


@pytest.mark.parametrize(("model", "part", "able"), [("plain", 1, "eye, omni"), ("eye", 2, "omni")])
async def test_a_model_that_takes_no_such_part_answers_400_and_names_those_that_do(
    gateway: RunningGateway, encoder: Encoder, model: str, part: int, able: str
) -> None:
    asked_before = len(encoder.asked)
    async with gateway.client() as client:
        with pytest.raises(openai.BadRequestError, match=f"Models that do: {able}") as refused:
            await client.chat.completions.create(model=model, messages=[MESSAGE])
    assert refused.value.param == f"messages[0].content[{part}]"
    assert len(encoder.asked) == asked_before
