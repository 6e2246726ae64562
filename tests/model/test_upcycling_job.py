"""An upcycling job from a published version to published versions, through a store in memory."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from zenray.model.hf import register
from zenray.model.upcycling.runner import run
from zenray.spec.documents import parse_document
from zenray.spec.errors import Conflict, InvalidDocument, InvalidValue, NotFound
from zenray.spec.jobs import UpcycleJob, load_job
from zenray.spec.versions import VersionRef
from zenray.storage.cache import fetch
from zenray.storage.local import LocalStore
from zenray.storage.versions import list_versions, publish

register()

JOB = """
kind: upcycle
name: tiny
base: {model: dense, version: v0}
into: {model: mode, version: v1}
groups:
  - {name: general, experts: 2, drop_rate: [0.0, 0.5]}
  - {name: code, experts: 1}
layers: last 1
seed: 3
"""


def job(text: str = JOB) -> UpcycleJob:
    return parse_document(text, UpcycleJob, where="job.yaml")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    store = LocalStore(tmp_path / "store")
    publish(store, VersionRef(model="dense", version="v0"), tmp_path / "dense")
    return store


def test_publishes_the_model_with_its_parents_and_recipe(store, tmp_path):
    seen = []
    published = run(job(), store, tmp_path / "work", progress=lambda *told: seen.append(told))
    assert [str(manifest.ref) for manifest in published] == ["mode@v1/safetensors"]
    assert published[0].parents.base_version == "dense@v0/safetensors"
    assert '"drop_rates": [0.0, 0.5]' in published[0].metadata["recipe"]
    assert {phase for phase, _, _ in seen} >= {"upcycle", "upload"}
    made = [(done, total) for phase, done, total in seen if phase == "upcycle"]
    assert made[-1][0] == made[-1][1] and sorted(made) == made
    model = AutoModelForCausalLM.from_pretrained(fetch(store, published[0].ref, tmp_path / "cache"))
    assert model.mode.sparse_layers == (1,)
    assert [group.name for group in model.mode.expert_groups] == ["general", "code"]
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"versions"}  # the scratch folder is gone


def test_again_is_a_no_op_and_other_bytes_under_the_same_version_a_conflict(store, tmp_path):
    first = run(job(), store, tmp_path / "work")
    assert run(job(), store, tmp_path / "elsewhere") == first
    with pytest.raises(Conflict):
        run(job(JOB.replace("seed: 3", "seed: 4")), store, tmp_path / "work")


def test_a_stock_format_is_published_beside_it(store, tmp_path):
    published = run(job(JOB + "stock_format: replicate\n"), store, tmp_path / "work")
    assert [str(manifest.ref) for manifest in published] == ["mode@v1/safetensors", "mode@v1/mixtral"]
    assert published[1].metadata["exported_from"] == "mode@v1/safetensors"
    ours, stock = (
        AutoModelForCausalLM.from_pretrained(fetch(store, manifest.ref, tmp_path / "cache")) for manifest in published
    )
    ids = torch.arange(12)[None]
    torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_made_is_refused_before_anything_is_published(store, tmp_path):
    with pytest.raises(InvalidValue, match="'last 3' of 2 layers"):
        run(job(JOB.replace("last 1", "last 3")), store, tmp_path / "work")
    plain = JOB + "renormalize: false\nstock_format: replicate\n"
    with pytest.raises(InvalidValue, match="not renormalised"):
        run(job(plain), store, tmp_path / "work")
    with pytest.raises(NotFound, match="dense@v9"):
        run(job(JOB.replace("v0", "v9")), store, tmp_path / "work")
    assert list_versions(store, "mode") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("experts: 1", "experts: 0"), "greater than or equal to 1"),
        (("[0.0, 0.5]", "[0.0]"), "2 experts and 1 drop rates"),
        (("[0.0, 0.5]", "1.5"), "less than or equal to 1"),
        (("seed: 3", "experts_per_token: 4"), "each token takes 4 experts, but a layer has only 3"),
        (("seed: 3", "sed: 3"), "Did you mean 'seed'"),
        (("version: v1", "version: adapters"), "reserved"),
    ],
)
def test_the_job_file_is_checked_with_line_and_reason(change, message):
    with pytest.raises(InvalidDocument, match=message) as caught:
        job(JOB.replace(*change))
    assert "job.yaml:" in str(caught.value)


def test_the_job_in_the_repository_is_sound():
    found = load_job(Path(__file__).parents[2] / "jobs" / "upcycle-smollm2.yaml")
    assert isinstance(found, UpcycleJob)
    assert (sum(group.experts for group in found.groups), found.experts_per_token, found.layers) == (4, 2, "last 6")


def test_an_unknown_kind_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "job.yaml").write_text("kind: upcycel\n")
    with pytest.raises(InvalidDocument, match="Did you mean 'upcycle'"):
        load_job(tmp_path / "job.yaml")
