"""What others wrote is shown as it is: an engine's message may have brackets that rich would take for its own."""

from __future__ import annotations

import pytest

from zenray.cli.output import show_error, show_facts, show_table
from zenray.spec.errors import Unavailable

MESSAGE = "ValueError: [kv] needs [/dev/shm]"


def test_brackets_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(["message"], [[MESSAGE]])
    show_facts({"message": MESSAGE})
    show_error(Unavailable(MESSAGE, hint=MESSAGE))
    shown = capsys.readouterr()
    assert (shown.out.count(MESSAGE), shown.err.count(MESSAGE)) == (2, 2)


def test_what_the_system_refuses_is_told_in_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(OSError(28, "No space left on device", "/srv/zenray/run/platform.json"))
    assert capsys.readouterr().err == "error: No space left on device: /srv/zenray/run/platform.json\n"
