"""The error tree: OpenAI's shape, statuses that the client treats rightly, hints."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zenray.spec import errors
from zenray.spec.errors import (
    Conflict,
    InsufficientQuota,
    InvalidRequest,
    ModelNotFound,
    RateLimited,
    Unavailable,
    ZenrayError,
    suggest,
)


def tree(root: type[ZenrayError] = ZenrayError) -> Iterator[type[ZenrayError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child)


@pytest.mark.parametrize("error", list(tree()), ids=lambda e: e.__name__)
def test_the_tree_drawn_at_the_top_is_the_tree(error: type[ZenrayError]) -> None:
    assert errors.__doc__ is not None
    words = next(w for w in map(str.split, errors.__doc__.splitlines()) if error.__name__ in w)
    after = words[words.index(error.__name__) + 1 :]
    assert after[:2] == [str(error.status), error.code]


@pytest.mark.parametrize("error", list(tree()), ids=lambda e: e.__name__)
def test_every_error_has_openais_four_keys(error: type[ZenrayError]) -> None:
    body = error("what is wrong", hint="What to do.", param="p").to_openai()
    assert body == {
        "error": {"message": "what is wrong What to do.", "type": error.type, "param": "p", "code": error.code}
    }
    assert error("wrong").to_openai()["error"]["param"] is None
    assert str(error("wrong")) == "wrong"


def test_codes_are_unique() -> None:
    codes = [error.code for error in tree()]
    assert len(codes) == len(set(codes))


def test_only_conflict_is_a_409_because_the_client_retries_it() -> None:
    assert [error for error in tree() if error.status == 409] == [Conflict]
    assert not [error for error in tree() if error.status in (402, 422)]


def test_what_must_not_be_retried_says_so() -> None:
    assert InsufficientQuota("no credit").headers() == {"x-should-retry": "false"}
    assert RateLimited("slow down", retry_after_s=2.4).headers() == {"retry-after": "2"}
    assert Unavailable("busy", retry_after_s=0.01).headers() == {"retry-after": "1"}
    assert InvalidRequest("no").headers() == {}
    assert Conflict("taken", retry_after_s=5).headers() == {"retry-after": "5", "x-should-retry": "false"}


def test_errors_are_caught_by_their_kind() -> None:
    with pytest.raises(errors.NotFound):
        raise ModelNotFound("no such model")
    assert issubclass(errors.ContextLengthExceeded, InvalidRequest)
    assert issubclass(errors.StorageUnavailable, Unavailable)


def test_suggest_names_the_nearest_and_the_known() -> None:
    assert suggest("zen-72", ["zen-7b", "zen-72b"]) == "Did you mean 'zen-72b'? Known: zen-72b, zen-7b."
    assert suggest("xxxxxxx", ["zen-7b"]) == "Known: zen-7b."
    assert suggest("x", []) == "There are none yet."
    assert (
        suggest("x", (f"model-{i:02}" for i in range(30)), most=3)
        == "Known: model-00, model-01, model-02, and 27 more."
    )


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=10), max_size=5))
def test_suggest_takes_any_text(name: str, known: list[str]) -> None:
    hint = suggest(name, known)
    assert hint.endswith(".")
    assert all(each in hint for each in known)
