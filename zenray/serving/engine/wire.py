"""vLLM 0.32's OpenAI wire, byte for byte where a gateway reads it: chunks, usage, whole answers, errors.

Key order and the presence of nulls follow `model_dump_json(exclude_unset=True)` of vLLM's own response models; a
contract test compares the two.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import orjson

DONE = b"data: [DONE]\n\n"
FINGERPRINT = "scripted"


def sse(data: Any) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


def error_body(message: str, kind: str, status: int, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


@dataclass(frozen=True)
class Wire:
    """The shapes of one answer: chat completions, or the older text completions."""

    chat: bool
    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _usage(self, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "completion_tokens": completion_tokens,
        }
        return usage | {"completion_tokens_details": None} if self.chat else usage

    def role_chunk(self, index: int, running_prompt_tokens: int | None) -> bytes:
        """Chat's first chunk of each choice: the role and no text."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        chunk = self._head("chat.completion.chunk") | {"choices": [choice]}
        if running_prompt_tokens is not None:
            chunk["usage"] = self._usage(running_prompt_tokens, 0)
        return sse(chunk | {"prompt_token_ids": None, "prompt_text": None})

    def token_chunk(
        self, index: int, text: str, finish: str | None, *, running: tuple[int, int] | None, usage_follows: bool
    ) -> bytes:
        """New text of one choice; `running` is (prompt, completion) tokens of that choice so far."""
        choice: dict[str, Any] = {"index": index}
        if self.chat:
            choice |= {"delta": {"content": text}, "logprobs": None, "finish_reason": finish}
            choice |= {"token_ids": None} if finish is None else {"stop_reason": None, "token_ids": None}
        else:
            choice |= {"text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None}
            choice |= {"prompt_token_ids": None, "token_ids": None}
        chunk = self._head("chat.completion.chunk" if self.chat else "text_completion") | {"choices": [choice]}
        if running is not None:
            chunk["usage"] = self._usage(*running)
        if finish is not None and not usage_follows:
            chunk["system_fingerprint"] = FINGERPRINT
        return sse(chunk)

    def usage_chunk(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> bytes:
        """The last chunk under `include_usage`: no choices, the sums over all of them."""
        usage = self._usage(prompt_tokens, completion_tokens)
        usage.pop("completion_tokens_details", None)
        usage["prompt_tokens_details"] = {"cached_tokens": cached_tokens}
        if self.chat:
            usage["prompt_tokens_details"]["created_cache_tokens"] = 0
        chunk = self._head("chat.completion.chunk" if self.chat else "text_completion")
        return sse(chunk | {"choices": [], "usage": usage, "system_fingerprint": FINGERPRINT})

    def whole(self, texts: list[tuple[str, str]], prompt_tokens: int, completion_tokens: int, cached: int) -> bytes:
        """A whole answer; `texts` is (text, finish reason) of each choice."""
        choices = [self._whole_choice(index, text, finish) for index, (text, finish) in enumerate(texts)]
        usage = {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "completion_tokens": completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": cached,
                "created_cache_tokens": 0 if self.chat else None,
                "multimodal_tokens": None,
            },
            "completion_tokens_details": None,
        }
        body = self._head("chat.completion" if self.chat else "text_completion") | {
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": FINGERPRINT,
            "usage": usage,
        }
        if self.chat:
            body |= {"prompt_logprobs": None, "prompt_token_ids": None, "prompt_text": None}
        return orjson.dumps(body | {"kv_transfer_params": None, "ec_transfer_params": None, "metrics": None})

    def _whole_choice(self, index: int, text: str, finish: str) -> dict[str, Any]:
        if self.chat:
            message = {"role": "assistant", "content": text, "refusal": None, "annotations": None, "audio": None}
            message |= {"function_call": None, "reasoning": None}
            head: dict[str, Any] = {"index": index, "message": message}
            tail: dict[str, Any] = {"token_ids": None}
        else:
            head = {"index": index, "text": text}
            tail = {"token_ids": None, "prompt_logprobs": None, "prompt_token_ids": None}
        ending = {"logprobs": None, "finish_reason": finish, "stop_reason": None}
        return head | ending | tail | {"routed_experts": None}
