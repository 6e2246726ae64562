"""The progress bar keeps quiet where it should."""

from __future__ import annotations

import io

from rich.console import Console

from zenray.storage.progress import Counter, transfer_bar


def test_no_bar_outside_a_terminal() -> None:
    output = io.StringIO()
    with transfer_bar(Console(file=output), quiet_s=0) as progress:
        progress("upload", 1, 2)
    assert output.getvalue() == ""


def test_no_bar_within_the_first_second() -> None:
    output = io.StringIO()
    with transfer_bar(Console(file=output, force_terminal=True), quiet_s=60) as progress:
        progress("upload", 1, 2)
        progress("upload", 2, 2)
    assert output.getvalue() == ""


def test_a_bar_for_each_phase_of_a_long_transfer() -> None:
    output = io.StringIO()
    with transfer_bar(Console(file=output, force_terminal=True, width=100), quiet_s=0) as progress:
        progress("get", 0, 0)
        progress("upload", 1_000_000, 2_000_000)
    assert "get" in output.getvalue()
    assert "1.0/2.0 MB" in output.getvalue()


def test_counting_is_throttled_and_ends_at_the_total() -> None:
    told: list[tuple[str, int, int]] = []
    counter = Counter(lambda *step: told.append(step), "hash", 1000)
    for _ in range(1000):
        counter.add(1)
    assert told[-1] == ("hash", 1000, 1000)
    assert len(told) < 100
    Counter(None, "hash", 10).add(10)
