"""Who may ask for what, and the bounds on what it may cost."""

from __future__ import annotations

import hashlib
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.fake_control import PRICE, route
from zenray.catalog.catalog import Catalog
from zenray.gateway import admission
from zenray.gateway.admission import Bounds, Endpoint
from zenray.gateway.snapshot import Directory, Key, Route
from zenray.spec.clock import FakeClock
from zenray.spec.edge import KeyEntry, RouteState, Snapshot
from zenray.spec.errors import (
    ContextLengthExceeded,
    InvalidApiKey,
    InvalidRequest,
    InvalidValue,
    ModelNotFound,
    ModelNotReady,
    ScopeDenied,
)
from zenray.spec.money import Price
from zenray.spec.openai import PART_MODALITIES


def directory(tmp_path: Path, *models: str, **keys: KeyEntry) -> Directory:
    known = Directory(tmp_path / "snapshot.jsonl", FakeClock(), max_age_s=60)
    digests = {hashlib.sha256(secret.encode()).hexdigest(): entry for secret, entry in keys.items()}
    routes = {model: route(model, ["http://replica"]) for model in models}
    known.apply(Snapshot(version=1, full=True, issued_at=0, keys=digests, routes=routes).model_dump_json().encode())
    return known


def entry(**fields: Any) -> KeyEntry:
    return KeyEntry(**({"key_id": "k1", "org": "acme"} | fields))


def asked(endpoint: Endpoint = Endpoint.CHAT, **body: Any) -> admission.Asked:
    if endpoint is Endpoint.CHAT:
        body.setdefault("messages", [{"role": "user", "content": "hi"}])
    return admission.read_request(endpoint, orjson.dumps({"model": "m"} | body))


def test_keys(tmp_path: Path) -> None:
    known = directory(
        tmp_path, good=entry(), revoked=entry(revoked=True), old=entry(expires_at=100), new=entry(expires_at=101)
    )

    def authenticate(header: bytes | None) -> str:
        return admission.authenticate(header, known, now=100, key_prefix="sk-zen-").entry.key_id

    assert authenticate(b"Bearer good") == authenticate(b"bearer  good ") == authenticate(b"Bearer new") == "k1"
    for header in (None, b"", b"Bearer", b"Bearer ", b"Basic good", b"good", b"Bearer goo", b"Bearer \xff\x00"):
        with pytest.raises(InvalidApiKey):
            authenticate(header)
    for secret, word in (("revoked", "revoked"), ("old", "expired")):
        with pytest.raises(InvalidApiKey, match=word):
            authenticate(f"Bearer {secret}".encode())
    with pytest.raises(InvalidApiKey, match="begin with 'sk-zen-'"):
        authenticate(b"Bearer sk-proj-abc")


def test_scopes_and_names(tmp_path: Path) -> None:
    known = directory(tmp_path, "zen-7b", "zen-14b", "other.1")
    key = Key(entry(scopes=("zen-*", "other.?")))
    for model in ("zen-7b", "other.1"):
        assert admission.find_route(model, key, known).entry.model == model
    narrow = Key(entry(scopes=("zen-7b",)))
    with pytest.raises(ScopeDenied, match="zen-7b"):
        admission.find_route("zen-14b", narrow, known)
    # The names of models that a key may not see are not suggested to it.
    with pytest.raises(ModelNotFound) as missing:
        admission.find_route("zen-14", narrow, known)
    assert "zen-14b" not in str(missing.value) and "zen-7b" in str(missing.value)
    with pytest.raises(ScopeDenied):
        admission.find_route("zen-7b", Key(entry(scopes=())), known)
    with pytest.raises(ScopeDenied):
        admission.find_route("zen-7b", Key(entry(scopes=("zen", "ZEN-*", "zen-7bb"))), known)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": RouteState.LOADING}, "still loading"),
        ({"state": RouteState.FAILED, "message": "no memory"}, "no memory"),
        ({"state": RouteState.ASLEEP}, "asleep"),
    ],
)
def test_models_that_are_not_ready(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelNotReady, match=message) as refused:
        admission.check_ready(Route(route("m", **changes)))
    assert int(refused.value.headers()["retry-after"]) >= 1


