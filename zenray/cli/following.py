"""A job as it goes: a live bar on a terminal, a line for each event elsewhere, from the same events either way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from zenray.cli.client import ControlClient
from zenray.cli.output import console, show_table
from zenray.spec.errors import ZenrayError
from zenray.spec.evaluation import EvaluationResult
from zenray.spec.job_events import Ended, JobEvent, Result, Started, StateChanged, Step, in_words, parse_event
from zenray.spec.job_events import Progress as Work
from zenray.spec.job_life import JobState

POLL_S = 0.5


class JobFailed(ZenrayError):
    """The job did not do what it should; the message is the job's own."""

    code = "job_failed"


class LiveView:
    """Shows events. A context; on a terminal its bar is at the bottom, and everything else scrolls above it."""

    def __init__(self) -> None:
        self._is_live = console.is_terminal
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not self._is_live,
        )
        self._tasks: dict[tuple[str | None, str], TaskID] = {}
        self._steps: dict[str | None, int] = {}

    def __enter__(self) -> LiveView:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, event: JobEvent) -> None:
        if isinstance(event, Started):
            self._clear(event.phase)
            if event.steps is not None:
                self._steps[event.phase] = event.steps
        if isinstance(event, Step) and self._is_live:
            self._update(event, "training", event.step + 1, self._steps.get(event.phase), step_in_words(event))
        elif isinstance(event, Work):
            if self._is_live:
                self._update(event, event.what, event.done, event.total, "")
        elif isinstance(event, Result):
            show_result(EvaluationResult.model_validate(event.data))
        elif not isinstance(event, Ended):
            console.print(in_words(event), markup=False)

    def _update(self, event: Step | Work, what: str, done: int, total: int | None, said: str) -> None:
        key = (event.phase, what)
        if key not in self._tasks:
            for other in [other for other in self._tasks if other[1] != what]:
                self._bar.remove_task(self._tasks.pop(other))
            name = f"{event.phase}: {what}" if event.phase else what
            # The bar begins where the job stands, so that a resumed one does not look a thousand times as fast.
            self._tasks[key] = self._bar.add_task(name, total=total, completed=max(0, done - 1), said=said)
        self._bar.update(self._tasks[key], completed=done, total=total, said=said)

    def _clear(self, phase: str | None) -> None:
        for key in [key for key in self._tasks if key[0] != phase]:
            self._bar.remove_task(self._tasks.pop(key))


def step_in_words(step: Step) -> str:
    """What stands beside the bar."""
    parts = [f"loss {step.loss:.4f}"]
    parts += [f"entropy {step.entropy:.3f}"] if step.entropy is not None else []
    parts += [f"{step.tokens_per_s:,.0f} tokens/s"]
    return "  ".join(parts)


def show_result(result: EvaluationResult) -> None:
    """An evaluation as tables."""
    console.print(f"evaluated {result.version}")
    if result.domains:
        rows: list[list[Any]] = [[d.domain, f"{d.perplexity:.2f}", f"{d.loss:.4f}", d.tokens] for d in result.domains]
        show_table(["held-out text", "#perplexity", "#loss", "#tokens"], rows)
    if result.choices:
        rows = [
            [c.name, f"{c.accuracy:.3f} ± {c.standard_error:.3f}", f"{c.by_chance:.3f}", c.questions]
            for c in result.choices
        ]
        show_table(["questions (length-normalised)", "#accuracy", "#by chance", "#asked"], rows)
    if result.tasks:
        show_table(["lm-eval task", "metric", "#value"], [[t.task, t.metric, f"{t.value:.4f}"] for t in result.tasks])
    if result.attribution is not None:
        console.print(f"what each expert works on: {result.attribution}", soft_wrap=True)


def follow(client: ControlClient, job: str, *, after: int = 0) -> None:
    """Show the job's events until it is over. JobFailed with its reason unless it succeeded.

    Control may go away and come back meanwhile; Unavailable when it stays away for two minutes.
    """
    with LiveView() as view:
        for answer in _answers(client, job, after):
            for event in answer["data"]:
                parsed = parse_event(event)
                if not (isinstance(parsed, StateChanged) and JobState(parsed.to_state).is_final):
                    view.show(parsed)
            row = answer["job"]
    raise_unless_succeeded(row)


def raise_unless_succeeded(row: dict[str, Any]) -> None:
    """JobFailed, with what to do, for a job that is over without success."""
    state = JobState(row["state"])
    if state is JobState.SUCCEEDED:
        console.print(f"{row['name']} succeeded.")
        return
    raise JobFailed(
        f"{row['name']} {state.value}: {row['message'] or 'no reason was given'}",
        hint=f"`zenray jobs logs {row['name']}` shows what it printed; `zenray jobs resume {row['name']}` goes on.",
    )


def _answers(client: ControlClient, job: str, after: int) -> Iterator[dict[str, Any]]:
    """Control's answers up to the one with which the job is over and all is said."""
    while True:
        answer: dict[str, Any] = client.get_patiently(f"/admin/jobs/{job}/events", after=after)
        yield answer
        if not answer["data"] and JobState(answer["job"]["state"]).is_final:
            return
        if not answer["data"]:
            time.sleep(POLL_S)
        after = answer["last"]
