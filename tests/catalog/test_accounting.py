"""Counting against sums done by hand, the 2 % rule for every model, and laws of memory."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zenray.catalog import Catalog, ModelEntry
from zenray.catalog.accounting import (
    count_parameters,
    flops_per_token,
    kv_cache_bytes,
    kv_cache_bytes_per_token,
    lora_parameters,
    weights_bytes,
)
from zenray.catalog.memory import Layout, cache_tokens, legal_tensor_parallel, memory_per_gpu, stage_layers
from zenray.spec.dimensions import ModelDimensions
from zenray.spec.errors import InvalidValue

CATALOG = Catalog.load()


@pytest.mark.parametrize("entry", list(CATALOG), ids=lambda entry: entry.name)
def test_dimensions_meet_the_claimed_totals_within_two_percent(entry: ModelEntry) -> None:
    assert entry.dimensions is not None
    count = count_parameters(entry.dimensions)
    encoders = sum(encoder.parameters or 0 for encoder in entry.encoders) if entry.encoders_in_total else 0
    assert count.total + encoders == pytest.approx(entry.parameters.total, rel=0.02)
    assert count.active == pytest.approx(entry.parameters.active, rel=0.02)


@pytest.mark.parametrize("entry", list(CATALOG), ids=lambda entry: entry.name)
def test_where_dimensions_leave_the_documents_a_note_says_so(entry: ModelEntry) -> None:
    claimed, dimensions = entry.claims.shape, entry.dimensions
    assert dimensions is not None
    moe = dimensions.moe
    actual = {
        "experts": moe.experts if moe else 1,
        "top_k": moe.top_k if moe else None,
        "layers": dimensions.layers,
        "hidden_size": dimensions.hidden_size,
        "heads": dimensions.heads,
        "kv_heads": dimensions.kv_heads,
        "ffn_width": dimensions.ffn_width,
        "expert_width": moe.expert_width if moe else None,
        "shared_width": moe.shared_width if moe else None,
        "vocab_size": dimensions.vocab_size,
    }
    written = {key: value for key, value in claimed.model_dump().items() if value is not None}
    changed = {key for key, value in written.items() if actual[key] != value}
    allowed = {
        "zen-72b": {"expert_width"},
        "zen4-max": {"top_k"},
        "zen-nano": {"ffn_width"},
        "zen-eco": {"ffn_width"},
        "zen-coder": {"top_k", "expert_width", "shared_width"},
        "zen-omni": {"top_k"},
        "zen-next": {"expert_width"},
        "zen-base-mode": {"experts"},
        "zen-pro-mode": {"experts"},
        "zen-max-mode": {"experts"},
    }
    assert changed == allowed.get(entry.name, set())
    assert {"heads", "kv_heads", "layers"} & changed == set()
    if changed:
        assert any("cannot" in note or "Not " in note or "not " in note for note in entry.notes)


def test_smollm2_is_its_real_size() -> None:
    entry = CATALOG.get("smollm2-135m")
    assert entry.dimensions is not None
    assert count_parameters(entry.dimensions).total == entry.parameters.total == 134_515_008


def dense(**changes: object) -> ModelDimensions:
    return ModelDimensions.model_validate(
        {"vocab_size": 10, "hidden_size": 4, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 2, "ffn_width": 6}
        | changes
    )


def test_a_dense_model_by_hand() -> None:
    # A layer: q 4×4, k and v 4×2 each, o 4×4 = 48; FFN 3×4×6 = 72; norms 2×4 = 8. Embedding and head 40 each.
    count = count_parameters(dense())
    assert (count.attention, count.dense_ffn, count.norms) == (96, 144, 20)
    assert count.total == count.active == 40 + 40 + 96 + 144 + 20
    assert count_parameters(dense(tied_embeddings=True)).total == count.total - 40
    assert count_parameters(dense(qk_norm=True)).total == count.total + 2 * 2 * 2
    assert count_parameters(dense(qkv_bias=True)).total == count.total + 2 * (4 + 2 + 2)
    assert count_parameters(dense(o_bias=True)).total == count.total + 2 * 4
    # Matrix products: 2 × (96 + 144 + 40); scores and values of 5 tokens: 4 × 4 × 5 in each of 2 layers.
    assert flops_per_token(dense()) == 560
    assert flops_per_token(dense(), context_tokens=5) == 560 + 160
    assert flops_per_token(dense(tied_embeddings=True, qk_norm=True, qkv_bias=True)) == 560
    assert weights_bytes(dense(), 0.5) == 170


def test_a_mixture_by_hand() -> None:
    moe = {"experts": 4, "top_k": 2, "expert_widths": [2, 2, 2, 6], "shared_width": 3, "shared_gate": True}
    count = count_parameters(dense(moe=moe, dense_layers=[0]))
    # One sparse layer: experts 3×4×(2+2+2+6) = 144, half of them active; router 16; shared 3×4×3 + gate 4.
    assert (count.routed_experts, count.routed_active, count.router, count.shared_experts) == (144, 72, 16, 40)
    assert count.dense_ffn == 72
    assert count.total - count.active == 72
    assert flops_per_token(dense(moe=moe, dense_layers=[0])) == 2 * (96 + 72 + 72 + 16 + 40 + 40)


def test_blocks_by_hand() -> None:
    blocks = [
        {"kind": "deep", "experts": 2, "width": 4},
        {"kind": "vocabulary", "width": 3},
        {"kind": "spatial", "width": 2},
    ]
    moe = {"experts": 6, "top_k": 2, "expert_widths": [3, 6], "blocks": blocks}
    with_blocks = dense(moe=moe, dense_layers=[0], local_layers=[0], local_window_tokens=2)
    count = count_parameters(with_blocks)
    # In the one sparse layer: queries and outputs 2×4×(4+4+2) = 80; a second embedding 10×3 and its adapter 3×4.
    assert count.blocks == 80 + 42
    # A third of tokens meets each FFN; all meet the blocks, of which only the look-up is no product.
    assert (count.routed_experts, count.routed_active, count.router) == (108, 36, 24)
    assert count.total - count.active == 72
    assert flops_per_token(with_blocks) == 2 * (96 + 72 + 36 + 24 + 40 + 80 + 12)
    # The layer's own queries, and the blocks', where it attends to all five tokens.
    assert flops_per_token(with_blocks, 5) == flops_per_token(with_blocks) + 4 * (4 * 2 + (4 + 10) * 5)
    assert kv_cache_bytes_per_token(with_blocks) == kv_cache_bytes_per_token(dense())


def test_kv_cache_by_hand() -> None:
    assert kv_cache_bytes_per_token(dense()) == 2 * 2 * 2 * 2  # key and value, layers, kv_width, bytes
    assert kv_cache_bytes(dense(), 10, bytes_per_value=1) == 80
    local = dense(local_layers=[1], local_window_tokens=4)
    assert kv_cache_bytes(local, 10, bytes_per_value=1) == 2 * 2 * (10 + 4)
    assert flops_per_token(local, 10) == 560 + 4 * 4 * (10 + 4)
    zen_72b = CATALOG.get("zen-72b").dimensions
    assert zen_72b is not None
    assert kv_cache_bytes_per_token(zen_72b) == 327_680  # as the entry's note says


def test_lora_by_hand() -> None:
    assert lora_parameters(dense(), 8, ["q_proj"]) == 2 * 8 * (4 + 4)
    assert lora_parameters(dense(), 8, ["v_proj", "down_proj"]) == 2 * 8 * ((4 + 2) + (4 + 6))
    moe = dense(moe={"experts": 4, "top_k": 2, "expert_width": 5, "shared_width": 3}, dense_layers=[0])
    assert lora_parameters(moe, 1, ["up_proj"]) == (4 + 6) + (4 + 3)  # of the dense FFN, of the shared expert
    assert lora_parameters(moe, 1, [], ["mlp.experts.gate_up_proj"]) == 4 * (4 + 2 * 5)
    assert lora_parameters(moe, 1, [], ["mlp.experts.down_proj"]) == 4 * (4 + 5)
    assert lora_parameters(moe, 1, [], ["mlp.gate.weight"]) == 4 + 4
    with pytest.raises(InvalidValue, match=r"no module 'qproj'.*Did you mean 'q_proj'"):
        lora_parameters(dense(), 8, ["qproj"])
    with pytest.raises(InvalidValue, match=r"no parameter 'mlp\.gate\.weight'"):
        lora_parameters(dense(), 8, [], ["mlp.gate.weight"])
    experts_alone = dense(moe={"experts": 4, "top_k": 2, "expert_width": 5}, ffn_width=0)
    with pytest.raises(InvalidValue, match="no module 'up_proj'"):
        lora_parameters(experts_alone, 8, ["up_proj"])


@pytest.mark.parametrize("entry", list(CATALOG), ids=lambda entry: entry.name)
def test_one_gpu_holds_it_all_and_layouts_divide(entry: ModelEntry) -> None:
    assert entry.dimensions is not None
    (whole,) = memory_per_gpu(entry.dimensions, Layout(), bytes_per_parameter=1, sequences=2, context_tokens=5)
    assert whole.weights_bytes == count_parameters(entry.dimensions).total
    assert whole.kv_cache_bytes == 2 * kv_cache_bytes(entry.dimensions, 5)

    layout = Layout(entry.serving.tensor_parallel, entry.serving.pipeline_parallel)
    stages = memory_per_gpu(entry.dimensions, layout, bytes_per_parameter=1)
    assert sum(stage.layers for stage in stages) == entry.dimensions.layers
    spread = layout.tensor_parallel * sum(stage.weights_bytes for stage in stages)
    assert whole.weights_bytes <= spread <= 1.01 * whole.weights_bytes + layout.tensor_parallel * 3e7


@pytest.mark.parametrize("entry", [e for e in CATALOG if e.serving.derived], ids=lambda entry: entry.name)
def test_a_derived_layout_holds_one_sequence_of_the_whole_context(entry: ModelEntry) -> None:
    assert entry.dimensions is not None
    serving = entry.serving
    fits = cache_tokens(
        entry.dimensions,
        Layout(serving.tensor_parallel, serving.pipeline_parallel),
        bytes_per_parameter=entry.quantization(serving.quantization).bytes_per_parameter,
        gpu_memory_bytes=serving.gpu_memory_bytes // serving.gpus,
        gpu_memory_utilization=0.92,
    )
    assert fits >= entry.context_tokens


def test_layouts_that_cannot_be_list_those_that_can() -> None:
    smollm2 = CATALOG.get("smollm2-135m").dimensions
    assert smollm2 is not None
    assert legal_tensor_parallel(smollm2) == (1, 3)
    with pytest.raises(InvalidValue, match=r"tensor_parallel 2 does not divide .* 9 query heads.*It can be 1, 3\."):
        memory_per_gpu(smollm2, Layout(2), bytes_per_parameter=2)
    with pytest.raises(InvalidValue, match=r"pipeline_parallel 31 is not within 1…30"):
        memory_per_gpu(smollm2, Layout(1, 31), bytes_per_parameter=2)
    with pytest.raises(InvalidValue):
        memory_per_gpu(smollm2, Layout(0), bytes_per_parameter=2)


def test_expert_parallel_needs_experts_that_divide_not_widths() -> None:
    odd = dense(ffn_width=0, heads=4, kv_heads=2, moe={"experts": 4, "top_k": 2, "expert_width": 5})
    assert legal_tensor_parallel(odd) == (1,)
    assert legal_tensor_parallel(odd, expert_parallel=True) == (1, 2, 4)
    two = memory_per_gpu(odd, Layout(2, expert_parallel=True), bytes_per_parameter=1)[0]
    one = memory_per_gpu(odd, Layout(1), bytes_per_parameter=1)[0]
    router_and_norms = 2 * (16 + 8) + 4  # whole on each rank
    assert two.weights_bytes == (one.weights_bytes - router_and_norms) // 2 + router_and_norms


def test_data_parallel_copies_all_but_experts() -> None:
    mixture = dense(ffn_width=0, heads=4, kv_heads=2, moe={"experts": 4, "top_k": 2, "expert_width": 8})
    one, cut, whole = (
        memory_per_gpu(mixture, layout, bytes_per_parameter=1, sequences=3, context_tokens=10)[0]
        for layout in (Layout(), Layout(data_parallel=2), Layout(data_parallel=2, expert_parallel=True))
    )
    routed = count_parameters(mixture).routed_experts
    assert cut.weights_bytes == whole.weights_bytes == one.weights_bytes - routed // 2
    assert cut.kv_cache_bytes == one.kv_cache_bytes
    assert legal_tensor_parallel(mixture, data_parallel=3) == ()
    assert legal_tensor_parallel(mixture, expert_parallel=True, data_parallel=2) == (1, 2)
    with pytest.raises(InvalidValue, match=r"tensor_parallel 1 \(with data_parallel 3\).*another data_parallel"):
        memory_per_gpu(mixture, Layout(data_parallel=3), bytes_per_parameter=1)


def test_no_more_is_offloaded_than_there_are_experts() -> None:
    mixture = dense(ffn_width=0, heads=4, kv_heads=2, moe={"experts": 4, "top_k": 2, "expert_width": 8})
    routed = count_parameters(mixture).routed_experts
    for asked, moved in ((0, 0), (100, 100), (10**9, routed // 2)):
        (gpu,) = memory_per_gpu(mixture, Layout(2), bytes_per_parameter=1, expert_offload_bytes=asked)
        assert gpu.offloaded_bytes == moved
        assert gpu.total_bytes == gpu.weights_bytes - moved


def test_key_heads_are_repeated_when_there_are_more_ranks() -> None:
    four = dense(heads=4, kv_heads=1, ffn_width=8)
    one, spread = (
        memory_per_gpu(four, Layout(n), bytes_per_parameter=1, sequences=1, context_tokens=10)[0] for n in (1, 4)
    )
    assert spread.kv_cache_bytes == one.kv_cache_bytes


@given(st.integers(1, 200), st.integers(1, 64))
def test_stages_share_all_layers(layers: int, pipeline_parallel: int) -> None:
    if pipeline_parallel > layers:
        return
    stages = stage_layers(layers, pipeline_parallel)
    assert sum(stages) == layers
    assert max(stages) - min(stages) <= 1
    assert stages[-1] == min(stages)


@settings(deadline=None)
@given(st.sampled_from([e for e in CATALOG if e.dimensions]), st.integers(1, 4), st.floats(1e9, 2e11))
def test_cache_tokens_fill_the_gpu_and_no_more(entry: ModelEntry, pipeline_parallel: int, gpu_memory: float) -> None:
    assert entry.dimensions is not None
    layout, dimensions = (
        Layout(1, pipeline_parallel),
        entry.dimensions.model_copy(update={"local_layers": (), "local_window_tokens": None}),
    )
    fits = cache_tokens(
        dimensions, layout, bytes_per_parameter=1, gpu_memory_bytes=int(gpu_memory), gpu_memory_utilization=1
    )

    def fullest(tokens: int) -> int:
        stages = memory_per_gpu(dimensions, layout, bytes_per_parameter=1, sequences=1, context_tokens=tokens)
        return max(stage.total_bytes for stage in stages)

    assert fits == 0 or fullest(fits) <= int(gpu_memory)
    assert fullest(fits + 1) > int(gpu_memory)
