"""A training job on a real Ray: two workers, one set of experts between them, a version at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from tests.cluster.ray_session import new_home
from tests.training.tiny import FolderRecorder, job, write_text, write_version
from zenray.model.weights import TensorFolder
from zenray.spec.versions import VersionRef
from zenray.storage.cache import fetch
from zenray.storage.local import LocalStore
from zenray.storage.versions import publish, read_manifest
from zenray.training.loop import train
from zenray.training.mesh import Mesh
from zenray.training.worker import assemble

pytestmark = pytest.mark.contract

REPOSITORY = Path(__file__).parents[2]


class Platform:
    """A store with a base version and its teacher, some text, and a folder for Ray with a short name."""

    def __init__(self, folder: Path, ray_home: Path) -> None:
        self.store = LocalStore(folder / "store")
        for name in ("tiny", "teacher"):
            publish(self.store, VersionRef(model=name, version="v0"), write_version(folder / name, seed=len(name)))
        self.text = write_text(folder / "text")
        self.folder, self.ray_home = folder, ray_home
        self.work_dir = folder / "work"

    def start(self, **changes) -> subprocess.Popen[str]:
        spec = self.folder / "job.yaml"
        spec.write_text(yaml.safe_dump(job(self.text, "distill", **changes).model_dump(mode="json")))
        command = [sys.executable, "-m", "zenray.training", str(spec), "--store", self.store.uri]
        environment = {**os.environ, "RAY_TMPDIR": str(self.ray_home), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
        return subprocess.Popen(
            [*command, "--work-dir", str(self.work_dir)],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def alone(self, folder: Path, **changes) -> dict[str, torch.Tensor]:
        """The same job in this process, without Ray: the weights at its end."""
        wanted = job(self.text, "distill", **{**changes, "workers": {}, "sequences_per_pass": 4})
        torch.set_flush_denormal(True)
        trainer, data = assemble(wanted, self.store, folder, Mesh())
        train(trainer, data, FolderRecorder(folder / "checkpoints"))
        return {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}

    def weights(self) -> dict[str, torch.Tensor]:
        folder = fetch(self.store, VersionRef(model="tiny", version="v1"), self.folder / "cache")
        tensors = TensorFolder(folder)
        return {name: tensors.read(name) for name in tensors.names if not name.endswith("bias_E")}


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    ray_home = new_home()
    yield Platform(tmp_path, ray_home)
    subprocess.run(["rm", "-rf", str(ray_home)], check=True)


TWO_WORKERS = {"workers": {"count": 2, "expert_parallel": 2, "cpus": 0.5}, "steps": 6}


def test_two_workers_make_what_one_process_makes(platform: Platform, tmp_path: Path) -> None:
    running = platform.start(**TWO_WORKERS)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 0, output
    assert "published tiny@v1/safetensors" in output and "entropy" in output
    for name, weight in platform.alone(tmp_path / "alone", steps=6).items():
        torch.testing.assert_close(platform.weights()[name], weight, rtol=0, atol=2e-4)
    manifest = read_manifest(platform.store, VersionRef(model="tiny", version="v1"))
    assert manifest.parents.base_version == "tiny@v0/safetensors" and manifest.parents.training_job == "tiny"
    assert json.loads(manifest.metadata["validation"])["count"].keys() == {"before", "after", "teacher"}
    assert {entry.path for entry in manifest.files} >= {"config.json", "tokenizer.json", "history.jsonl"}
