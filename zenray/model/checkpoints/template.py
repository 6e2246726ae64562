"""How many tokens a chat template adds to a request: what a bound on its input must have beyond its bytes."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}},
}
_EMPTY = {"role": "user", "content": ""}
_TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


def overhead_tokens(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The most that was added to a small conversation; None without a template that renders one.

    Of one empty message all tokens count: the default system prompt, and the opening of the answer. Of several, and of
    one with a tool, only those beyond the bytes of their JSON, which every request has anyway.
    """
    found = [_added(tokenizer, [_EMPTY], free_bytes=0)]
    found.append(_added(tokenizer, [*_TURNS, _EMPTY], free_bytes=_size([*_TURNS, _EMPTY])))
    found.append(_added(tokenizer, [_EMPTY], free_bytes=_size([_TOOL]), tools=[_TOOL]))
    return max((added for added in found if added is not None), default=None)


def _added(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, free_bytes: int, **more: Any
) -> int | None:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **more)
    except Exception:  # a template refuses what it does not know with whatever its language raises
        return None
    return len(tokenizer(text, add_special_tokens=False).input_ids) - free_bytes


def _size(value: object) -> int:
    return len(json.dumps(value, separators=(",", ":")).encode())
