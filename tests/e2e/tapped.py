"""What the tap saw: for each request, the running usages in the order in which the gateway read them."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

Totals = tuple[int, int]  # input tokens, output tokens


def read_tap(path: Path) -> dict[str, list[Totals]]:
    """Request id → running usage after each event. Choices are summed; a request's last entry is all that was read."""
    pieces: dict[str, str] = defaultdict(str)
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        pieces[entry["stream"]] += entry["data"]
    seen: dict[str, list[Totals]] = {}
    for text in pieces.values():
        # An object's address is given again, to a later stream: the request id inside tells them apart.
        for event in text.split("\n\n")[:-1]:
            if not event.startswith("data: {"):
                continue
            chunk = json.loads(event[6:])
            usage = chunk.get("usage")
            if usage:
                request_id = chunk["id"].removeprefix("chatcmpl-")
                seen.setdefault(request_id, []).append((usage["prompt_tokens"], usage.get("completion_tokens") or 0))
    return seen
