"""What a run keeps of its events: a line for each, in every checkpoint, so that a resumed run tells the whole story.

Lines are as long for a network of a hundred layers as for one of two: a step's figures of each layer and each expert
are only told, and kept about a hundred times in a run: loads as means, and counts as sums, since the time before.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from zenray.spec.errors import Conflict
from zenray.spec.versions import FileEntry
from zenray.training.reading import StoredCheckpoint

HISTORY_NAME = "history.jsonl"
Event = dict[str, Any]
_TIMES = 100
_COUNTS = ("dropped_choices", "fallback_tokens")
_DECISIVE = ("event", "step", "loss", "was_skipped")
_UNFINISHED = "so_far"


class History:
    """`events` has, on every worker, what decides about faults; `lines` all that is kept, on the first alone."""

    def __init__(self, steps: int, *, is_written: bool = True) -> None:
        self._steps, self._is_written = steps, is_written
        self.events: list[Event] = []
        self._lines: list[str] = []  # made once: a long run has many, and writes all at each checkpoint
        self._sums: dict[str, Any] = {}  # since figures of layers were last kept

    def add(self, event: Event) -> None:
        """`event`: as JSON has it. A step has what `trainer.StepReport` says."""
        self.events.append(_decisive(event))
        if self._is_written:
            self._lines.append(_line(self._shortened(event) if event["event"] == "step" else event))

    def lines(self) -> list[str]:
        """Of a checkpoint that is made now."""
        return [*self._lines, _line({"event": _UNFINISHED, **self._sums})] if self._sums else list(self._lines)

    def restore(self, kept: list[Event]) -> None:
        """As it was when a checkpoint was made that carries these events."""
        self.events, self._lines, self._sums = [], [], {}
        for event in kept:
            if event["event"] == _UNFINISHED:
                self._sums = {name: value for name, value in event.items() if name != "event"}
                continue
            self.events.append(_decisive(event))
            if self._is_written:
                self._lines.append(_line(event))

    def _shortened(self, step: Event) -> Event:
        """With figures of layers now and then only: those of the step, but for counts, which are added up, and loads,
        which are means over the tokens, `loads_tokens`, of the steps that were learnt from."""
        self._add_up(step)
        of_layers = {name: value for name, value in step.items() if isinstance(value, list)}
        short = {name: value for name, value in step.items() if name not in of_layers}
        number = step["step"] + 1
        if number not in (1, self._steps) and number % max(1, self._steps // _TIMES):
            return short
        sums, self._sums = self._sums, {}
        tokens = sums.pop("loads_tokens", 0)
        loads = [[one / tokens for one in layer] for layer in sums.pop("loads", [])]
        return {**short, **of_layers, **sums, "loads": loads, "loads_tokens": tokens}

    def _add_up(self, step: Event) -> None:
        sums = self._sums
        for name in (name for name in _COUNTS if name in step):
            sums[name] = [sum(pair) for pair in zip(sums.get(name) or [0] * len(step[name]), step[name], strict=True)]
        if not step["was_skipped"]:
            tokens, loads = step["tokens"], step["loads"]
            before = sums.get("loads") or [[0.0] * len(load) for load in loads]
            layers = zip(before, loads, strict=True)
            sums["loads"] = [[one + share * tokens for one, share in zip(*layer, strict=True)] for layer in layers]
            sums["loads_tokens"] = sums.get("loads_tokens", 0) + tokens


def read_history(place: StoredCheckpoint | Path) -> list[Event]:
    """The events that a checkpoint carries."""
    return [json.loads(line) for line in StoredCheckpoint.at(place).read_bytes(HISTORY_NAME).splitlines()]


def write_history(lines: list[str], folder: Path) -> None:
    with (folder / HISTORY_NAME).open("w", encoding="utf-8") as file:
        file.writelines(lines)


def require_same_data(history: list[Event], identities: dict[str, str]) -> None:
    """Conflict where a run would go on with other texts than it began with: its order is a function of them."""
    begun = identities_in(history)
    changed = sorted(name for name in begun.keys() | identities.keys() if begun.get(name) != identities.get(name))
    if changed:
        raise Conflict(
            f"The texts of {', '.join(changed)} changed since this run began.",
            hint="Put them back, or give the job another name or version, which begins anew.",
        )


def identities_in(history: list[Event]) -> dict[str, str]:
    """What was read: each domain's identity, as the run noted it at its beginning."""
    found: dict[str, str] = next(event["domains"] for event in history if event["event"] == "data")
    return found


def files_in(history: list[Event]) -> tuple[FileEntry, ...]:
    """What was read, file by file."""
    found = next(event.get("files", ()) for event in history if event["event"] == "data")
    return tuple(FileEntry.model_validate(file) for file in found)


def plain(value: Any) -> Any:
    """As it comes back from JSON; a number that is not finite, which JSON does not have, as text."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return [plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _decisive(event: Event) -> Event:
    return {name: event[name] for name in _DECISIVE} if event["event"] == "step" else event


def _line(event: Event) -> str:
    return json.dumps(event) + "\n"
