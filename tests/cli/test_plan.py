"""`zenray plan`: a table for people, JSON for programs, and a refusal that says the sum."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from zenray.cli import main as command_line

ROOT = Path(__file__).resolve().parents[2]


def zenray(*words: str) -> int:
    """Run a command as a user does; its exit code."""
    sys.argv = ["zenray", *words]
    try:
        command_line.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZENRAY_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["zenray"])


def test_a_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    job, cluster = ROOT / "jobs" / "zen-480b.yaml", ROOT / "clusters" / "h100-512.yaml"
    assert zenray("plan", str(job), "-f", str(cluster), "--json") == 0
    [plan] = json.loads(capsys.readouterr().out)
    assert plan["layout"]["axes"] == {"pipeline": 8, "context": 1, "expert": 32}
    assert len(plan["stages"]) == 8
    assert max(stage["fullest_bytes"] for stage in plan["stages"]) < plan["gpu"]["memory_bytes"]
    assert plan["speed"]["days"] * plan["layout"]["workers"] * 24 == pytest.approx(plan["speed"]["gpu_hours"])


def test_a_plan_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert zenray("plan", str(ROOT / "jobs" / "zen-14b.yaml"), "-f", str(ROOT / "clusters" / "a100-8.yaml")) == 0
    said = capsys.readouterr().out
    for word in ("tokens a day", "GPU-hours", "backward ends", "It fits"):
        assert word in said


def test_the_phases_that_train_are_planned_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert zenray("plan", str(ROOT / "jobs" / "mode-smollm2.yaml"), "--json") == 0
    assert {plan["model"] for plan in json.loads(capsys.readouterr().out)} == {"smollm2-mode"}


@pytest.mark.parametrize(
    ("job", "cluster", "says"),
    [
        ("zen-72b", "a100-8", "64 workers need as many GPUs"),
        ("zen-14b", "local", "does not say which machines"),
        ("upcycle-smollm2", "a100-8", "trains nothing"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    capsys: pytest.CaptureFixture[str], job: str, cluster: str, says: str
) -> None:
    code = zenray("plan", str(ROOT / "jobs" / f"{job}.yaml"), "-f", str(ROOT / "clusters" / f"{cluster}.yaml"))
    assert code == 1
    assert says in capsys.readouterr().err
