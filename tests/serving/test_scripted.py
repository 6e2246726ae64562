"""The scripted engine: what it answers is what it says it emitted, in vLLM's shapes."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import orjson
import pytest

from zenray.serving.engine.script import Script, read_script
from zenray.serving.engine.scripted import ScriptedEngine, scripted_app
from zenray.spec.errors import CorruptData, InvalidValue


def client_of(engine: ScriptedEngine, key: str | None = None) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=scripted_app(engine, key), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://replica")


def chat(words: str = "", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": f"say something {words}"}]} | fields


def chunks_of(text: str) -> list[dict[str, Any]]:
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [orjson.loads(event) for event in events[:-1]]


USAGE = {"include_usage": True, "continuous_usage_stats": True}


async def test_a_stream_carries_running_usage_on_every_chunk_and_the_sum_at_the_end() -> None:
    engine = ScriptedEngine("m")
    body = chat("[[tokens=5 cached_tokens=2]]", stream=True, n=2, stream_options=USAGE)
    async with client_of(engine) as client:
        answer = await client.post("/v1/chat/completions", json=body, headers={"x-request-id": "r1"})
    chunks = chunks_of(answer.text)
    assert [c["choices"][0]["delta"] for c in chunks[:2]] == [{"role": "assistant", "content": ""}] * 2
    running = [(c["choices"][0]["index"], c["usage"]["completion_tokens"]) for c in chunks[2:-1]]
    assert running == [(choice, done) for done in range(1, 6) for choice in (0, 1)]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 10
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 2, "created_cache_tokens": 0}
    report = engine.truth.report("chatcmpl-r1")
    (request,) = report["requests"]  # type: ignore[misc]
    assert (request["state"], request["by_choice"]) == ("finished", [5, 5])
    assert request["prompt_tokens"] == chunks[-1]["usage"]["prompt_tokens"]


async def test_no_usage_is_shown_unless_asked_for() -> None:
    async with client_of(ScriptedEngine("m")) as client:
        answer = await client.post("/v1/completions", json={"model": "m", "prompt": "a b", "stream": True})
    chunks = chunks_of(answer.text)
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[-1]["system_fingerprint"] == "scripted"


@pytest.mark.parametrize(
    ("fields", "tokens", "finish"),
    [
        ({}, 16, "stop"),
        ({"max_tokens": 3}, 3, "length"),
        ({"max_tokens": 16}, 16, "length"),
        ({"max_tokens": 30, "ignore_eos": True}, 30, "length"),
        ({"max_completion_tokens": 30, "min_tokens": 20}, 20, "stop"),
    ],
)
async def test_length_follows_the_script_up_to_what_was_asked(fields: Any, tokens: int, finish: str) -> None:
    async with client_of(ScriptedEngine("m")) as client:
        answer = (await client.post("/v1/chat/completions", json=chat(**fields))).json()
    assert answer["usage"]["completion_tokens"] == tokens == len(answer["choices"][0]["message"]["content"].split())
    assert answer["choices"][0]["finish_reason"] == finish


async def test_a_list_of_prompts_gives_choices_for_each() -> None:
    engine = ScriptedEngine("m", script=Script(tokens=2))
    async with client_of(engine) as client:
        answer = (await client.post("/v1/completions", json={"model": "m", "prompt": ["a", "b"], "n": 2})).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["completion_tokens"] == engine.truth.totals["completion_tokens"] == 8


async def test_a_failing_script_ends_the_stream_with_vllms_error_and_counts_what_went_before() -> None:
    engine = ScriptedEngine("m")
    async with client_of(engine) as client:
        body = chat("[[tokens=9 tokens_per_chunk=2 fail_after=3 fail=error]]", stream=True)
        answer = await client.post("/v1/chat/completions", json=body)
    assert chunks_of(answer.text)[-1]["error"]["code"] == 500
    (request,) = engine.truth.report()["requests"]  # type: ignore[misc]
    assert (request["completion_tokens"], request["chunks"], request["state"]) == (6, 3, "failed")


async def test_a_client_that_leaves_stops_the_engine() -> None:
    engine = ScriptedEngine("m", script=Script(tokens=10_000, delay_ms=1), max_model_len=20_000)
    left = asyncio.Event()
    body = orjson.dumps(chat(stream=True))
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not sent:
            return {"type": "http.request", "body": body}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == 5:
            left.set()

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    await asyncio.wait_for(engine(scope, receive, send), 5)
    (request,) = engine.truth.report()["requests"]  # type: ignore[misc]
    assert request["state"] == "cut"
    assert 3 <= request["completion_tokens"] < 100
    assert request["completion_tokens"] == len(sent) - 2  # start and role come before the tokens


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (chat(model="other"), 404, "`other` does not exist"),
        (chat(max_tokens=9000), 400, "maximum context length is 8192"),
        (chat("[[tokens=x]]"), 400, "tokens=x"),
        (chat("[[colour=red]]"), 400, "Known: tokens"),
        (chat("[[status=503]]"), 503, "503"),
        ({"model": "m", "messages": []}, 400, "messages"),
    ],
)
async def test_refusals_have_vllms_error_shape(body: Any, status: int, said: str) -> None:
    async with client_of(ScriptedEngine("m")) as client:
        answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == status == answer.json()["error"]["code"]
    assert said in answer.json()["error"]["message"]


async def test_malformed_json_is_a_400() -> None:
    async with client_of(ScriptedEngine("m")) as client:
        answer = await client.post("/v1/chat/completions", content=b"{no")
    assert answer.status_code == 400


def test_the_prompt_overrules_the_header() -> None:
    script = Script().for_request("tokens=3 delay_ms=1", "hello [[tokens=4]] there")
    assert (script.tokens, script.delay_ms) == (4, 1)
    with pytest.raises(InvalidValue, match="tokens"):
        Script().changed_by("tokens=-1")


def test_a_broken_script_file_names_its_fault(tmp_path: Any) -> None:
    assert read_script(tmp_path).tokens == 16
    (tmp_path / "script.json").write_text('{"tokens": 3, "start_s": "soon"}')
    with pytest.raises(CorruptData, match="start_s"):
        read_script(tmp_path)


async def test_closed_requests_are_appended_to_the_file(tmp_path: Any) -> None:
    path = tmp_path / "emitted.jsonl"
    async with client_of(ScriptedEngine("m", emitted_path=path)) as client:
        await client.post("/v1/chat/completions", json=chat("[[tokens=2]]"))
        await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3})
    lines = [orjson.loads(line) for line in path.read_text().splitlines()]
    assert [line["completion_tokens"] for line in lines] == [2, 3]
