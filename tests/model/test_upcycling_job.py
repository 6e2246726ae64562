"""An upcycling job from a published version to published versions, through a store in memory."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from zenray.model.config import RouterConfig
from zenray.model.hf import register
from zenray.model.upcycling.runner import make_recipe, run
from zenray.model.upcycling.source import DenseSource
from zenray.spec.documents import parse_document
from zenray.spec.errors import Conflict, InvalidDocument, InvalidValue, NotFound
from zenray.spec.jobs import load_job
from zenray.spec.upcycling import UpcycledRouter, UpcycleJob
from zenray.spec.versions import TEMPLATE_OVERHEAD, VersionRef
from zenray.storage.cache import fetch
from zenray.storage.local import LocalStore
from zenray.storage.versions import list_versions, publish

register()

ROOT = Path(__file__).parents[2]
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
    about = {TEMPLATE_OVERHEAD: "7", "context_tokens": "64", "dtype": "F32"}
    publish(store, VersionRef(model="dense", version="v0"), tmp_path / "dense", metadata=about)
    return store


def test_publishes_the_model_with_its_parents_and_recipe(store, tmp_path):
    seen = []
    published = run(job(), store, tmp_path / "work", progress=lambda *told: seen.append(told))
    assert [str(manifest.ref) for manifest in published] == ["mode@v1/safetensors"]
    assert published[0].parents.base_version == "dense@v0/safetensors"
    assert '"drop_rates": [0.0, 0.5]' in published[0].metadata["recipe"]
    assert published[0].metadata.items() >= {(TEMPLATE_OVERHEAD, "7"), ("context_tokens", "64")}
    assert "dtype" not in published[0].metadata, "what it is not given, it does not inherit"
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
    plain = JOB + "router: {renormalize: false}\nstock_format: replicate\n"
    with pytest.raises(InvalidValue, match="not renormalised"):
        run(job(plain), store, tmp_path / "work")
    with pytest.raises(NotFound, match="dense@v9"):
        run(job(JOB.replace("v0", "v9")), store, tmp_path / "work")
    assert list_versions(store, "mode") == []


EVERYTHING = """
kind: upcycle
name: tiny
base: {model: dense, version: v0}
into: {model: mode, version: v1}
groups:
  - {name: general, experts: 2, drop_rate: 0}
  - {name: code, experts: 2, drop_rate: 0, width: 40}
layers: all
expert_choice_layers: first 1
router:
  temperature: 1.5
  balance_loss: cv2
  balance_coefficient: 0.02
  z_coefficient: 0.001
  selection_bias: true
  capacity_factor: 1.25
  expert_choice_training: expert_choice
  threshold_warmup_steps: 5
  threshold_decay: 0.9