def test_a_sleeper_that_can_be_woken_is_ready() -> None:
    admission.check_ready(Route(route("m", state=RouteState.ASLEEP, wake_url="http://proxy/m")))


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"3", b'{"model":"m"}', b"\xff\xfe", b'{"model":"m","messages":NaN}']
)
def test_malformed_bodies(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        admission.read_request(Endpoint.CHAT, raw)


def test_a_json_error_does_not_quote_the_body() -> None:
    with pytest.raises(InvalidRequest) as refused:
        admission.read_request(Endpoint.CHAT, b'{"messages": "my secret" "x"}')
    assert "secret" not in str(refused.value) and "column" in str(refused.value)


@pytest.mark.parametrize(
    "body",
    [
        {"stream_options": {"include_usage": True}},
        {"max_tokens": 3, "max_completion_tokens": 4},
        {"top_logprobs": 3},
        {"tool_choice": "required"},
    ],
)
def test_fields_that_do_not_go_together(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue):
        asked(**body)


def test_choices() -> None:
    assert asked(n=3).choices == 3
    assert asked(Endpoint.COMPLETIONS, prompt=["a", "b"], n=3).choices == 6
    assert asked(Endpoint.COMPLETIONS, prompt=[1, 2]).prompts == 1
    assert asked(Endpoint.COMPLETIONS, prompt=[[1], [2], [3]]).prompts == 3
    with pytest.raises(InvalidValue, match="128"):
        asked(Endpoint.COMPLETIONS, prompt=["a"] * 65, n=2)


def test_output_bounds() -> None:
    limits = Route(route("m", context_tokens=1000, default_max_tokens=200))
    short, long = asked(), asked(messages=[{"role": "user", "content": "x" * 900}])

    bounds = admission.bound(short, limits)
    assert bounds and bounds.max_tokens == 200 and bounds.input_tokens == short.body_bytes + 64
    assert admission.bound(long, limits) is None  # must be tokenised: 900 bytes may be 900 tokens
    exact = admission.bound(long, limits, exact_input_tokens=300)
    assert exact == Bounds(300, 200, True)
    tight = admission.bound(long, limits, exact_input_tokens=900)
    assert tight == Bounds(900, 100, True)
    with pytest.raises(ContextLengthExceeded, match="1000 input"):
        admission.bound(long, limits, exact_input_tokens=1000)
    # What was asked for is kept, and the engine may refuse it; what can never fit is refused here.
    kept = admission.bound(asked(max_tokens=999), limits)
    assert kept and kept.max_tokens == 999
    with pytest.raises(ContextLengthExceeded, match="1000"):
        admission.bound(asked(max_tokens=1000), limits)
    assert asked(Endpoint.COMPLETIONS, prompt="x").max_tokens == 16


def test_tools_count_as_they_are_rendered() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    limits = Route(route("m", context_tokens=100_000))
    plain, tools = asked(), asked(tools=[tool])
    extra = admission.input_bound_tokens(tools, limits) - admission.input_bound_tokens(plain, limits)
    assert extra > 4 * len(orjson.dumps(tool))


tokens = st.integers(0, 10**6)


@given(
    prices=st.tuples(*[st.decimals(0, 10, places=7)] * 3),
    choices=st.integers(1, 128),
    input_tokens=tokens,
    output_tokens=tokens,
    data=st.data(),
)
def test_the_reserve_covers_whatever_is_billed(
    prices: tuple[Decimal, Decimal, Decimal], choices: int, input_tokens: int, output_tokens: int, data: st.DataObject
) -> None:
    price = Price(
        version="1", input_usd_per_1k=prices[0], cached_input_usd_per_1k=prices[1], output_usd_per_1k=prices[2]
    )
    limits = Route(route("m", price=price))
    reserve = limits.bound_nano_usd(choices, input_tokens, output_tokens)
    used_in = data.draw(st.integers(0, choices * input_tokens))
    cached = data.draw(st.integers(0, used_in))
    used_out = data.draw(st.integers(0, choices * output_tokens))
    assert price.cost_nano_usd(used_in, cached, used_out) <= reserve
    affordable = limits.output_tokens_for(reserve, choices, input_tokens)
    assert affordable is None or affordable >= output_tokens
    less = data.draw(st.integers(0, reserve))
    fitting = limits.output_tokens_for(less, choices, input_tokens)
    if fitting is not None and fitting >= 0:
        assert limits.bound_nano_usd(choices, input_tokens, fitting) <= less


def test_fitting_to_credit() -> None:
    question, limits = asked(n=2), Route(route("m"))
    bounds = Bounds(input_tokens=10, max_tokens=100, exact_input=True)
    # two choices: 2 × (10 × 1,000 + tokens × 2,000), and 2 for rounding
    assert admission.fit_to_credit(question, limits, bounds, 20_000 + 4_000 * 7 + 2) == Bounds(10, 7, True)
    assert admission.fit_to_credit(question, limits, bounds, 20_000 + 3_999) is None
    assert admission.fit_to_credit(question, limits, bounds, 10**9) == bounds
    free = Route(route("m", price=PRICE.model_copy(update={"output_usd_per_1k": Decimal(0)})))
    assert admission.fit_to_credit(question, free, bounds, 20_002) == bounds


def test_what_the_engine_is_sent() -> None:
    question = asked(max_completion_tokens=50, stream=True, user="ann", metadata={"a": "b"}, seed=None, top_p=0.5)
    sent = orjson.loads(
        admission.engine_body(question, Route(route("m")), Bounds(10, 7, False), cache_salt="acme's secret")
    )
    assert sent == {
        "model": "scripted",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 7,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "top_p": 0.5,
        "cache_salt": "acme's secret",
    }


def test_parts_that_a_model_does_not_take() -> None:
    question = with_image("data:image/png;base64,AAAA")
    seeing = Route(route("eye", modalities=("text", "vision")))
    admission.check_modalities(question, seeing, {})
    with pytest.raises(InvalidValue, match="Models that do: eye") as refused:
        admission.check_modalities(question, Route(route("m")), {"m": ("text",), "eye": ("text", "vision")})
    assert refused.value.param == "messages[0].content[1]"
    with pytest.raises(InvalidValue, match="No model here does"):
        admission.check_modalities(question, Route(route("m")), {"m": ("text",)})


def with_image(url: str, text: str = "what?", **changes: object) -> admission.Asked:
    part = {"type": "image_url", "image_url": {"url": url}}
    return asked(messages=[{"role": "user", "content": [{"type": "text", "text": text}, part]}], **changes)


@pytest.mark.parametrize(
    "url", ["https://example.org/a.png", "http://10.0.0.3/", "file:///etc/passwd", "data:text/html,"]
)
def test_no_engine_is_made_to_fetch_anything(url: str) -> None:
    with pytest.raises(InvalidValue, match="data URL") as refused:
        admission.check_modalities(with_image(url), Route(route("eye", modalities=("vision",))), {})
    assert refused.value.param == "messages[0].content[1].image_url.url"


def test_what_an_image_costs_is_bound_by_the_context() -> None:
    seeing = Route(route("eye", modalities=("text", "vision")))
    context, default = seeing.entry.context_tokens, seeing.entry.default_max_tokens
    for changes, max_tokens in (({}, default), ({"max_tokens": 10}, 10)):
        question = with_image("data:image/png;base64,AAAA", **{"max_tokens": None} | changes)
        admission.check_modalities(question, seeing, {})
        assert admission.bound(question, seeing) == admission.Bounds(context, max_tokens, False)


def test_an_image_takes_no_room_from_an_output_that_nobody_asked_for_but_its_text_does() -> None:
    seeing = Route(route("eye", context_tokens=1000, default_max_tokens=200, modalities=("text", "vision")))

    def question(text: str, **changes: object) -> admission.Asked:
        made = with_image("data:image/png;base64," + "A" * 5000, text, **changes)
        admission.check_modalities(made, seeing, {})
        return made

    assert admission.bound(question("what?"), seeing) == Bounds(1000, 200, False)
    assert admission.bound(question("x" * 900, max_tokens=7), seeing) == Bounds(1000, 7, False)
    # Nor does it beside tools, which count as they are rendered.
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert admission.bound(question("what?", tools=[tool]), seeing) == Bounds(1000, 200, False)
    # An engine that counts the text refuses a `max_tokens` that does not fit beside it.
    long = question("x" * 900)
    assert admission.bound(long, seeing) is None
    assert admission.bound(long, seeing, exact_input_tokens=890) == Bounds(1000, 110, True)
    with pytest.raises(ContextLengthExceeded):
        admission.bound(long, seeing, exact_input_tokens=1000)


def test_the_catalog_and_the_parts_speak_of_the_same_modalities() -> None:
    known = {modality for entry in Catalog.load() for modality in entry.modalities}
    assert set(PART_MODALITIES.values()) <= known
