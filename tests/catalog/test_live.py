"""A user's models come, change and go while control runs, and a broken file takes nothing away."""

from __future__ import annotations

from pathlib import Path

import pytest

from zenray.catalog.live import GONE_FOR_S, LiveCatalog
from zenray.spec.clock import FakeClock
from zenray.spec.errors import InvalidDocument

MODEL = """
name: mine
family: mine
summary: {summary}
parameters: {{total: 1000000, active: 1000000}}
context_tokens: 8192
price: {{input_usd_per_1k: "0.0007", output_usd_per_1k: "0.0013"}}
"""


def test_models_come_change_and_go(tmp_path: Path) -> None:
    clock = FakeClock()
    live = LiveCatalog([tmp_path], clock)
    before = live.now()
    assert "mine" not in before and live.now() is before, "files are read only when they are others"
    file = tmp_path / "mine.yaml"
    file.write_text(MODEL.format(summary="First."))
    assert live.now().get("mine").summary == "First."
    file.write_text(MODEL.format(summary="Second, and longer."))
    assert live.now().get("mine").summary == "Second, and longer."
    file.unlink()
    live.now()
    clock.advance(GONE_FOR_S)
    assert "mine" not in live.now() and "smollm2-135m" in live.now()


def test_a_file_that_is_gone_for_a_moment_takes_nothing_away(tmp_path: Path) -> None:
    file, clock = tmp_path / "mine.yaml", FakeClock()
    file.write_text(MODEL.format(summary="First."))
    live = LiveCatalog([tmp_path], clock)
    for summary in ("Second, and longer.", "Third, and longer than that."):
        file.unlink()
        assert "mine" in live.now()
        clock.advance(GONE_FOR_S - 0.1)
        assert "mine" in live.now()
        file.write_text(MODEL.format(summary=summary))
        assert live.now().get("mine").summary == summary
    file.rename(tmp_path / "renamed.yaml")
    live.now()
    clock.advance(GONE_FOR_S)
    assert live.now().get("mine").summary == summary


def test_while_a_file_is_broken_the_last_sound_catalog_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(MODEL.format(summary="First."))
    live = LiveCatalog([tmp_path])
    file.write_text("name: mine\nprize: 1\n")
    assert live.now().get("mine").summary == live.now().get("mine").summary == "First."
    (said,) = [record.getMessage() for record in caplog.records]
    assert "mine.yaml" in said and "prize" in said, "once, with the file"
    file.write_text(MODEL.format(summary="Mended."))
    assert live.now().get("mine").summary == "Mended."


def test_a_catalog_that_is_broken_from_the_start_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\nprize: 1\n")
    with pytest.raises(InvalidDocument, match=r"mine\.yaml"):
        LiveCatalog([tmp_path])
