"""A training job on a real Ray: two workers, one set of experts between them, a version at the end; and its faults."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from tests.cluster.ray_session import RaySession, new_home
from tests.contract.training_platform import (
    LOOPBACK,
    REPOSITORY,
    TWO_WORKERS,
    Run,
    finished,
    in_session,
    same_result,
    train_workers,
)
from tests.training.tiny import FolderRecorder
from zenray.spec.versions import VersionRef
from zenray.storage.versions import find_manifest, read_manifest
from zenray.training.loop import train
from zenray.training.mesh import Mesh
from zenray.training.trainable import named_tensors
from zenray.training.worker import assemble

pytestmark = pytest.mark.contract

STEPS = 36
JOB = {
    **TWO_WORKERS,
    "steps": STEPS,
    "sequences_per_step": 8,
    "sequences_per_pass": 4,
    "checkpoints": {"every_steps": 4},
    "evaluation": {"every_steps": 18, "sequences": 3},
}


@pytest.fixture(scope="module")
def unbroken(ray_session: RaySession, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The job as nobody disturbs it: two workers, to the end."""
    run = Run(tmp_path_factory.mktemp("unbroken"), in_session(ray_session))
    output = run.finish(**JOB)
    assert "published tiny@v1/safetensors" in output
    return run


def test_two_workers_make_what_one_process_makes(unbroken: Run, tmp_path: Path) -> None:
    wanted = unbroken.job(**{**JOB, "workers": {}, "sequences_per_pass": 8})
    torch.set_flush_denormal(True)
    trainer, data = assemble(wanted, unbroken.store, tmp_path, Mesh())
    history = train(trainer, data, FolderRecorder(tmp_path / "checkpoints")).history
    losses = [[e["lm_loss"] for e in events if e["event"] == "step"] for events in (history, unbroken.history())]
    # Sums of float32 in another order: the first steps tell of a fault, later ones of chaos.
    torch.testing.assert_close(torch.tensor(losses[1][:6]), torch.tensor(losses[0][:6]), rtol=0, atol=2e-4)
    assert losses[1][-1] == pytest.approx(losses[0][-1], abs=0.1)
    manifest = read_manifest(unbroken.store, VersionRef(model="tiny", version="v1"))
    assert manifest.parents.base_version == "tiny@v0/safetensors" and manifest.parents.training_job == "tiny"
    assert json.loads(manifest.metadata["validation"])["count"].keys() == {"before", "after", "teacher"}
    assert {entry.path for entry in manifest.files} >= {"config.json", "tokenizer.json", "history.jsonl", "report.html"}
    checkpoints = Path(unbroken.store.uri.removeprefix("file:"), "training")
    assert list(checkpoints.iterdir()) == [], "of no use once the version is there"


def test_a_killed_worker_changes_nothing(ray_session: RaySession, unbroken: Run, tmp_path: Path) -> None:
    """Ray Train starts the group again by itself."""
    run = Run(tmp_path, in_session(ray_session))
    driver = run.start(**JOB)
    run.kill_a_worker(driver, ray_session, random.randint(5, 20))
    finished(driver)
    assert sum(event["event"] == "resumed" for event in run.events) == 1
    same_result(run, unbroken)


@pytest.mark.nightly
def test_a_killed_worker_and_a_killed_driver_change_nothing(
    ray_session: RaySession, unbroken: Run, tmp_path: Path
) -> None:
    """The driver's death: whoever starts the job again goes on where it stood."""
    run = Run(tmp_path, in_session(ray_session))
    first_kill, second_kill = random.randint(5, 12), random.randint(14, 20)
    driver = run.start(**JOB)
    run.kill_a_worker(driver, ray_session, first_kill)
    run.await_event(driver, "resumed")
    run.await_event(driver, "step", second_kill)
    driver.kill()
    driver.wait()
    run.finish(**JOB)
    assert sum(event["event"] == "resumed" for event in run.events) == 2, (first_kill, second_kill)
    same_result(run, unbroken)


