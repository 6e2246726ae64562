"""`zenray run` on the platform with a real model: upcycled, distilled for a few steps by two workers, published; then
`zenray deploy`, and a question."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.platform import TestPlatform, wait_until
from tests.e2e.test_make import QUESTION, answer_of
from tests.e2e.test_platform import reference_text

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]  # the platform itself may start within it
JOB = Path(__file__).parents[2] / "jobs" / "mode-smollm2-short.yaml"


def test_a_mixture_is_made_of_a_real_model_while_control_is_killed(platform: TestPlatform) -> None:
    """The job goes on, is followed through control's death, and nothing that it said is lost."""
    platform.zenray("run", str(JOB))

    def events(kind: str) -> list[dict[str, object]]:
        rows = platform.rows("SELECT body FROM job_events WHERE event = ? ORDER BY id", kind)
        return [json.loads(row["body"]) for row in rows]

    wait_until(lambda: events("published"), "the mixture is upcycled", 300)
    platform.kill("control")
    wait_until(lambda: platform.zenray("jobs", "list", check=False).count("mode-smollm2-short"), "control is back", 60)
    shown = platform.zenray("run", str(JOB), "--follow", timeout_s=600)
    assert "published smollm2-mode@short-distilled" in shown and "mode-smollm2-short succeeded." in shown, shown
    steps = events("step")
    assert [step["step"] for step in steps] == list(range(5))
    assert float(str(steps[-1]["loss"])) < float(str(steps[0]["loss"])), "it learns, if little"
    assert all(len(step["loads"]) == 6 for step in steps)  # type: ignore[arg-type]
    (row,) = json.loads(platform.zenray("jobs", "list", "--json"))
    assert (row["state"], row["attempt"]) == ("succeeded", 1)
    assert "short-distilled" in platform.zenray("models", "versions", "smollm2-mode")
    assert "step 5" in platform.zenray("jobs", "logs", "mode-smollm2-short")

    answer = answer_of(platform, "maker-in-short", version="short-distilled")
    assert answer and answer == reference_text(platform, QUESTION, 32, model="smollm2-mode")
