"""An evaluation as a task on a real Ray: found, told and refused as in the process that asks for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray

from tests.cluster.ray_session import RaySession
from tests.contract.training_platform import Run, in_session
from zenray.spec.errors import InvalidValue
from zenray.spec.evaluation import EvaluateJob
from zenray.spec.platform import StorageSettings
from zenray.storage.job_record import job_journal
from zenray.training.evaluate import evaluate
from zenray.training.evaluate_task import evaluate_in_task
from zenray.training.events import EventPlace, EventStream

pytestmark = pytest.mark.contract


def test_a_task_finds_and_refuses_what_the_process_itself_would(
    ray_session: RaySession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run", {})
    sources = [{"domain": domain, "path": str(path)} for domain, path in run.text.items()]
    about = {"kind": "evaluate", "name": "look", "version": {"model": "tiny", "version": "v0"}, "sequences": 4}
    job = EvaluateJob(**about, text={"sources": sources, "sequence_tokens": 32, "validation_share": 0.2})
    with EventStream(run.store, EventPlace("here")) as tell:
        expected = evaluate(job, run.store, run.work_dir, tell)
    for name, value in in_session(ray_session).items():
        monkeypatch.setenv(name, value)
    storage = StorageSettings(uri=run.store.uri)
    try:
        with EventStream(run.store, EventPlace("there")) as tell:
            assert evaluate_in_task(job, storage, run.work_dir, tell, gpus=0) == expected
        told = [[event["event"] for event in job_journal(run.store, place).read(0)[0]] for place in ("here", "there")]
        assert told[0] == told[1] and "result" in told[1]
        long = tmp_path / "long.jsonl"
        long.write_text(json.dumps({"question": "Why? " * 2000, "choices": ["So.", "Yes."], "answer": 1}))
        quiz = EvaluateJob(**about, choices=[{"name": "quiz", "path": str(long)}])
        with (
            EventStream(run.store, EventPlace("there")) as tell,
            pytest.raises(InvalidValue, match=r"^'Why\?.* tokens; the network's context is"),
        ):
            evaluate_in_task(quiz, storage, run.work_dir, tell, gpus=0)
    finally:
        ray.shutdown()
