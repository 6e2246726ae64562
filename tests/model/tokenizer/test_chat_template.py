"""The chat template against turns written by hand."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from zenray.model.tokenizer.build import BuiltTokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says the weather, even in Zürich",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "reasoning": "They greet.", "content": "Hi!"},
    {"role": "user", "content": [{"type": "text", "text": "Weather here? "}, {"type": "image"}]},
    {"role": "assistant", "reasoning": "I need the tool.", "content": "Let me look.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": '{"sky": "blue"}'},
    {"role": "tool", "tool_call_id": "call_2", "content": "rain"},
]
EXPECTED = """\
<|im_start|>system
Be brief.

You may call these functions:
<tools>
{"name": "weather", "description": "Says the weather, even in Zürich", "parameters": {"type": "object", \
"properties": {"city": {"type": "string"}}}}
</tools>
To call one, write its name and arguments as JSON:
<tool_call>
{"name": "the_name", "arguments": {"the_argument": "its value"}}
</tool_call><|im_end|>
<|im_start|>user
Hello<|im_end|>
<|im_start|>assistant
Hi!<|im_end|>
<|im_start|>user
Weather here? <image><|im_end|>
<|im_start|>assistant
<think>
I need the tool.
</think>

Let me look.
<tool_call>
{"name": "weather", "arguments": {"city": "Zürich"}}
</tool_call>
<tool_call>
{"name": "weather", "arguments": {"city": "Zürich"}}
</tool_call><|im_end|>
<|im_start|>tool
<tool_response>
{"sky": "blue"}
</tool_response><|im_end|>
<|im_start|>tool
<tool_response>
rain
</tool_response><|im_end|>
<|im_start|>assistant
"""


@pytest.fixture(scope="module")
def tokenizer(trained: BuiltTokenizer) -> PreTrainedTokenizerFast:
    return trained.tokenizer()


def render(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], **settings: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **settings)


def test_a_conversation_with_tools(tokenizer: PreTrainedTokenizerFast):
    assert render(tokenizer, CONVERSATION, tools=[TOOL], add_generation_prompt=True) == EXPECTED


def test_arguments_as_text_and_calls_alone(tokenizer: PreTrainedTokenizerFast):
    call = {"function": {"name": "now", "arguments": ""}}
    text = {"function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call, text]}]
    assert render(tokenizer, messages) == (
        "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call><|im_end|>\n'
    )


def test_no_system_turn_unless_there_is_something_to_say(tokenizer: PreTrainedTokenizerFast):
    question = [{"role": "user", "content": "2 < 3 & 'x'"}]
    plain = "<|im_start|>user\n2 < 3 & 'x'<|im_end|>\n"
    assert render(tokenizer, question) == plain
    assert render(tokenizer, question, add_generation_prompt=True) == f"{plain}<|im_start|>assistant\n"
    silent = render(tokenizer, question, add_generation_prompt=True, enable_thinking=False)
    assert silent == f"{plain}<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_developer_is_system(tokenizer: PreTrainedTokenizerFast):
    turns = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "x"}]
    assert render(tokenizer, turns).startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")


def test_media_become_their_tokens(tokenizer: PreTrainedTokenizerFast):
    parts = [{"type": "audio"}, {"type": "video"}, {"type": "image_url", "image_url": {"url": "x"}}]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": parts}], return_dict=False)
    media = tokenizer.convert_tokens_to_ids(["<audio>", "<video>", "<image>"])
    assert [token_id for token_id in ids if token_id in media] == media


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "robot", "content": "x"}, "role robot"),
        ({"role": "user", "content": [{"type": "smell"}]}, "type smell"),
    ],
)
def test_what_is_not_known_is_refused(tokenizer: PreTrainedTokenizerFast, message: dict[str, Any], said: str):
    with pytest.raises(jinja2.TemplateError, match=said):
        render(tokenizer, [message])


def test_training_can_mask_all_but_what_the_assistant_says(tokenizer: PreTrainedTokenizerFast):
    encoded = tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    mask = encoded["assistant_masks"]
    said = [token_id for token_id, wanted in zip(encoded["input_ids"], mask, strict=True) if wanted]
    last = EXPECTED.split("<|im_start|>assistant\n")[2].split("\n<|im_start|>")[0]
    assert tokenizer.decode(said) == f"Hi!<|im_end|>{last}"
