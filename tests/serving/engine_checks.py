"""What every replica must do, whatever its engine: run over the scripted one, and over real vLLM where one is up."""

from __future__ import annotations

from typing import Any

import httpx
import orjson

USAGE = {"include_usage": True, "continuous_usage_stats": True}
HIDDEN_ROUTES = (
    "/docs",
    "/openapi.json",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/sleep",
    "/v1/responses",
    "/invocations",
    "/detokenize",
    "/version",
)


def check_replica(url: str, key: str, model: str) -> None:
    """All checks, straight at a replica's own port. `url` has the route prefix; answers cost a few tokens each."""
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=120) as replica:
        check_guard(replica)
        check_models(replica, model)
        check_running_usage(replica, model)
        check_choices_are_summed(replica, model)
        check_context_overflow(replica, model)
        check_metrics(replica)


def check_guard(replica: httpx.Client) -> None:
    for path in ("/v1/models", "/metrics"):
        for header in ("", "Bearer wrong"):
            assert replica.get(path, headers={"authorization": header}).status_code == 401, path
    assert replica.post("/tokenize", json={}, headers={"authorization": ""}).status_code == 401
    assert replica.get("/health", headers={"authorization": ""}).status_code == 200
    for path in HIDDEN_ROUTES:
        assert replica.get(path).status_code == 404, path
        assert replica.post(path, json={}).status_code == 404, path


def check_models(replica: httpx.Client, model: str) -> None:
    assert [card["id"] for card in replica.get("/v1/models").json()["data"]] == [model]
    assert replica.post("/v1/completions", json={"model": "other", "prompt": "x"}).status_code == 404


def check_running_usage(replica: httpx.Client, model: str) -> None:
    """Every chunk has the usage so far, the last one the sum with cached tokens; the keys are where they are read."""
    body = _chat(model, stream=True, stream_options=USAGE, max_tokens=6, min_tokens=6)
    chunks = _chunks(replica.post("/v1/chat/completions", json=body).text)
    assert list(chunks[0]) == [
        "id",
        "object",
        "created",
        "model",
        "choices",
        "usage",
        "prompt_token_ids",
        "prompt_text",
    ]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] == counts[-2] == 6
    for chunk in chunks[1:-1]:
        assert list(chunk)[:6] == ["id", "object", "created", "model", "choices", "usage"]
        keys = ["prompt_tokens", "total_tokens", "completion_tokens", "completion_tokens_details"]
        assert list(chunk["usage"]) == keys
    last = chunks[-1]
    assert last["choices"] == []
    assert list(last["usage"]) == ["prompt_tokens", "total_tokens", "completion_tokens", "prompt_tokens_details"]
    assert last["usage"]["prompt_tokens"] == chunks[0]["usage"]["prompt_tokens"]
    assert 0 <= last["usage"]["prompt_tokens_details"]["cached_tokens"] <= last["usage"]["prompt_tokens"]


def check_choices_are_summed(replica: httpx.Client, model: str) -> None:
    """With n = 2 the running usage is each choice's own; the final one is the sum."""
    body = _chat(model, stream=True, stream_options=USAGE, n=2, max_tokens=4, min_tokens=4)
    chunks = _chunks(replica.post("/v1/chat/completions", json=body).text)
    running = {0: 0, 1: 0}
    for chunk in chunks[:-1]:
        running[chunk["choices"][0]["index"]] = chunk["usage"]["completion_tokens"]
    assert running == {0: 4, 1: 4}
    assert chunks[-1]["usage"]["completion_tokens"] == 8


def check_context_overflow(replica: httpx.Client, model: str) -> None:
    limit = replica.get("/v1/models").json()["data"][0]["max_model_len"]
    answer = replica.post("/v1/completions", json={"model": model, "prompt": "hello " * (limit + 8)})
    assert answer.status_code == 400
    assert f"maximum context length is {limit} tokens" in answer.json()["error"]["message"]


def check_metrics(replica: httpx.Client) -> None:
    assert "vllm:num_requests_running" in replica.get("/metrics").text


def _chat(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Tell me of the sea."}]} | fields


def _chunks(text: str) -> list[dict[str, Any]]:
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]", text[-300:]
    return [orjson.loads(event) for event in events[:-1]]
