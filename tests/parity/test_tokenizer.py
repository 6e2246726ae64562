"""vLLM's renderer and parsers against transformers: the same prompt from our chat template, and our tags understood."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer, MixtralConfig, PreTrainedTokenizerFast
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.reasoning import ReasoningParserManager
from vllm.renderers.hf import resolve_chat_template, resolve_chat_template_content_format, safe_apply_chat_template
from vllm.tokenizers import get_tokenizer
from vllm.tool_parsers import ToolParserManager

from tests.model.tokenizer.conftest import LAYOUT
from tests.model.tokenizer.test_chat_template import CONVERSATION, EXPECTED, TOOL
from zenray.model.tokenizer import corpus
from zenray.model.tokenizer.build import train

pytestmark = pytest.mark.parity

MODEL: Any = SimpleNamespace(
    revision=None,
    tokenizer_revision=None,
    code_revision=None,
    tokenizer="",
    model="",
    trust_remote_code=False,
    hf_config=SimpleNamespace(model_type="mixtral"),
)
ANSWER = (
    "<think>\nI need it.\n</think>\n\nOne moment.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train([Path(corpus.__file__).read_text(encoding="utf-8")], LAYOUT).save(path)
    MixtralConfig().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def vllms(folder: Path) -> Any:
    return get_tokenizer(str(folder))


def request() -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"model": "m", "messages": CONVERSATION[:2], "tools": [TOOL]})


def test_vllm_finds_our_template_and_asks_for_parts(vllms: Any, ours: PreTrainedTokenizerFast):
    assert resolve_chat_template(vllms, None, [TOOL], model_config=MODEL) == ours.chat_template
    assert resolve_chat_template_content_format(None, [TOOL], "auto", vllms, model_config=MODEL) == "openai"


@pytest.mark.parametrize("settings", [{}, {"enable_thinking": False}, {"add_generation_prompt": False}])
def test_prompts_are_equal(vllms: Any, ours: PreTrainedTokenizerFast, settings: dict[str, bool]):
    settings = {"add_generation_prompt": True} | settings
    text = safe_apply_chat_template(MODEL, vllms, CONVERSATION, tools=[TOOL], tokenize=False, **settings)
    ids = safe_apply_chat_template(MODEL, vllms, CONVERSATION, tools=[TOOL], tokenize=True, **settings)
    assert text == ours.apply_chat_template(CONVERSATION, tools=[TOOL], tokenize=False, **settings)
    assert ids == ours.apply_chat_template(CONVERSATION, tools=[TOOL], return_dict=False, **settings)
    assert ours.decode(ids) == text
    if settings == {"add_generation_prompt": True}:
        assert text == EXPECTED


def test_the_hermes_parser_reads_our_tool_calls(vllms: Any):
    parser = ToolParserManager.get_tool_parser("hermes")(vllms)
    rendered = EXPECTED.split("</think>\n\n")[1].split("<|im_end|>")[0]
    read = parser.extract_tool_calls(rendered, request())
    assert read.tools_called
    assert [call.function.name for call in read.tool_calls] == ["weather", "weather"]
    assert json.loads(read.tool_calls[0].function.arguments) == {"city": "Zürich"}
    assert read.content == "Let me look.\n"


def test_the_reasoning_parser_reads_our_thoughts(vllms: Any, ours: PreTrainedTokenizerFast):
    parser = ReasoningParserManager.get_reasoning_parser("qwen3")(vllms)
    generated = ours.decode(ours(ANSWER).input_ids, skip_special_tokens=True)
    assert generated == ANSWER  # the tags of tools and reasoning are not dropped before the parsers see them
    reasoning, content = parser.extract_reasoning(generated, request())
    assert reasoning.strip() == "I need it."
    assert content.strip().startswith("One moment.")
