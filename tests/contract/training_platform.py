"""Training jobs as `zenray run` starts them, on a real Ray: what tests start, watch, kill and compare."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from tests.cluster.ray_session import RaySession
from tests.training.tiny import job, write_text, write_version
from zenray.model.weights import TensorFolder
from zenray.spec.versions import VersionRef
from zenray.storage.base import ObjectStore
from zenray.storage.cache import fetch
from zenray.storage.local import LocalStore
from zenray.storage.versions import publish

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 240  # for one condition; a machine under load may need most of it
TWO_WORKERS: dict[str, Any] = {"workers": {"count": 2, "expert_parallel": 2, "cpus": 0.5}}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # or 127.0.0.1 is taken for this machine's outer address
Steps = list[dict[str, Any]]


@dataclass
class Run:
    """One job in one store: started as often as a test likes. `environment`: which Ray, and what else differs."""

    folder: Path
    environment: dict[str, str]
    store: ObjectStore = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store = self.open_store()
        self.put_bases()
        self.text = write_text(self.folder / "text")
        self.work_dir = self.folder / "work"

    def open_store(self) -> ObjectStore:
        return LocalStore(self.folder / "store")

    def put_bases(self) -> None:
        for name in ("tiny", "teacher"):
            made = write_version(self.folder / name, seed=len(name))
            publish(self.store, VersionRef(model=name, version="v0"), made)

    def job(self, **changes: Any) -> Any:
        return job(self.text, "distill", **changes)

    def start(self, **changes: Any) -> subprocess.Popen[str]:
        """A driver of the job, in a process of its own."""
        spec = self.folder / "job.yaml"
        spec.write_text(yaml.safe_dump(self.job(**changes).model_dump(mode="json")))
        command = [sys.executable, "-m", "zenray.training", str(spec), *self.store_options()]
        return subprocess.Popen(
            [*command, "--work-dir", str(self.work_dir)],
            cwd=REPOSITORY,
            env={**os.environ, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def store_options(self) -> list[str]:
        return ["--store", self.store.uri]

    def finish(self, **changes: Any) -> str:
        """Start it, wait for its good end; what it said."""
        return finished(self.start(**changes))

    @property
    def events(self) -> list[dict[str, Any]]:
        """What the run has told so far, in all its lives."""
        files = list((self.work_dir / "runs").glob("*/events.jsonl"))
        text = "".join(file.read_text() for file in files)
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def await_event(self, driver: subprocess.Popen[str], kind: str, step: int = 0, times: int = 1) -> None:
        """Until `times` events of this kind, of this step or a later one, were told."""
        await_that(lambda: sum(e["event"] == kind and e["step"] >= step for e in self.events) >= times, driver)

    def await_kept(self, driver: subprocess.Popen[str]) -> None:
        """Until Ray Train has written down a checkpoint, some time after it was made: a run that is killed before that
        begins anew."""
        records = Path(self.store.uri.removeprefix("file:"), "training")
        name = "*/checkpoint_manager_snapshot.json"
        await_that(lambda: any("checkpoint_dir_name" in file.read_text() for file in records.glob(name)), driver)

    def kill_a_worker(self, driver: subprocess.Popen[str], session: RaySession, step: int) -> None:
        """Any of them, after this step and the first checkpoint."""
        self.await_event(driver, "step", step)
        self.await_kept(driver)
        random.choice(train_workers(session.record().processes())).kill()

    def result(self) -> Path:
        return fetch(self.store, VersionRef(model="tiny", version="v1"), self.folder / "cache")

    def weights(self) -> dict[str, torch.Tensor]:
        tensors = TensorFolder(self.result())
        return {name: tensors.read(name) for name in tensors.names}

    def history(self) -> Steps:
        """The published history without times and places, and without what tells of restarts."""
        lines = (self.result() / "history.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in ("tokens_per_s", "files")} for line in lines]


def finished(driver: subprocess.Popen[str], timeout_s: float = 2 * PATIENCE_S) -> str:
    output, _ = driver.communicate(timeout=timeout_s)
    assert driver.returncode == 0, output
    return output


def await_that(condition: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
    """Until `condition`; fails with the driver's words when it ends before, or after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if driver.poll() is not None and not condition():
            raise AssertionError(driver.communicate()[0])
        if time.monotonic() > deadline:
            driver.kill()
            raise AssertionError(driver.communicate()[0])
        time.sleep(0.02)


def in_session(session: RaySession) -> dict[str, str]:
    """The environment of a driver that uses the Ray of all contract tests."""
    return {
        "RAY_ADDRESS": session.addresses.gcs_address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": session.addresses.token(),
        **LOOPBACK,
    }


def train_workers(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that train now, as Ray names them."""
    found = []
    for process in processes:
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def same_result(one: Run, other: Run) -> None:
    """Weights and the loss curve, bit for bit."""
    expected = other.weights()
    for name, weight in one.weights().items():
        assert torch.equal(weight, expected[name]), name
    assert one.history() == other.history()
