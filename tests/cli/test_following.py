"""The live bar, on a terminal of fixed width that is a string."""

from __future__ import annotations

import io
import subprocess
from types import SimpleNamespace
from typing import cast

import pytest
from rich.console import Console

from zenray.cli import following
from zenray.cli.commands import runs
from zenray.cli.following import LiveView, show_result
from zenray.spec.errors import StorageUnavailable
from zenray.spec.evaluation import ChoiceResult, DomainResult, EvaluationResult, TaskResult
from zenray.spec.job_events import Checkpointed, Ended, Progress, Started, Step
from zenray.storage.fake import FakeStore
from zenray.storage.journal import Journal


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    out = io.StringIO()
    # Without colours and highlights, so that what is shown can be compared.
    console = Console(file=out, force_terminal=True, width=160, no_color=True, highlight=False)
    monkeypatch.setattr(following, "console", console)
    return out


def test_a_bar_counts_steps_and_says_loss_speed_and_evenness(screen: io.StringIO) -> None:
    with LiveView() as view:
        view.show(Started(kind="distill", steps=8))
        view.show(Progress(what="download", done=5, total=10))
        view.show(Step(step=0, loss=3.25, tokens_per_s=1234.0, entropy_ratios=[0.97, 0.93]))
        view.show(Step(step=4, loss=2.5, tokens_per_s=1300.0, entropy_ratios=[0.97, 0.95]))
        view.show(Checkpointed(step=5))
        view.show(Ended(outcome="succeeded"))
        view._bar.refresh()
        shown = screen.getvalue()
    assert "5/8" in shown and "loss 2.5000  entropy 0.950  1,300 tokens/s" in shown
    assert "step 5  checkpoint" in shown and "succeeded" not in shown, "that is said by whoever follows"
    assert [task.description for task in view._bar.tasks] == ["training"], "what is over leaves the screen"


def test_each_phase_has_a_bar_of_its_own(screen: io.StringIO) -> None:
    with LiveView() as view:
        view.show(Started(kind="distill", steps=8, phase="one"))
        view.show(Step(step=7, loss=3.0, phase="one"))
        view.show(Started(kind="distill", steps=4, phase="two"))
        view.show(Step(step=1, loss=2.0, phase="two"))
    (task,) = view._bar.tasks
    assert (task.description, task.completed, task.total) == ("two: training", 2, 4)


def test_a_result_is_shown_as_tables(screen: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zenray.cli.output.console", following.console)
    show_result(
        EvaluationResult(
            version="mode@v1/safetensors",
            domains=(DomainResult(domain="code", loss=2.0, perplexity=7.389, tokens=100),),
            choices=(ChoiceResult(name="quiz", questions=4, accuracy=0.75, standard_error=0.22, by_chance=0.25),),
            tasks=(TaskResult(task="arc_easy", metric="acc,none", value=0.5),),
            attribution="file:///store/jobs/look-1/attribution/report.html",
        )
    )
    for words in ("mode@v1/safetensors", "7.39", "0.750 ± 0.220", "0.250", "arc_easy", "look-1/attribution"):
        assert words in screen.getvalue(), words


def test_a_store_that_is_away_delays_what_is_shown_and_does_not_end_the_run(
    screen: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "POLL_S", 0)
    store = FakeStore()
    journal = Journal(store, "jobs/one/journal/")
    journal.append([{"event": "checkpoint", "step": 4}])
    store.fail("get_bytes", StorageUnavailable("away"), times=2)
    polls = iter([None, None, 0])
    child = cast("subprocess.Popen[bytes]", SimpleNamespace(poll=lambda: next(polls)))
    with LiveView() as view:
        last = runs.show_until_over(child, journal, 0, view)
    assert last == Checkpointed(step=4, at=last.at if last else 0)
    assert "step 4  checkpoint" in screen.getvalue()
