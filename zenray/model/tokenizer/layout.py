"""Which id means what: learned entries, the code range, control tokens, and what is kept free.

    0 … 255                 the bytes themselves (a tokenizer trained here; an extended one keeps its base's ids)
    256 … code_start - 1    learned entries, then reserved ones
    code_start …            the code range: patterns that are one token wherever they are one word; the rest is reserved
    control_start …         control tokens, in the order of CONTROL_TOKENS; the rest is reserved

A control token or a code pattern that the base of an extension already has keeps the base's id, and its own place stays
reserved. A reserved entry has a name that no text reaches, because no merge leads to it; `extend` may claim it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from zenray.spec.errors import InvalidValue

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CONTROL_TOKENS: dict[str, bool] = {
    END_OF_TEXT: True,
    TURN_START: True,
    TURN_END: True,
    "<tools>": False,
    "</tools>": False,
    "<tool_call>": False,
    "</tool_call>": False,
    "<tool_response>": False,
    "</tool_response>": False,
    "<think>": False,
    "</think>": False,
    "<|fim_prefix|>": True,
    "<|fim_middle|>": True,
    "<|fim_suffix|>": True,
    "<|fim_pad|>": True,
    "<|repo_name|>": True,
    "<|file_sep|>": True,
    "<image>": True,
    "<audio>": True,
    "<video>": True,
}
"""Token → whether decoding with `skip_special_tokens` drops it. Parsers look for those of tools
and reasoning.

The order gives the ids: a new token is appended, never put between.
"""

_RESERVED = re.compile(r"<\|(reserved|code|control)_\d+\|>")


@dataclass(frozen=True)
class Layout:
    """How many entries there are in all, and in the ranges at the end. Raises InvalidValue where they do not fit."""

    entries: int = 151_936
    code_entries: int = 512
    control_entries: int = 256

    def __post_init__(self) -> None:
        if self.control_entries < len(CONTROL_TOKENS):
            raise InvalidValue(
                f"A range of {self.control_entries} entries does not hold the {len(CONTROL_TOKENS)} control tokens."
            )
        if self.code_start < 256:
            raise InvalidValue(
                f"{self.entries:,} entries less {self.code_entries} for code and {self.control_entries} for control "
                f"tokens leave {self.code_start:,}: the 256 bytes do not fit.",
                hint=f"Take at least {256 + self.code_entries + self.control_entries:,} entries.",
            )

    @property
    def control_start(self) -> int:
        return self.entries - self.control_entries

    @property
    def code_start(self) -> int:
        return self.control_start - self.code_entries

    def reserved_name(self, token_id: int) -> str:
        """What stands at a free id: its range and the id."""
        kind = "reserved" if token_id < self.code_start else "code" if token_id < self.control_start else "control"
        return f"<|{kind}_{token_id}|>"


def is_reserved(name: str) -> bool:
    return _RESERVED.fullmatch(name) is not None
