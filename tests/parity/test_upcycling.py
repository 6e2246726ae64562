"""Drop-Upcycling does what its sources say: what is kept, what is drawn, and that copies are the dense model."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from zenray.model.config import MoDEConfig, RouterConfig
from zenray.model.hf import register
from zenray.model.upcycling.drop import FeedForwardWeights, drop, seeded
from zenray.model.upcycling.partition import (
    balanced_kmeans,
    centroid_router,
    neuron_features,
    random_partition,
    squared_distances,
)
from zenray.model.upcycling.recipe import GroupRecipe, UpcyclingRecipe, select_layers
from zenray.model.upcycling.source import DenseSource, dense_config
from zenray.model.upcycling.upcycle import make_layer, single_threads, upcycle
from zenray.spec.errors import InvalidDocument, InvalidValue

pytestmark = pytest.mark.parity
register()

HIDDEN, WIDTH = 64, 1000


def ffn(seed: int = 0, dtype: torch.dtype = torch.float32) -> FeedForwardWeights:
    """Each matrix with its own mean and deviation, so that taking the wrong one shows."""
    generator = torch.Generator().manual_seed(seed)
    gate = torch.randn(WIDTH, HIDDEN, generator=generator) * 0.3 + 0.5
    up = torch.randn(WIDTH, HIDDEN, generator=generator) * 0.05 - 0.2
    down = torch.randn(HIDDEN, WIDTH, generator=generator) * 2.0 + 3.0
    return FeedForwardWeights(gate.to(dtype), up.to(dtype), down.to(dtype))


def changed_neurons(dense: FeedForwardWeights, made: FeedForwardWeights) -> list[set[int]]:
    """For gate, up and down: the neurons of which any weight differs. All weights of a changed neuron must differ."""
    found = []
    for old, new, across in zip(dense, made, (1, 1, 0), strict=True):
        differs = old != new
        share = differs.float().mean(dim=across)
        assert set(share.tolist()) <= {0.0} or share[share > 0].min() > 0.9  # bfloat16 may draw an equal value
        found.append(set(differs.any(dim=across).nonzero().flatten().tolist()))
    return found


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joint_draws_one_set_of_neurons_and_keeps_the_others_bit_for_bit(rate, dtype):
    dense = ffn(dtype=dtype)
    gate, up, down = changed_neurons(dense, drop(dense, "joint", rate, seeded(0)))
    assert gate == up == down
    assert len(gate) == round(rate * WIDTH)


def test_joint_draws_with_the_statistics_of_what_it_replaces():
    """Not of the whole matrix: half of the neurons are made different, and only they are dropped."""
    dense = ffn()
    made = drop(dense, "joint", 0.5, seeded(3))
    index = sorted(changed_neurons(dense, made)[0])
    dense.gate_ID[index] += 1.0  # dropped neurons now have a mean of their own; the same draw picks them again
    made = drop(dense, "joint", 0.5, seeded(3))
    for old, new, axis in zip(dense, made, (0, 0, 1), strict=True):
        old, new = (matrix.index_select(axis, torch.tensor(index)) for matrix in (old, new))
        standard_error = float(old.std()) / old.numel() ** 0.5
        assert float(new.mean()) == pytest.approx(float(old.mean()), abs=5 * standard_error)
        assert float(new.std()) == pytest.approx(float(old.std()), rel=5 / (2 * old.numel()) ** 0.5)
        correlation = torch.corrcoef(torch.stack([old.flatten(), new.flatten()]))[0, 1]
        assert abs(float(correlation)) < 5 / old.numel() ** 0.5


def test_two_experts_share_r_squared_of_their_dropped_neurons():
    dense = ffn()
    sets = [changed_neurons(dense, drop(dense, "joint", 0.5, seeded(0, "expert", e)))[0] for e in range(8)]
    overlaps = [len(a & b) / WIDTH for i, a in enumerate(sets) for b in sets[:i]]
    assert sum(overlaps) / len(overlaps) == pytest.approx(0.25, abs=0.01)


def test_independent_leaves_only_an_eighth_of_the_neurons_whole():
    dense = ffn()
    gate, up, down = changed_neurons(dense, drop(dense, "independent", 0.5, seeded(0)))
    assert len(gate) == len(up) == len(down) == WIDTH // 2
    assert gate != up and up != down
    assert 1 - len(gate | up | down) / WIDTH == pytest.approx(0.125, abs=0.04)


def test_rows_is_the_blogs_function():
    """Rows of each matrix by themselves: of `down` those are output channels. N(0, 0.02²)."""
    dense = ffn()
    made = drop(dense, "rows", 0.1, seeded(0))
    rows = []
    for old, new in zip(dense, made, strict=True):
        changed = (old != new).any(dim=1)
        rows.append(int(changed.sum()))
        assert float(new[changed].std()) == pytest.approx(0.02, rel=0.1)
        assert abs(float(new[changed].mean())) < 0.002
    assert rows == [100, 100, int(0.1 * HIDDEN)]


def recipe(rates: tuple[float, ...] = (0.0, 0.5, 0.5), **changes) -> UpcyclingRecipe:
    return UpcyclingRecipe(**{"groups": (GroupRecipe("general", rates),), "layers": (1, 3), **changes})


@pytest.mark.parametrize("mode", ["joint", "copy"])
def test_copies_are_the_dense_model(qwen3_folder, tmp_path, mode):
    """r = 0 and renormalised gate weights: the same logits, whatever the router says, in float32."""
    upcycle(qwen3_folder, recipe((0.0,) * 4, layers=(0, 1, 3), mode=mode, router_std=1.0), tmp_path / "mode")
    dense = AutoModelForCausalLM.from_pretrained(qwen3_folder)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "mode")
    ids = torch.randint(0, 97, (2, 31))
    torch.testing.assert_close(made(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)
    assert made(ids).router_stats[0].load_E.min() > 0  # the experts really were different choices


@pytest.mark.parametrize("granularity", [2, 4])
def test_fine_grained_experts_scaled_by_the_granularity_are_the_dense_model(qwen3_folder, tmp_path, granularity):
    made = recipe((0.0,) * 3, mode="copy", granularity=granularity, router_std=1.0)
    config = upcycle(qwen3_folder, made, tmp_path / "mode")
    assert (config.num_experts, config.expert_widths[0]) == (3 * granularity, 400 // granularity)
    assert config.router.experts_per_token == 2 * granularity
    dense = AutoModelForCausalLM.from_pretrained(qwen3_folder)
    fine = AutoModelForCausalLM.from_pretrained(tmp_path / "mode")
    ids = torch.randint(0, 97, (2, 31))
    torch.testing.assert_close(fine(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["kmeans", "random"])
def test_a_partition_with_all_experts_on_is_the_dense_model(qwen3_folder, tmp_path, mode):
    made = recipe((0.0,) * 8, mode=mode, router=RouterConfig(experts_per_token=8), router_init="zero")
    config = upcycle(qwen3_folder, made, tmp_path / "mode")
    assert config.expert_widths == (50,) * 8
    dense = AutoModelForCausalLM.from_pretrained(qwen3_folder)
    parted = AutoModelForCausalLM.from_pretrained(tmp_path / "mode")
    ids = torch.randint(0, 97, (2, 31))
    torch.testing.assert_close(parted(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)


def test_kmeans_with_routers_from_centroids_as_a_whole(qwen3_folder, tmp_path):
    """Each layer's router is that of its own clusters, and the experts are those clusters' neurons."""
    upcycle(qwen3_folder, recipe((0.0,) * 8, mode="kmeans", router_init="centroid"), tmp_path / "mode")
    tensors = load_file(tmp_path / "mode" / "model.safetensors")
    for layer in (1, 3):
        dense = DenseSource(qwen3_folder).feed_forward(layer)
        expert_I = balanced_kmeans(neuron_features(dense), 8, seeded(0, "layer", layer, "partition"))
        stem = f"model.layers.{layer}.mlp."
        assert torch.equal(tensors[f"{stem}gate.weight"], centroid_router(dense, expert_I, 8, std=0.02))
        for expert in range(8):
            gate, up = tensors[f"{stem}experts.gate_up_proj"][expert].chunk(2)
            assert torch.equal(gate, dense.gate_ID[expert_I == expert])
            assert torch.equal(up, dense.up_ID[expert_I == expert])
            down = tensors[f"{stem}experts.down_proj"][expert]
            assert torch.equal(down, 8 * dense.down_DI[:, expert_I == expert])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mode")
    assert model(torch.randint(0, 97, (2, 31))).logits.isfinite().all()


def test_fine_grained_experts_have_their_share_drawn_anew_in_each_part(qwen3_folder, tmp_path):
    """Granularity with a drop rate: every shard loses that share of its own neurons; the rest is the dense FFN's."""
    upcycle(qwen3_folder, recipe((0.0, 0.25), granularity=4), tmp_path / "mode")
    tensors = load_file(tmp_path / "mode" / "model.safetensors")
    dense = DenseSource(qwen3_folder).feed_forward(3)
    dropped = []
    for expert in range(8):
        part = slice(100 * (expert % 4), 100 * (expert % 4 + 1))
        whole = FeedForwardWeights(dense.gate_ID[part], dense.up_ID[part], 4 * dense.down_DI[:, part])
        gate, up = tensors["model.layers.3.mlp.experts.gate_up_proj"][expert].chunk(2)
        made = FeedForwardWeights(gate, up, tensors["model.layers.3.mlp.experts.down_proj"][expert])
        gates, ups, downs = changed_neurons(whole, made)
        assert gates == ups == downs
        dropped.append(gates)
        if gates:  # drawn with the deviation of what was there, the factor of 4 included
            index = torch.tensor(sorted(gates))
            assert float(made.down_DI[:, index].std()) == pytest.approx(float(whole.down_DI[:, index].std()), rel=0.1)
    assert [len(found) for found in dropped] == [0, 0, 0, 0, 25, 25, 25, 25]
    assert len({frozenset(found) for found in dropped[4:]}) == 4