@pytest.mark.nightly
def test_what_only_workers_can_find_wrong_ends_the_run_at_once(ray_session: RaySession, tmp_path: Path) -> None:
    """However many failures the job allows: it would come again each time."""
    run = Run(tmp_path, in_session(ray_session))
    run.text["count"].unlink()
    driver = run.start(workers={**TWO_WORKERS["workers"], "max_failures": -1})
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 1, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: ") and "count.jsonl: no such file" in last and "A data source names a file" in last


def test_more_workers_than_the_machine_can_ever_have_are_refused(ray_session: RaySession, tmp_path: Path) -> None:
    run = Run(tmp_path, in_session(ray_session))
    output, _ = run.start(workers={"count": 2, "cpus": 500}).communicate(timeout=120)
    assert "2 workers need 2 × 500 CPU, and this machine has " in output.strip().splitlines()[-1]


@pytest.fixture
def own_ray() -> Iterator[dict[str, str]]:
    home = new_home()
    yield {"RAY_TMPDIR": str(home)}
    shutil.rmtree(home, ignore_errors=True)


@pytest.mark.nightly
@pytest.mark.parametrize("victim", ["worker", "driver"])
@pytest.mark.parametrize("attempt", range(3))
def test_kills_at_any_step_with_a_ray_of_its_own(
    own_ray: dict[str, str], unbroken: Run, tmp_path: Path, victim: str, attempt: int
) -> None:
    """As `zenray run` does it: the driver starts Ray, and Ray dies with it."""
    run = Run(tmp_path, own_ray)
    step = random.randint(1, STEPS - 15)
    driver = run.start(**JOB)
    run.await_event(driver, "step", step)
    descendants = psutil.Process(driver.pid).children(recursive=True)
    if victim == "worker":
        random.choice(train_workers(descendants)).kill()
        finished(driver)
    else:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        run.finish(**JOB)
        _, alive = psutil.wait_procs(descendants, timeout=60)
        assert not alive, f"{alive} outlived their driver, killed at step {step}"
    same_result(run, unbroken)


@pytest.mark.nightly
def test_a_worker_that_is_told_to_go_keeps_its_work_and_the_run_comes_back(
    ray_session: RaySession, unbroken: Run, tmp_path: Path
) -> None:
    """SIGTERM, as a machine that is taken away sends it: between checkpoints, and no failure is counted."""
    run = Run(tmp_path, in_session(ray_session))
    job = {**JOB, "workers": {**TWO_WORKERS["workers"], "max_failures": 0}, "checkpoints": {"every_steps": 30}}
    driver = run.start(**job)
    run.await_event(driver, "step", random.randint(3, 15))
    random.choice(train_workers(ray_session.record().processes())).terminate()
    finished(driver)
    told = {event["event"]: event["step"] for event in run.events if event["event"] in ("preempted", "resumed")}
    assert told["preempted"] == told["resumed"]
    same_result(run, unbroken)


@pytest.mark.nightly
def test_a_run_that_its_faults_stop_is_not_published(ray_session: RaySession, tmp_path: Path) -> None:
    """The least rise of the loss above that of the steps before is taken for divergence."""
    run = Run(tmp_path, in_session(ray_session))
    faults = {"diverging": "stop", "window_steps": 4, "deviations": 1e-6, "least_rise": 1e-6}
    driver = run.start(**JOB, faults=faults)
    output, _ = driver.communicate(timeout=300)
    assert driver.returncode != 0 and "stopped: at step" in output and "Run the job again" in output, output
    assert find_manifest(run.store, VersionRef(model="tiny", version="v1")) is None


