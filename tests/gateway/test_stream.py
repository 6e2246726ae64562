"""An engine's events on their way to a client: counted, cleaned, whatever the pieces they come in."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zenray.gateway.stream import DONE, EventStream
from zenray.serving.engine.wire import Wire, error_body, sse
from zenray.spec.errors import UpstreamFailed
from zenray.spec.usage import Usage


class Counts:
    """What a charge would be told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int, int]] = []
        self.first_at: int | None = None

    def count(self, choice: int, input_tokens: int, output_tokens: int) -> None:
        self.told.append((choice, input_tokens, output_tokens))

    def first_token(self) -> None:
        self.first_at = len(self.told)


def engine_stream(chat: bool, choices: int, texts: list[str]) -> bytes:
    wire = Wire(chat=chat, id="chatcmpl-1", model="upstream", created=1)
    parts = [wire.role_chunk(index, 7) for index in range(choices)] if chat else []
    for done, text in enumerate(texts, start=1):
        finish = "stop" if done == len(texts) else None
        for index in range(choices):
            parts.append(wire.token_chunk(index, text, finish, running=(7, done), usage_follows=True))
    parts.append(wire.usage_chunk(7, choices * len(texts), 3))
    return b"".join(parts) + DONE


def events_of(data: bytes) -> list[Any]:
    assert data.endswith(b"\n\n")
    lines = data.decode().split("\n\n")[:-1]
    assert all(line.startswith("data: ") for line in lines)
    return [line if line == "data: [DONE]" else orjson.loads(line[6:]) for line in lines]


def passed(data: bytes, pieces: list[int], **options: Any) -> tuple[bytes, EventStream, Counts]:
    counts = Counts()
    stream = EventStream(counts, **({"model": "asked", "choices": 1, "include_usage": False} | options))
    out, start = b"", 0
    for end in [*sorted(set(pieces)), len(data)]:
        out += stream.feed(data[start:end])
        start = end
    return out, stream, counts


# Texts that try to look like what the hot path looks for.
EVIL = [
    '","usage":{"prompt_tokens":9,"total_tokens":9,"completion_tokens":9}}',
    '"finish_reason":"x"',
    "\n\n",
    "é🙂\x00",
]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("include_usage", [True, False])
def test_what_a_client_reads(chat: bool, choices: int, include_usage: bool) -> None:
    texts = ["a", *EVIL, "z"]
    out, stream, counts = passed(engine_stream(chat, choices, texts), [], choices=choices, include_usage=include_usage)
    events = events_of(out)
    assert events.pop() == "data: [DONE]" and stream.done
    if include_usage:
        last = events.pop()
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == choices * len(texts)
        assert all(event["usage"] is None for event in events)
    else:
        assert not any("usage" in event for event in events)
    assert {event["model"] for event in events} == {"asked"}
    said = [""] * choices
    for event in events:
        (choice,) = event["choices"]
        said[choice["index"]] += choice["delta"].get("content", "") if chat else choice["text"]
    assert said == ["".join(texts)] * choices
    assert stream.final == Usage(input_tokens=7, cached_input_tokens=3, output_tokens=choices * len(texts))
    assert stream.finish_reason == "stop"
    for index in range(choices):
        told = [count for count in counts.told if count[0] == index]
        assert told == [(index, 7, done) for done in range(0 if chat else 1, len(texts) + 1)]


@given(cuts=st.lists(st.integers(1, 3000), max_size=40), texts=st.lists(st.text(), min_size=1, max_size=6))
def test_pieces_do_not_matter(cuts: list[int], texts: list[str]) -> None:
    data = engine_stream(True, 1, texts)
    whole = passed(data, [])
    pieces = passed(data, [cut for cut in cuts if cut < len(data)])
    assert pieces[0] == whole[0] and pieces[2].told == whole[2].told and pieces[1].final == whole[1].final


def test_every_byte_alone() -> None:
    data = engine_stream(True, 2, ["a", *EVIL])
    assert passed(data, list(range(1, len(data))), choices=2)[0] == passed(data, [], choices=2)[0]


def test_count_comes_before_the_bytes_go_on() -> None:
    wire = Wire(chat=True, id="1", model="m", created=1)
    counts = Counts()
    stream = EventStream(counts, model="m", choices=1, include_usage=False)
    stream.feed(wire.role_chunk(0, 5))
    assert counts.told == [(0, 5, 0)] and counts.first_at is None
    assert stream.feed(wire.token_chunk(0, "x", None, running=(5, 1), usage_follows=True))
    assert counts.told[-1] == (0, 5, 1) and counts.first_at == 2


def test_an_event_that_is_cut_off_is_neither_counted_nor_passed() -> None:
    wire = Wire(chat=False, id="1", model="m", created=1)
    event = wire.token_chunk(0, "x", None, running=(5, 1), usage_follows=True)
    out, stream, counts = passed(event[:-1], [])
    assert out == b"" and counts.told == [] and not stream.done


@pytest.mark.parametrize(
    "odd",
    [
        # Other key orders, spaces, and details that the hot path does not know.
        '{"choices": [{"index": 0, "text": "x"}], "usage": {"completion_tokens": 4, "prompt_tokens": 2}, "model": "u"}',
        '{"usage":{"prompt_tokens":2,"total_tokens":6,"completion_tokens":4},"model":"u","choices":[{"text":"x"}]}',
        '{"model":"u","choices":[{"index":0,"text":"x"}],"usage":{"prompt_tokens":2,"total_tokens":6,'
        '"completion_tokens":4,"completion_tokens_details":{"reasoning_tokens":1}}}',
        '{"model":"u","choices":[{"index":0,"text":"x"}],"usage":{"prompt_tokens":2,"total_tokens":6,'
        '"completion_tokens":4},"system_fingerprint":"f"}',
    ],
)
def test_other_shapes_are_parsed(odd: str) -> None:
    normal = Wire(chat=False, id="1", model="u", created=1).token_chunk(
        0, "a", None, running=(2, 1), usage_follows=True
    )
    out, _, counts = passed(normal + b"data: " + odd.encode() + b"\n\n", [])
    last = events_of(out)[-1]
    assert last["model"] == "asked" and "usage" not in last and last["choices"][0]["text"] == "x"
    assert counts.told == [(0, 2, 1), (0, 2, 4)]


def test_keep_alive_comments_go_on() -> None:
    assert passed(b": waiting\n\n\n\n" + DONE, [])[0] == b": waiting\n\n" + DONE


def test_error_event_ends_the_stream() -> None:
    data = engine_stream(True, 1, ["a", "b"])[:-40] + b"\n\n"
    first_two = b"\n\n".join(data.split(b"\n\n")[:2]) + b"\n\n"
    out, stream, counts = passed(first_two + sse(error_body("no", "InternalServerError", 500)) + DONE, [])
    assert stream.error and stream.error["code"] == 500 and not stream.done
    assert len(events_of(out)) == 2 and counts.told[-1] == (0, 7, 1)


@pytest.mark.parametrize("garbage", [b"data: {\n\n", b"data: 3\n\n", b"data: \n\n", b"data: " + b"x" * (17 << 20)])
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(UpstreamFailed):
        passed(garbage, [])
