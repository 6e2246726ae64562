"""From a run's last checkpoint to a version in the store: whole, loadable, and with its story."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.training.tiny import CONFIG, FolderRecorder, job, write_text, write_version
from zenray.model.config import RouterConfig
from zenray.model.hf import register
from zenray.model.weights import TensorFolder
from zenray.spec.errors import Conflict, InvalidValue
from zenray.spec.jobs import job_id
from zenray.spec.platform import StorageSettings
from zenray.spec.versions import TEMPLATE_OVERHEAD, VersionRef
from zenray.storage.cache import fetch
from zenray.storage.job_record import report_key
from zenray.storage.local import LocalStore
from zenray.storage.pinning import pin
from zenray.storage.versions import list_versions, publish
from zenray.training.loop import train
from zenray.training.mesh import Mesh
from zenray.training.networks import Checkpoint
from zenray.training.reading import StoredCheckpoint
from zenray.training.runner import publish_result, run
from zenray.training.worker import assemble

PLAIN = replace(CONFIG, router=RouterConfig(experts_per_token=2))  # which Mixtral can say


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "store")
    folder = write_version(tmp_path / "v0", PLAIN, dtype=torch.bfloat16)
    publish(store, VersionRef(model="tiny", version="v0"), folder, metadata={TEMPLATE_OVERHEAD: "7", "dtype": "F32"})
    return store


def trained(store: LocalStore, folder: Path, **changes):
    """A job run to its end without Ray, and what it takes to publish it."""
    wanted = pin(job(write_text(folder / "text"), **changes), store)
    trainer, data = assemble(wanted, store, folder / "work", Mesh())
    train(trainer, data, FolderRecorder(folder / "checkpoints"))
    checkpoint = StoredCheckpoint.at(folder / "checkpoints" / "step-00000006")
    base = Checkpoint.open(fetch(store, VersionRef(model="tiny", version="v0"), folder / "work" / "versions"))
    return trainer, (wanted, job_id(wanted), store, base, checkpoint, folder / "work", None)


def test_the_version_is_the_trained_network_in_the_bases_layout(store, tmp_path) -> None:
    trainer, about = trained(store, tmp_path, stock_format="replicate")
    manifest = publish_result(*about)
    assert {str(one.ref) for one in list_versions(store, "tiny")} >= {"tiny@v1/safetensors", "tiny@v1/mixtral"}
    assert manifest.metadata["run"] == about[1] and json.loads(manifest.metadata["job"])["base"]["version"] == "v0"
    assert manifest.metadata[TEMPLATE_OVERHEAD] == "7", "the tokenizer is the base's"
    texts = {domain: tmp_path / "text" / f"{domain}.jsonl" for domain in ("count", "spell")}
    digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in texts.values()}
    read = {Path(file.path): (file.sha256, file.size_bytes) for file in manifest.parents.data_files}
    assert read == {path: (digest, path.stat().st_size) for path, digest in digests.items()}
    merged = hashlib.sha256(bytes.fromhex(digests[texts["count"]])).hexdigest()
    assert json.loads(manifest.metadata["data"])["count"] == f"sha256:{merged}"
    assert "report.html" in {file.path for file in manifest.files}
    page = store.get_bytes(report_key(about[1])).decode()
    assert "tiny@v1" in page and "Held-out loss" in page
    validation = json.loads(manifest.metadata["validation"])
    assert validation["count"]["after"]["loss"] < validation["count"]["before"]["loss"]
    assert all(0 < ratio <= 1 for ratio in json.loads(manifest.metadata["entropy_ratios"]))
    tensors = TensorFolder(fetch(store, manifest.ref, tmp_path / "cache"))
    assert tensors.names == TensorFolder(tmp_path / "v0").names
    for one in trainer.trainables:
        assert torch.equal(tensors.read(one.name), one.master.to(torch.bfloat16))
    register()
    ids = torch.arange(20)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(
            fetch(store, VersionRef(model="tiny", version="v1", format=format), tmp_path / "cache"), dtype=torch.float32
        )(ids).logits
        for format in ("safetensors", "mixtral")
    ]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_again_is_a_no_op_and_another_job_a_conflict(store, tmp_path) -> None:
    _, about = trained(store, tmp_path)
    manifest = publish_result(*about)
    settings = StorageSettings(uri=store.uri)
    checkpoints = tmp_path / "store" / "training" / about[1]
    (checkpoints / "step-00000006").mkdir(parents=True)  # as a run leaves it that was killed just after
    assert run(about[0], settings, tmp_path / "work") == manifest
    assert not checkpoints.exists() and checkpoints.parent.exists()
    with pytest.raises(Conflict, match="not made by this job"):
        run(job(write_text(tmp_path / "text"), seed=1), settings, tmp_path / "work")


def test_a_format_that_cannot_be_is_refused_before_the_training(store, tmp_path) -> None:
    wanted = job(write_text(tmp_path / "text"), stock_format="exact")
    with pytest.raises(InvalidValue, match="1 dense layers"):
        run(wanted, StorageSettings(uri=store.uri), tmp_path / "work")


def test_a_group_that_the_network_does_not_have_is_refused_before_ray_is_asked(store, tmp_path) -> None:
    wanted = job(write_text(tmp_path / "text"), train=("experts/coed",))
    with pytest.raises(InvalidValue, match="no expert group 'coed'"):
        run(wanted, StorageSettings(uri=store.uri), tmp_path / "work")
