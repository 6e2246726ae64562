"""What a scripted engine really emitted: the truth that ledgers are compared with in tests."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import orjson


@dataclass
class Emitted:
    """One request. Tokens count as their chunk goes to the socket, so never later than a client reads them."""

    id: str
    prompt_tokens: int
    cached_tokens: int
    stream: bool
    state: Literal["running", "finished", "cut", "failed"] = "running"
    chunks: int = 0
    completion_tokens: int = 0
    by_choice: list[int] = field(default_factory=list)

    def add(self, index: int, tokens: int) -> None:
        self.by_choice[index] += tokens
        self.completion_tokens += tokens
        self.chunks += 1


class Truth:
    """All requests of one engine process: the last `keep` of them by id, and totals over all.

    With `path`, every closed request is also appended there as one JSON line (one `write(2)` each, so that several
    processes may share the file).
    """

    def __init__(self, path: Path | None = None, keep: int = 100_000) -> None:
        self._keep = keep
        self._requests: OrderedDict[str, Emitted] = OrderedDict()
        self._totals = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if path else None

    @property
    def running(self) -> int:
        return sum(1 for entry in self._requests.values() if entry.state == "running")

    @property
    def totals(self) -> dict[str, int]:
        """Closed requests only."""
        return dict(self._totals)

    def open(self, entry: Emitted) -> None:
        self._requests[entry.id] = entry
        while len(self._requests) > self._keep:
            self._requests.popitem(last=False)

    def close(self, entry: Emitted, state: Literal["finished", "cut", "failed"]) -> None:
        entry.state = state
        self._totals["requests"] += 1
        self._totals["prompt_tokens"] += entry.prompt_tokens
        self._totals["completion_tokens"] += entry.completion_tokens
        if self._file is not None:
            os.write(self._file, orjson.dumps(asdict(entry)) + b"\n")

    def report(self, id: str | None = None) -> dict[str, object]:
        chosen = [entry for entry in self._requests.values() if id is None or entry.id == id]
        return {"totals": self.totals, "requests": [asdict(entry) for entry in chosen]}
