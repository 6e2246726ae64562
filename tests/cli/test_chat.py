"""A question on standard input, answered by a gateway that is a function."""

from __future__ import annotations

import io
import json

import httpx
import openai
import pytest

from zenray.cli.commands import chat
from zenray.spec.errors import UpstreamFailed

CHUNKS = (
    {"choices": [{"index": 0, "delta": {"content": "Paris [/fr]"}}]},
    {"choices": [{"index": 0, "delta": {"content": ".\nIndeed"}}]},
    {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}},
)


def gateway(monkeypatch: pytest.MonkeyPatch, answer: httpx.Response) -> list[httpx.Request]:
    """Answers every question with `answer`; returns what it was asked."""
    asked: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return answer

    http = httpx.Client(transport=httpx.MockTransport(handle))
    client = openai.OpenAI(base_url="http://gateway/v1", api_key="k", http_client=http, max_retries=0)
    monkeypatch.setattr(chat, "_client", lambda: client)
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of France?\n"))
    return asked


def test_an_answer_is_streamed_as_it_is_and_its_tokens_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in CHUNKS) + "data: [DONE]\n\n"
    asked = gateway(monkeypatch, httpx.Response(200, text=body, headers={"content-type": "text/event-stream"}))
    chat.chat("zen-7b")
    *answer, counts = capsys.readouterr().out.splitlines()
    assert answer == ["Paris [/fr].", "Indeed"] and counts.startswith("9 + 5 tokens, ")
    question = json.loads(asked[0].content)
    assert question["messages"] == [{"role": "user", "content": "What is the capital of France?"}]


def test_a_refusal_is_the_gateway_s_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway(monkeypatch, httpx.Response(502, json=UpstreamFailed("The replica went away.").to_openai()))
    with pytest.raises(chat.ChatRefused, match=r"^The replica went away\.$"):
        chat.chat("zen-7b")
