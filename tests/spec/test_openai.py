"""The allow-list of request fields: what passes, what is refused, and that the message names the field."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zenray.spec.errors import InvalidRequest, UnknownField
from zenray.spec.openai import CHAT, COMPLETION, Shape

USER = {"role": "user", "content": "hi"}
FULL_CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "be kind"},
        {"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "hi"}]},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "https://example.org/a.png", "detail": "low"}},
                {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
            ],
        },
        # An answer as it came, sent back.
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ],
    "frequency_penalty": 0.5,
    "logit_bias": {"50256": -100},
    "logprobs": True,
    "top_logprobs": 20,
    "max_completion_tokens": 5,
    "n": 2,
    "parallel_tool_calls": False,
    "presence_penalty": -2,
    "reasoning_effort": "low",
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
    "seed": -1,
    "stop": ["a", "b"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0,
    "top_p": 1,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": None}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "user": "u",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
}
# Every request field of vLLM 0.32 that OpenAI does not have: none may pass.
VLLM_ONLY = [
    "add_generation_prompt",
    "add_special_tokens",
    "allowed_token_ids",
    "bad_words",
    "cache_salt",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "documents",
    "ec_transfer_params",
    "ignore_eos",
    "include_reasoning",
    "include_stop_str_in_output",
    "kv_transfer_params",
    "length_penalty",
    "logprob_token_ids",
    "media_io_kwargs",
    "min_p",
    "min_tokens",
    "mm_processor_kwargs",
    "priority",
    "prompt_embeds",
    "prompt_logprobs",
    "repetition_detection",
    "repetition_penalty",
    "request_id",
    "return_prompt_text",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "session_id",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "stop_token_ids",
    "stream_interval",
    "structured_outputs",
    "thinking_token_budget",
    "top_k",
    "truncate_prompt_tokens",
    "truncation_side",
    "use_beam_search",
    "vllm_xargs",
    "watermarking",
]


def test_everything_that_openai_has_and_engines_can_do_passes() -> None:
    CHAT.check(FULL_CHAT)
    COMPLETION.check({"model": "m", "prompt": [[1, 2], [3]], "echo": True, "logprobs": 5, "max_tokens": 0})


@pytest.mark.parametrize("name", VLLM_ONLY)
@pytest.mark.parametrize("value", [1, None, "x"])
def test_no_extension_of_vllm_passes(name: str, value: object) -> None:
    for shape, body in ((CHAT, {"model": "m", "messages": [USER]}), (COMPLETION, {"model": "m", "prompt": "x"})):
        with pytest.raises(UnknownField, match=name):
            shape.check(body | {name: value})


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": 3}, "model"),
        ({"model": None}, "model"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "prompt_embeds"}]}]}, "messages[0].content[0].type"),
        ({"messages": [USER | {"content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1.0}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 129}, "n"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [None]}, "stop[0]"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "defer_loading": True}}]},
         "tools[0].function.defer_loading"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"store": True}, "store"),
        ({"modalities": ["audio"]}, "modalities[0]"),
        ({"functions": []}, "functions"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(change: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        CHAT.check({"model": "m", "messages": [USER]} | change)
    assert refused.value.param == param
    assert param in refused.value.message


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [[1], []], [-1], [1.5], {"a": 1}, [None], [True], [[2**40]]])
def test_impossible_prompts(prompt: object) -> None:
    with pytest.raises(InvalidRequest):
        COMPLETION.check({"model": "m", "prompt": prompt})


def test_unknown_fields_suggest_the_nearest() -> None:
    with pytest.raises(UnknownField, match="Did you mean 'max_tokens'"):
        CHAT.check({"model": "m", "messages": [USER], "max_token": 3})
    with pytest.raises(UnknownField, match=r"'functions' is not supported here. Use 'tools'."):
        CHAT.check({"model": "m", "messages": [USER], "functions": [{}]})


def test_only_what_an_engine_needs_is_forwarded() -> None:
    forwarded = CHAT.forwarded(FULL_CHAT | {"seed": None})
    assert not forwarded.keys() & {"user", "metadata", "store", "service_tier", "seed"}
    assert forwarded["messages"] == FULL_CHAT["messages"]


def test_messages_never_repeat_what_was_written() -> None:
    secret = "my secret prompt " * 4
    for body in ({"model": "m", "messages": secret}, {"model": "m", "messages": [USER], "temperature": secret}):
        with pytest.raises(InvalidRequest) as refused:
            CHAT.check(body)
        assert "secret" not in str(refused.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(shape=st.sampled_from([CHAT, COMPLETION]), data=st.data())
def test_any_json_is_either_taken_or_refused_by_name(shape: Shape, data: st.DataObject) -> None:
    names = st.sampled_from([*shape.fields, "other"])
    body = data.draw(st.dictionaries(names, json_values, max_size=4)) | {"model": "m"}
    body.setdefault(shape.required[1], [USER] if shape is CHAT else "x")
    try:
        shape.check(body)
    except InvalidRequest as refused:
        assert refused.param
    else:
        assert shape.forwarded(body).keys() <= shape.fields.keys()
