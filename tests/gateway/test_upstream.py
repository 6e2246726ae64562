"""Which replica is asked, and what a client is told when engines fail."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zenray.gateway import failures
from zenray.gateway.replica_choice import choose
from zenray.spec.edge import Endpoint

REPLICAS = [Endpoint(replica_id=name, url=f"http://{name}") for name in "abc"]


def chosen(**options: object) -> str | None:
    arguments = {"outstanding": {}, "suspect_until": {}, "tried": (), "now": 100.0, "turn": 0} | options
    replica = choose(REPLICAS, **arguments)  # type: ignore[arg-type]
    return replica.replica_id if replica else None


def test_the_least_busy_is_asked() -> None:
    assert chosen(outstanding={"a": 2, "b": 1, "c": 3}) == "b"
    assert chosen(outstanding={"a": 2, "b": 1, "c": 3}, tried={"b"}) == "a"
    assert chosen(tried={"a", "b", "c"}) is None


def test_equals_take_turns() -> None:
    assert [chosen(turn=turn) for turn in range(6)] == ["a", "b", "c", "a", "b", "c"]


def test_a_suspect_comes_last_but_comes() -> None:
    suspects = {"a": 101.0, "b": 99.0}
    assert chosen(suspect_until=suspects, outstanding={"b": 5, "c": 9}) == "b"
    assert chosen(suspect_until=suspects, tried={"b", "c"}) == "a"


@given(st.dictionaries(st.sampled_from("abc"), st.integers(0, 5)), st.integers(0, 10**6))
def test_no_one_is_busier_than_need_be(outstanding: dict[str, int], turn: int) -> None:
    name = chosen(outstanding=outstanding, turn=turn)
    assert name and outstanding.get(name, 0) == min(outstanding.get(one, 0) for one in "abc")


@pytest.mark.parametrize(
    ("status", "message", "code", "told"),
    [
        (400, "This model's maximum context length is 8 tokens.", "context_length_exceeded", "8 tokens"),
        (400, "`up` cannot do tools", "invalid_request", "`asked` cannot do tools"),
        (422, "bad schema", "invalid_request", "bad schema"),
        (401, "wrong key abc", "upstream_failed", "status 401"),
        (404, "The model `up` does not exist.", "upstream_failed", "status 404"),
        (500, "CUDA error at 10.0.0.3", "upstream_failed", "status 500"),
        (503, "draining", "server_is_overloaded", "overloaded"),
    ],
)
def test_engine_errors_in_openai_s_words(status: int, message: str, code: str, told: str) -> None:
    error = {"message": message, "type": "X", "param": None, "code": status}
    names = {"upstream_model": "up", "model": "asked"}
    for failure in (
        failures.from_answer(status, orjson.dumps({"error": error}), **names),
        failures.from_answer(status, orjson.dumps(error), **names),
        failures.from_event(error, **names),
    ):
        assert failure.code == code and told in str(failure)
        # What is between gateway and engines stays there.
        assert not any(secret in str(failure) for secret in ("abc", "10.0.0.3", "`up`"))


@pytest.mark.parametrize("raw", [b"", b"<html>", b"[]", b'{"error": "x"}', b'{"error": null}'])
def test_an_answer_that_is_no_error_body(raw: bytes) -> None:
    assert failures.from_answer(500, raw, upstream_model="", model="m").code == "upstream_failed"
    assert failures.from_answer(400, raw, upstream_model="", model="m").status == 400