@pytest.mark.nightly
def test_two_stages_make_what_one_process_makes_and_survive_a_kill(ray_session: RaySession, tmp_path: Path) -> None:
    """A pipeline of two workers, the teacher beside the second; then the same, with one of them killed."""
    job = {**JOB, "workers": {"count": 2, "pipeline_parallel": 2, "cpus": 0.5}}
    run, killed = (Run(tmp_path / name, in_session(ray_session)) for name in ("run", "killed"))
    assert "published tiny@v1/safetensors" in run.finish(**job)
    torch.set_flush_denormal(True)
    trainer, data = assemble(run.job(**{**JOB, "workers": {}}), run.store, tmp_path, Mesh())
    histories = (run.history(), train(trainer, data, FolderRecorder(tmp_path / "checkpoints")).history)
    for name in ("lm_loss", "kl", "balance"):  # sums in another order: the first steps tell of a fault
        ours, theirs = (torch.tensor([e[name] for e in steps if e["event"] == "step"]) for steps in histories)
        torch.testing.assert_close(ours[:6], theirs[:6], rtol=0, atol=2e-4)
    assert run.weights().keys() == named_tensors(trainer.model).keys()
    first = [{e["domain"]: (e["loss"], e["teacher_0"]) for e in steps if "teacher_0" in e} for steps in histories]
    assert first[0].keys() == first[1].keys() == {"count", "spell"}
    for domain, losses in first[0].items():
        assert losses == pytest.approx(first[1][domain], rel=1e-5)
    driver = killed.start(**job)
    killed.kill_a_worker(driver, ray_session, random.randint(5, 20))
    finished(driver)
    assert "resumed" in {event["event"] for event in killed.events}
    same_result(killed, run)


@contextmanager
def simulated_nodes(home: Path) -> Iterator[tuple[str, Callable[[str], str]]]:
    """(address of a cluster of two nodes, what carries out `add` and `remove`)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.contract.simulated_nodes"],
        cwd=REPOSITORY,
        env={**os.environ, "RAY_TMPDIR": str(home), **LOOPBACK},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    to, answers = process.stdin, process.stdout

    def obey(command: str) -> str:
        to.write(command + "\n")
        to.flush()
        return answers.readline().strip()

    try:
        yield answers.readline().strip(), obey
    finally:
        to.close()
        process.wait(timeout=60)


@pytest.mark.nightly
def test_a_node_that_is_lost_and_one_that_comes_change_nothing(own_ray: dict[str, str], tmp_path: Path) -> None:
    """Two nodes, a worker on each. One dies: the run waits until there is room for two again, and goes on."""
    job = {**JOB, "workers": {**TWO_WORKERS["workers"], "cpus": 1}}
    with simulated_nodes(Path(own_ray["RAY_TMPDIR"])) as (address, obey):
        environment = {"RAY_ADDRESS": address, **LOOPBACK}
        unbroken, run = Run(tmp_path / "unbroken", environment), Run(tmp_path / "run", environment)
        unbroken.finish(**job)
        driver = run.start(**job)
        run.await_event(driver, "step", random.randint(6, 20))
        run.await_kept(driver)
        assert obey("remove") == "1 nodes"
        assert obey("add") == "2 nodes"
        finished(driver)
        assert [event["event"] for event in run.events].count("resumed") >= 1
        same_result(run, unbroken)


@pytest.mark.nightly
def test_a_run_that_lost_a_node_goes_on_with_the_workers_that_are_left(own_ray: dict[str, str], tmp_path: Path) -> None:
    """Both workers hold all experts; one of them has no place any more, and nobody brings it back."""
    job = {**JOB, "workers": {"count": 2, "cpus": 1, "replacement_patience_s": 5}}
    with simulated_nodes(Path(own_ray["RAY_TMPDIR"])) as (address, obey):
        waits = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"}
        run = Run(tmp_path / "run", {"RAY_ADDRESS": address, **LOOPBACK, **waits})
        driver = run.start(**job)
        run.await_event(driver, "step", random.randint(6, 20))
        run.await_kept(driver)
        assert obey("remove") == "1 nodes"
        output = finished(driver)
        assert "waiting for workers: they need 2 × 1 CPU, and " in output
        assert "goes on with 1 of 2 workers" in output
        assert [event["event"] for event in run.events].count("resumed") >= 1
        steps = [event["step"] for event in run.history() if event["event"] == "step"]
        assert steps == list(range(STEPS))
