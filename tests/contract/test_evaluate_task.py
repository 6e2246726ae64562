"""An evaluation as a task on a real Ray: found, told and refused as in the process that asks for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.ray_session import RaySession
from tests.contract.training_platform import REPOSITORY, Run, in_session
from zenray.spec.evaluation import EvaluateJob
from zenray.spec.platform import StorageSettings
from zenray.storage.job_record import job_journal
from zenray.training.evaluate import evaluate
from zenray.training.events import EventPlace, EventStream

pytestmark = [pytest.mark.contract, pytest.mark.nightly]

# In a process of its own, as jobs are: Ray reads its environment when it is imported.
EVALUATE = """
import sys
from pathlib import Path
from zenray.spec.evaluation import EvaluateJob
from zenray.spec.platform import StorageSettings
from zenray.storage.opening import open_store
from zenray.training.evaluate_task import evaluate_in_task
from zenray.training.events import EventPlace, EventStream
job, storage, work_dir = sys.argv[1:]
storage = StorageSettings.model_validate_json(storage)
with EventStream(open_store(storage), EventPlace("there")) as tell:
    job = EvaluateJob.model_validate_json(job)
    print(evaluate_in_task(job, storage, Path(work_dir), tell, gpus=0).model_dump_json())
"""


def test_a_task_finds_and_refuses_what_the_process_itself_would(ray_session: RaySession, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", {})
    sources = [{"domain": domain, "path": str(path)} for domain, path in run.text.items()]
    about = {"kind": "evaluate", "name": "look", "version": {"model": "tiny", "version": "v0"}, "sequences": 4}
    job = EvaluateJob(**about, text={"sources": sources, "sequence_tokens": 32, "validation_share": 0.2})

    def in_a_task(job: EvaluateJob) -> subprocess.CompletedProcess[str]:
        arguments = [job.model_dump_json(), StorageSettings(uri=run.store.uri).model_dump_json(), str(run.work_dir)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **in_session(ray_session)}
        command = [sys.executable, "-c", EVALUATE, *arguments]
        return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200)

    with EventStream(run.store, EventPlace("here")) as tell:
        expected = evaluate(job, run.store, run.work_dir, tell)
    done = in_a_task(job)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected.model_dump(mode="json")
    told = [{event["event"] for event in job_journal(run.store, place).read(0)[0]} for place in ("here", "there")]
    assert told[1] - {"workers"} == told[0] and "result" in told[0]

    missing = job.model_copy(update={"version": job.version.model_copy(update={"version": "v7"})})
    done = in_a_task(missing)
    assert done.returncode and "zenray.spec.errors.NotFound" in done.stderr