def blobs(experts: int = 4, each: int = 30, seed: int = 0) -> FeedForwardWeights:
    """An FFN whose neurons fall into clear clusters, shuffled; D = 24."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, experts, 24, generator=generator)
    order = torch.randperm(experts * each, generator=generator)
    parts = [
        centre.repeat_interleave(each, dim=0)[order] + 0.1 * torch.randn(experts * each, 24, generator=generator)
        for centre in centres
    ]
    return FeedForwardWeights(parts[0], parts[1], parts[2].t().contiguous())


def test_kmeans_finds_clusters_that_are_there_of_equal_size_and_the_same_by_seed():
    features = neuron_features(blobs())
    expert_I = balanced_kmeans(features, 4, seeded(0))
    assert torch.bincount(expert_I).tolist() == [30] * 4
    within = squared_distances(features, expert_I, 4)
    assert within < squared_distances(features, random_partition(120, 4, seeded(0)), 4) / 10
    assert torch.equal(expert_I, balanced_kmeans(features, 4, seeded(0)))


def test_a_router_from_centroids_finds_the_expert_whose_neurons_answer():
    ffn = blobs()
    expert_I = balanced_kmeans(neuron_features(ffn), 4, seeded(0))
    router = centroid_router(ffn, expert_I, 4, std=0.02)
    assert float(router.std()) == pytest.approx(0.02, rel=1e-3)
    gate_means = torch.stack([ffn.gate_ID[expert_I == e].mean(0) for e in range(4)])
    assert (gate_means @ router.t()).argmax(-1).tolist() == [0, 1, 2, 3]


def test_all_else_is_copied_byte_for_byte_and_experts_are_what_drop_makes(llama_folder, tmp_path):
    config = upcycle(llama_folder, recipe(), tmp_path / "mode")
    dense, made = load_file(llama_folder / "model.safetensors"), load_file(tmp_path / "mode" / "model.safetensors")
    chosen = ("model.layers.1.mlp.", "model.layers.3.mlp.")
    kept = [name for name in dense if not name.startswith(chosen)]
    assert all(torch.equal(dense[name], made[name]) and dense[name].dtype == made[name].dtype for name in kept)
    assert set(made) - set(kept) == {
        f"{prefix}{name}" for prefix in chosen for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    }
    weights = DenseSource(llama_folder).feed_forward(3)
    assert config.num_experts == 3
    for expert, rate in enumerate((0.0, 0.5, 0.5)):
        gate, up = made["model.layers.3.mlp.experts.gate_up_proj"][expert].chunk(2)
        got = FeedForwardWeights(gate, up, made["model.layers.3.mlp.experts.down_proj"][expert])
        assert [len(found) for found in changed_neurons(weights, got)] == [round(rate * weights.width)] * 3


def test_tokenizer_licence_and_notice_go_along(llama_folder, tmp_path):
    source = shutil.copytree(llama_folder, tmp_path / "dense")
    for name in ("tokenizer.json", "LICENSE", "NOTICE", "README.md"):
        (source / name).write_text("{}")
    upcycle(source, recipe(), tmp_path / "mode")
    made = {path.name for path in (tmp_path / "mode").iterdir()}
    assert made >= {"tokenizer.json", "LICENSE", "NOTICE"} and "README.md" not in made


def sha256(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_seed_fixes_every_byte_and_the_layers_chosen_do_not_matter(llama_folder, tmp_path):
    for name, changes in {"a": {}, "b": {}, "c": {"seed": 1}, "d": {"layers": (3,)}}.items():
        upcycle(llama_folder, recipe(**changes), tmp_path / name)
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")
    assert sha256(tmp_path / "a")["model.safetensors"] != sha256(tmp_path / "c")["model.safetensors"]
    both, one = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "d" / "model.safetensors")
    name = "model.layers.3.mlp.experts.gate_up_proj"
    assert torch.equal(both[name], one[name])


@pytest.mark.parametrize("mode", ["joint", "kmeans"])
def test_a_machine_with_more_cores_makes_the_same_bytes(mode):
    """A sum's last bit depends on how many threads share it, and so would what is drawn."""
    generator = torch.Generator().manual_seed(0)
    dense = FeedForwardWeights(
        *(torch.randn(shape, generator=generator) for shape in ((768, 128),) * 2 + ((128, 768),))
    )
    rates = (0.5, 0.5) if mode == "joint" else (0.0, 0.0)
    asked = recipe(rates, mode=mode, router_init="normal" if mode == "joint" else "centroid")
    shape = MoDEConfig(64, 128, 768, 4, 4, 2, 32)
    threads, made = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with single_threads() as pool:
                assert pool.submit(torch.get_num_threads).result() == 1
                made.append(make_layer(dense, 1, asked, asked.config(shape), pool))
    finally:
        torch.set_num_threads(threads)
    for other in made[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in made[0].items())