shared_expert_width: 8
shared_expert_gate: true
router_std: 1.0
"""


def load(store: LocalStore, ref: VersionRef, tmp_path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(fetch(store, ref, tmp_path / "cache"))


def test_all_of_the_network_can_be_asked_for_and_starts_as_the_dense_model(store, tmp_path):
    """Nothing drawn anew: wider experts and the shared one say nothing yet, so the logits are the dense model's."""
    made = load(store, run(job(EVERYTHING), store, tmp_path / "work")[0].ref, tmp_path)
    mode = made.mode
    assert (mode.sparse_layers, mode.expert_choice_layers, mode.expert_widths) == ((0, 1), (0,), (24, 24, 40, 40))
    assert (mode.shared_expert_width, mode.shared_expert_gate) == (8, True)
    assert mode.router == RouterConfig(2, True, 1.5, "cv2", 0.02, 1e-3, True, 1.25, "expert_choice", True, 5, 0.9)
    buffers = dict(made.named_buffers())
    assert {name.removeprefix("model.layers."): buffer.tolist() for name, buffer in buffers.items()} == {
        "0.mlp.gate.cutoff_E": [0.0] * 4,
        "0.mlp.gate.steps": 0,
        "1.mlp.gate.bias_E": [0.0] * 4,
    }
    dense = load(store, VersionRef(model="dense", version="v0"), tmp_path)
    ids = torch.randint(0, 32, (2, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(made(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)
    assert min(float(layer.load_E.min()) for layer in made(ids).router_stats) > 0
    wide, shared = made.model.layers[1].mlp.experts.banks[1], made.model.layers[1].mlp.shared_expert
    assert wide.gate_up_proj[:, 24:40].std() > 0 and wide.down_proj[:, :, 24:].abs().max() == 0
    assert shared.up_proj.weight.std() > 0 and shared.down_proj.weight.abs().max() == 0


def test_a_job_can_set_all_that_a_router_can():
    ours, networks = UpcycledRouter.model_fields, {field.name: field for field in fields(RouterConfig)}
    assert {*ours, "experts_per_token"} == set(networks)
    plain = {name for name in ours if name != "expert_choice_renormalize"}  # None here: as `renormalize`
    assert {name: ours[name].default for name in plain} == {name: networks[name].default for name in plain}


@pytest.mark.parametrize(
    ("mode", "name", "rate", "router_init"),
    [
        ("joint", "code", 0.5, "normal"),
        ("independent", "general", 0.5, "normal"),
        ("rows", "general", 0.1, "normal"),
        ("rows", "code", 0.15, "normal"),
        ("copy", "general", 0.0, "normal"),
        ("kmeans", "general", 0.0, "centroid"),
        ("random", "general", 0.0, "normal"),
    ],
)
def test_what_is_left_out_is_what_the_modes_source_says(mode, name, rate, router_init, store, tmp_path, recwarn):
    groups = f"groups: [{{name: {name}, experts: 2}}, {{name: other, experts: 1}}]\n"
    text = JOB[: JOB.index("groups:")] + groups + f"layers: last 1\nmode: {mode}\n"
    found = make_recipe(job(text), DenseSource(tmp_path / "dense").config)
    assert found.groups[0].drop_rates == (rate, rate)
    assert found.router_init == router_init
    assert not [warning for warning in recwarn if "Drop rates" in str(warning.message)]
    assert run(job(text), store, tmp_path / "work")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("width: 40", "width: 20"), "The dense FFN has 24 neurons: experts of code would have fewer"),
        (("shared_expert_width: 8", "shared_expert_width: 25"), "24 neurons: the shared expert wants more"),
        (("router_std: 1.0", "granularity: 2"), "Groups code have widths of their own"),
        (("choice_layers: first 1", "choice_layers: [2]"), "has .2., but layers go from 0 to 1"),
        (("choice_layers: first 1", "choice_layers: all"), "selection_bias would do nothing"),
    ],
)
def test_a_network_that_cannot_be_is_refused_before_anything_is_written(change, message, store, tmp_path):
    with pytest.raises(InvalidValue, match=message):
        run(job(EVERYTHING.replace(*change)), store, tmp_path / "work")
    assert list_versions(store, "mode") == []


def test_the_blogs_network_is_made_trained_saved_and_loaded(store, tmp_path):
    """The repository's job on a tiny model: 24 neurons for 8 experts, each of 3, and as many shared ones."""
    text = (ROOT / "jobs" / "upcycle-smollm2-blog.yaml").read_text()
    text = text.replace("model: smollm2-135m", "model: dense").replace("expert_width: 192", "expert_width: 3")
    text = text.replace("expert_choice_layers: first 2", "expert_choice_layers: first 1")  # of two layers
    made = load(store, run(job(text), store, tmp_path / "work")[0].ref, tmp_path)
    mode = made.mode
    assert (mode.num_experts, mode.expert_widths[0], mode.expert_choice_layers) == (8, 3, (0,))
    router = mode.router
    assert (router.renormalize, router.balance_loss, router.capacity_factor) == (False, "cv2", 1.25)
    optimizer = torch.optim.SGD(made.train().parameters(), lr=0.5)
    ids = torch.randint(0, 32, (4, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(3):
        output = made(ids, labels=ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        made.model.after_step(list(output.router_stats))
        losses.append(float(output.loss.detach()))
    assert losses[2] < losses[0]
    assert made.model.layers[1].mlp.shared_expert.down_proj.weight.abs().max() > 0  # the fallback learns to speak
    assert output.router_stats[1].overflow_E.sum() > 0
    made.eval().save_pretrained(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert int(again.model.layers[0].mlp.gate.steps) == 3 and again.model.layers[0].mlp.gate.cutoff_E.min() > 0
    assert torch.equal(made(ids).logits, again(ids).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seed: 3", "router: {capacity_factor: 1.0}"), "shared_expert_width is 0"),
        (("seed: 3", "router: {temprature: 2}"), "Did you mean 'temperature'"),
        (("seed: 3", "shared_expert_gate: true"), "nothing to gate"),
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
    found = load_job(ROOT / "jobs" / "upcycle-smollm2.yaml")
    assert isinstance(found, UpcycleJob)
    assert (sum(group.experts for group in found.groups), found.experts_per_token, found.layers) == (4, 2, "last 6")


def test_an_unknown_kind_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "job.yaml").write_text("kind: upcycel\n")
    with pytest.raises(InvalidDocument, match="Did you mean 'upcycle'"):
        load_job(tmp_path / "job.yaml")
