"""What a scripted engine answers, and when: from its own settings, or from words in the prompt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zenray.spec.errors import CorruptData, InvalidValue

SCRIPT_FILE = "script.json"
SCRIPT_HEADER = "x-scripted"
_IN_PROMPT = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)


class Script(BaseModel):
    """One answer. A request changes fields with `[[tokens=5 delay_ms=2]]` anywhere in its prompt, or with the
    header `x-scripted: tokens=5 delay_ms=2`; the prompt wins, because a gateway passes it on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(16, ge=0, description="Tokens of each choice, unless `max_tokens` cuts it shorter.")
    delay_ms: float = Field(0, ge=0, description="From one chunk to the next.")
    first_ms: float = Field(0, ge=0, description="From the request to the first token.")
    tokens_per_chunk: int = Field(1, ge=1)
    prompt_tokens: int | None = Field(None, ge=1, description="None: counted, one for each word and 4 a message.")
    cached_tokens: int = Field(0, ge=0, description="Reported as found in the prefix cache, at most the prompt's.")
    fail_after: int | None = Field(None, ge=0, description="Fail once so many chunks of tokens were sent.")
    fail: Literal["cut", "error", "hang", "die"] = Field(
        "cut", description="cut: drop the connection; error: vLLM's error chunk; hang: go silent; die: end the process."
    )
    status: int | None = Field(None, ge=400, le=599, description="Answer with this HTTP status and vLLM's error body.")

    def changed_by(self, words: str) -> Script:
        """This script with `name=value` words applied. Raises InvalidValue naming the bad word."""
        changes: dict[str, str] = {}
        for word in words.replace(",", " ").split():
            name, separator, value = word.partition("=")
            if not separator or name not in Script.model_fields:
                known = ", ".join(Script.model_fields)
                raise InvalidValue(f"{word!r} is not a word of the script.", hint=f"Known: {known}.")
            changes[name] = value
        try:
            return Script.model_validate(self.model_dump() | changes)
        except ValidationError as error:
            raise InvalidValue(f"script {words!r}: {error.errors()[0]['msg']}.") from None

    def for_request(self, header: str | None, prompt: str) -> Script:
        """The script of one request; see the class."""
        script = self.changed_by(header) if header else self
        for words in _IN_PROMPT.findall(prompt):
            script = script.changed_by(words)
        return script


class ScriptFile(Script):
    """`script.json` among the files of a version: the default script, and how the start goes."""

    start_s: float = Field(0, ge=0, description="The engine needs so long to start.")
    start_error: str | None = Field(None, description="The engine fails to start, with this message.")
    max_model_len: int = Field(8192, ge=16)
    kv_cache_use: float = Field(0, ge=0, le=1, description="Share of a KV cache that each request is said to take.")


def read_script(folder: Path) -> ScriptFile:
    """`script.json` of a fetched version, the defaults when it has none. Raises CorruptData when it is malformed."""
    path = folder / SCRIPT_FILE
    if not path.is_file():
        return ScriptFile()
    try:
        return ScriptFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptData(f"{SCRIPT_FILE}: {where}: {first['msg']}.") from None