def test_sharded_in_and_sharded_out(qwen3_folder, tmp_path):
    upcycle(qwen3_folder, recipe(), tmp_path / "whole")
    upcycle(qwen3_folder, recipe(), tmp_path / "parts", shard_bytes=500_000)
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    parts = AutoModelForCausalLM.from_pretrained(tmp_path / "parts").state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_what_cannot_be_is_refused(qwen3_folder, tmp_path):
    with pytest.raises(InvalidValue, match="draws nothing anew"):
        recipe(mode="copy")
    with pytest.raises(InvalidValue, match=r"rate of 1\.5 is not a share"):
        recipe((1.5,))
    with pytest.raises(InvalidValue, match="Did you mean 'joint'"):
        recipe(mode="join")
    with pytest.raises(InvalidValue, match="no centroids"):
        recipe(router_init="centroid")
    with pytest.raises(InvalidValue, match="granularity of 2 is for"):
        recipe(granularity=2, router=RouterConfig(renormalize=False))
    with pytest.raises(InvalidValue, match="width 400 cannot be cut into 7 equal parts"):
        upcycle(qwen3_folder, recipe((0.0,) * 7, mode="kmeans"), tmp_path / "mode")
    with pytest.warns(UserWarning, match="outside 5% to 30%"):
        recipe((0.5, 0.1), mode="rows")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LlamaConfig(mlp_bias=True), "mlp_bias = True"),
        (LlamaConfig(attention_bias=True), "attention_bias = True"),
        (Qwen3Config(attention_bias=True), "attention_bias = True"),
        (LlamaConfig(hidden_act="gelu"), "hidden_act = 'gelu'"),
        (LlamaConfig(pretraining_tp=2), "pretraining_tp = 2"),
        (GPT2Config(), "model_type 'gpt2' cannot be upcycled"),
        (LlamaConfig(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "mscale": 2.0,
                                      "original_max_position_embeddings": 8}), "rope_parameters has mscale"),
    ],
)  # fmt: skip
def test_what_the_network_cannot_say_is_refused_by_the_fields_name(config, reason):
    with pytest.raises(InvalidValue, match=reason):
        dense_config(config)


