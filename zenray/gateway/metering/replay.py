"""What a folder of usage logs says: every closed event, and what was interrupted, with the counts of its slots."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zenray.gateway.metering.records import Damage, read_records
from zenray.gateway.metering.slots import StoredSlots, total
from zenray.gateway.metering.wal import Segment, closed_event, find_segments
from zenray.spec.usage import Outcome, Usage, UsageEvent

log = logging.getLogger(__name__)


def slots_path(folder: Path, boot_id: str) -> Path:
    return folder / f"slots-{boot_id}"


class Scan:
    """One pass over the segments of a folder: `closed()` yields events, then `interrupted()` tells what has no end."""

    def __init__(self, folder: Path) -> None:
        self.segments = find_segments(folder)
        self.damage: list[tuple[Path, Damage]] = []
        self._folder = folder
        self._open: dict[str, tuple[str, dict[str, Any]]] = {}  # billing key → boot, open record

    def closed(self) -> Iterator[tuple[Segment, UsageEvent]]:
        """Closed events in order of their closing. An event may come twice; it is the same both times."""
        for segment in self.segments:
            for record in read_records(segment.path):
                if isinstance(record, Damage):
                    self._note(segment, record)
                elif record["t"] == "open":
                    self._open[record["event"]["billing_key"]] = (segment.boot_id, record)
                elif record["t"] == "close":
                    event = closed_event(record, segment.path)
                    self._open.pop(event.billing_key, None)
                    yield segment, event

    def interrupted(self) -> Iterator[UsageEvent]:
        """Requests that were open when their gateway died, billed by their slots. Call after `closed` is exhausted.

        The cached part of the input comes only with the final usage, so it counts as uncached here.
        """
        stored: dict[str, StoredSlots] = {}
        for boot_id, record in self._open.values():
            if boot_id not in stored:
                stored[boot_id] = StoredSlots(slots_path(self._folder, boot_id))
            counters = [stored[boot_id].counter(slot, record["seq"]) for slot in record["slots"]]
            input_tokens, output_tokens = total(counters, record["prompts"])
            yield UsageEvent(
                **record["event"],
                usage=Usage(input_tokens=input_tokens, output_tokens=output_tokens),
                outcome=Outcome.INTERRUPTED,
            )

    def _note(self, segment: Segment, damage: Damage) -> None:
        self.damage.append((segment.path, damage))
        log.log(
            logging.WARNING if damage.is_tail else logging.ERROR,
            "usage log %s: %d bytes at %d are no record (%s)",
            segment.path,
            damage.length_bytes,
            damage.offset,
            "a torn tail, cut" if damage.is_tail else "damaged, stepped over",
        )


def replay(folder: Path) -> list[UsageEvent]:
    """All events that a folder holds, each once: closed ones in order, then those that were interrupted.

    Reads only; safe while a meter owns the folder, but then what is open now is listed as interrupted.
    """
    scan = Scan(folder)
    events = {event.billing_key: event for _, event in scan.closed()}
    events.update((event.billing_key, event) for event in scan.interrupted())
    return list(events.values())
