"""Job files: their kinds, their identities, and errors that name the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from zenray.spec.errors import InvalidDocument
from zenray.spec.evaluation import EvaluateJob
from zenray.spec.job_events import Note, Step, in_words, parse_event
from zenray.spec.job_life import JobState
from zenray.spec.jobs import PipelineJob, job_id, load_job, read_job, with_absolute_paths

PIPELINE = """\
kind: pipeline
name: all
phases:
  - kind: upcycle
    name: grow
    base: {model: dense, version: v1}
    into: {model: mode, version: v1}
    groups: [{name: general, experts: 4}]
  - kind: evaluate
    name: measure
    version: {model: mode, version: v1}
    choices: [{name: quiz, path: quiz.jsonl}]
  - kind: publish
    name: release
    version: {model: mode, version: v1}
    into: {model: served, version: v1}
    least_accuracy: {quiz: 0.3}
"""
TEXT = {"sources": [{"domain": "all", "path": "all.jsonl"}], "sequence_tokens": 8, "validation_share": 0.1}


def write(folder: Path, text: str = PIPELINE) -> Path:
    path = folder / "all.yaml"
    path.write_text(text)
    return path


def test_a_pipeline_is_whole_jobs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = load_job(write(tmp_path))
    assert isinstance(job, PipelineJob)
    assert [phase.kind for phase in job.phases] == ["upcycle", "evaluate", "publish"]
    monkeypatch.chdir(tmp_path)
    elsewhere = with_absolute_paths(job)
    assert elsewhere.phases[1].choices[0].path == str(tmp_path / "quiz.jsonl")  # type: ignore[union-attr]
    assert read_job(elsewhere.model_dump(mode="json"), where="the body") == elsewhere


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("groups:", "grups:", r"all.yaml:8: unknown key 'phases.0.upcycle.grups'. Did you mean 'groups'?"),
        ("quiz: 0.3", "quiz: high", "all.yaml:17: phases.2.publish.least_accuracy.quiz"),
        ("kind: upcycle", "kind: upcicle", "upcicle"),
        ("name: measure", "name: grow", "repeat: grow, grow, release"),
        (
            "model: mode, version: v1}\n    choices",
            "model: mode, version: v2}\n    choices",
            "no phase evaluates mode@v1",
        ),
        ("into: {model: served, version: v1}", "into: {model: mode, version: v1}", "publish the same version"),
    ],
)
def test_a_mistake_in_a_phase_is_named_with_its_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in PIPELINE
    with pytest.raises(InvalidDocument) as refused:
        load_job(write(tmp_path, PIPELINE.replace(old, new)))
    assert said in str(refused.value)


def test_a_body_without_a_known_kind_is_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidDocument, match="distill"):
        read_job({"kind": "distil"}, where="the body")
    with pytest.raises(InvalidDocument, match="kind"):
        read_job([], where="the body")


def test_a_job_is_the_same_with_other_workers_and_another_with_another_seed(tmp_path: Path) -> None:
    job = load_job(write(tmp_path))
    assert isinstance(job, PipelineJob)
    upcycle = job.phases[0]
    other = job.model_copy(update={"phases": (upcycle.model_copy(update={"seed": 1}), *job.phases[1:])})
    assert job_id(job) == job_id(load_job(write(tmp_path))) != job_id(other)
    assert job_id(job).startswith("all-")
    evaluation = job.phases[1]
    elsewhere = job.model_copy(update={"phases": (upcycle, evaluation.model_copy(update={"gpu": True}), job.phases[2])})
    assert job_id(elsewhere) == job_id(job)


def test_a_default_that_is_written_and_a_field_that_is_new_leave_the_id_alone(tmp_path: Path) -> None:
    job = load_job(write(tmp_path))
    written = load_job(write(tmp_path, PIPELINE.replace("name: grow\n", "name: grow\n    seed: 0\n")))
    assert "seed" in written.phases[0].model_fields_set  # type: ignore[union-attr]
    assert job_id(written) == job_id(job)

    class Later(EvaluateJob):
        with_a_new_measure: bool = False

    about = {"kind": "evaluate", "name": "look", "version": {"model": "mode"}, "text": TEXT}
    before = job_id(EvaluateJob(**about))
    assert job_id(Later(**about)) == before != job_id(Later(**about, with_a_new_measure=True))


def test_states_that_are_over_are_the_ones_that_can_be_resumed_or_left() -> None:
    for state in JobState:
        assert not (state.is_final and state.can_be_cancelled)
        assert not (state.is_final and state.at_cluster)
        if state.can_be_resumed:
            assert state.is_final and state.may_become(JobState.QUEUED)
        if state.can_be_cancelled:
            assert state.may_become(JobState.CANCELLING) or state.may_become(JobState.CANCELLED)


def test_events_are_read_as_what_they_are_and_unknown_ones_are_kept() -> None:
    step = parse_event(
        {"event": "step", "step": 4, "loss": "inf", "lm_loss": 2.0, "entropy_ratios": [0.9, 0.7], "new": 1}
    )
    assert isinstance(step, Step) and step.loss == float("inf") and step.entropy == 0.7
    assert in_words(step).startswith("step 5  loss inf")
    assert parse_event(step.model_dump(mode="json")) == step, "what is not finite survives JSON"
    note = parse_event({"event": "rollback", "step": 3})
    assert isinstance(note, Note) and note.model_dump()["step"] == 3 and in_words(note) == "step 3  rollback"