def test_a_checkpoint_is_what_its_config_says_or_is_refused(llama_folder, tmp_path):
    """Nothing is left out without a word: a bias that the config does not speak of, a missing layer."""
    source = shutil.copytree(llama_folder, tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    bias = "model.layers.0.self_attn.o_proj.bias"
    save_file({**tensors, bias: torch.ones(48)}, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidDocument, match=f"not of this model: {bias}"):
        upcycle(source, recipe(), tmp_path / "mode")
    gone = "model.layers.2.mlp.up_proj.weight"
    kept = {name: tensor for name, tensor in tensors.items() if name != gone}
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidDocument, match=f"missing: {gone}"):
        upcycle(source, recipe(), tmp_path / "mode")
    assert not (tmp_path / "mode").exists()
    computed = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(computed, source / "model.safetensors", metadata={"format": "pt"})
    upcycle(source, recipe(), tmp_path / "mode")
    assert not any("inv_freq" in name for name in load_file(tmp_path / "mode" / "model.safetensors"))


def test_layers_by_words():
    assert select_layers("last 6", 30) == tuple(range(24, 30))
    assert select_layers("all", 3) == (0, 1, 2)
    assert select_layers("first 2", 3) == (0, 1)
    assert select_layers("every 2", 5) == (1, 3)
    assert select_layers([0, 2], 3) == (0, 2)
    for wrong in ("last 31", "last", "some", "last 0"):
        with pytest.raises(InvalidValue):
            select_layers(wrong, 30)
