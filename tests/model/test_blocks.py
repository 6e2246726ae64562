"""Experts of other kinds: what they compute, that only their output is gated, and that the cache serves them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zenray.model.blocks import BlockContext, SpatialBlock
from zenray.model.config import ExpertGroup, MoDEConfig, RouterConfig
from zenray.model.hf import ZenModeConfig, ZenModeForCausalLM
from zenray.model.hf.export import choose_target
from zenray.model.network import MoDE
from zenray.spec.errors import InvalidValue

GROUPS = (
    ExpertGroup("code", 2, 12),
    ExpertGroup("reason", 1, 32, "deep"),
    ExpertGroup("language", 1, 6, "vocabulary"),
    ExpertGroup("vision", 1, 16, "spatial"),
)
CONFIG = MoDEConfig(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sparse_layers=(1,),
    expert_groups=GROUPS,
    router=RouterConfig(experts_per_token=2),
    initializer_range=0.3,
)


def network(config: MoDEConfig = CONFIG) -> MoDE:
    torch.manual_seed(0)
    return MoDE(config).eval()


def observe(model: MoDE, ids: torch.Tensor, grid: torch.Tensor | None = None):
    """Input, context and output of the sparse layer."""
    seen: dict = {}
    layer = model.model.layers[1].mlp
    before = layer.register_forward_pre_hook(lambda _, given: seen.update(x_BSD=given[0], context=given[2]))
    after = layer.register_forward_hook(lambda _, __, output: seen.update(y_BSD=output[0]))
    with torch.no_grad():
        model(ids, grid_BS2=grid)
    before.remove()
    after.remove()
    return seen["x_BSD"], seen["context"], seen["y_BSD"]


def test_the_output_is_each_tokens_two_experts_of_whatever_kind():
    model = network()
    layer = model.model.layers[1].mlp
    ids = torch.randint(0, 48, (2, 9))
    x_BSD, context, y_BSD = observe(model, ids)
    with torch.no_grad():
        blocks = [block(x_BSD, context) for block in layer.blocks]
        top = torch.softmax(x_BSD @ layer.gate.weight.t(), dim=-1).topk(2)
    used = set()
    for b in range(2):
        for s in range(9):
            expected = torch.zeros(16)
            weights = top.values[b, s] / top.values[b, s].sum()
            for weight, expert in zip(weights, top.indices[b, s].tolist(), strict=True):
                used.add(expert)
                if expert < 2:
                    gate, up = (layer.experts.gate_up_proj[expert] @ x_BSD[b, s]).chunk(2)
                    expert_out = layer.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                else:
                    expert_out = blocks[expert - 2][b, s]
                expected = expected + weight * expert_out
            torch.testing.assert_close(y_BSD[b, s], expected, rtol=1e-4, atol=1e-5)
    assert used == set(range(5))


def test_a_deep_expert_is_one_more_hop_over_the_layers_own_keys_and_values():
    model = network()
    ids = torch.randint(0, 48, (1, 7))
    x_BSD, context, _ = observe(model, ids)
    block = model.model.layers[1].mlp.blocks[0]
    q = block.q_proj(x_BSD)[0].view(7, 4, 8)
    cos, sin = (table[0] for table in context.rotary)
    expected = torch.zeros(7, 4, 8)
    for s in range(7):
        for head in range(4):
            half = torch.cat([-q[s, head, 4:], q[s, head, :4]])
            query = q[s, head] * cos[s] + half * sin[s]
            scores = context.keys_BNLC[0, head // 2, : s + 1] @ query / 8**0.5
            expected[s, head] = scores.softmax(0) @ context.values_BNLC[0, head // 2, : s + 1]
    torch.testing.assert_close(block(x_BSD, context)[0], block.o_proj(expected.flatten(1)), rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.data(), st.integers(0, 2), st.integers(1, 8), st.integers(0, 4))
def test_a_spatial_expert_sees_earlier_neighbours_on_the_grid_and_itself(data, radius, length, past):
    block = SpatialBlock(CONFIG, replace(GROUPS[3], radius=radius))
    total = past + length
    place = st.one_of(st.just((-1, -1)), st.tuples(st.integers(0, 4), st.integers(0, 4)))
    places = data.draw(st.lists(place, min_size=total, max_size=total))
    near = block.neighbours(length, total, torch.tensor([places]), torch.device("cpu"))
    for query in range(length):
        here = places[past + query]
        for key, there in enumerate(places):
            close = max(abs(here[0] - there[0]), abs(here[1] - there[1])) <= radius
            on_grid = here[0] >= 0 and there[0] >= 0
            expected = key == past + query or (key <= past + query and close and on_grid)
            assert bool(near[0, 0, query, key]) == expected


def test_a_far_patch_does_not_reach_a_spatial_expert():
    model = network()
    grid = torch.tensor([[(row, column) for row in range(3) for column in range(3)]])
    x_BSD, context, _ = observe(model, torch.randint(0, 48, (1, 9)), grid)
    block = model.model.layers[1].mlp.blocks[2]
    before = block(x_BSD, context)[0, 8]  # the patch at (2, 2); (0, 0) is two away
    keys, values = context.keys_BNLC.clone(), context.values_BNLC.clone()
    keys[:, :, 0], values[:, :, 0] = 9.0, 9.0
    assert torch.equal(block(x_BSD, context._replace(keys_BNLC=keys, values_BNLC=values))[0, 8], before)
    values[:, :, 4] = 9.0  # (1, 1) is a neighbour
    assert not torch.equal(block(x_BSD, context._replace(values_BNLC=values))[0, 8], before)
    with pytest.raises(InvalidValue, match="grid has 9 positions, but there are 12"):
        block.neighbours(3, 12, grid, torch.device("cpu"))


@pytest.mark.parametrize("with_grid", [False, True])
def test_generation_with_a_cache_equals_recomputing(with_grid):
    torch.manual_seed(0)
    model = ZenModeForCausalLM(ZenModeConfig.from_mode(CONFIG)).eval()
    ids = torch.randint(0, 48, (2, 6))
    extra = {}
    if with_grid:
        extra["grid_positions"] = torch.tensor([[(0, 0), (0, 1), (1, 0), (1, 1), (-1, -1), (-1, -1)]] * 2)
    cached = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, **extra)
    for _ in range(12):
        ids = torch.cat([ids, model(ids, use_cache=False, **extra).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, ids)


def test_eager_attention_means_the_same():
    """transformers then adds its mask to scores, where it is a choice otherwise."""
    torch.manual_seed(0)
    model = ZenModeForCausalLM(ZenModeConfig.from_mode(CONFIG)).eval()
    ids, mask = torch.randint(0, 48, (2, 6)), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    given = {"attention_mask": mask, "grid_positions": torch.tensor([[(i // 3, i % 3) for i in range(6)]] * 2)}
    one = model(ids, **given).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids, **given).logits[mask.bool()], one[mask.bool()])


def test_later_tokens_change_nothing_before_them():
    model = network()
    ids = torch.randint(0, 48, (1, 12))
    grid = torch.stack([torch.arange(12) // 4, torch.arange(12) % 4], dim=-1)[None]
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 5) % 48
    with torch.no_grad():
        one, other = model(ids, grid_BS2=grid).logits, model(changed, grid_BS2=grid).logits
    torch.testing.assert_close(one[:, :7], other[:, :7], rtol=0, atol=1e-6)


def test_a_vocabulary_expert_needs_token_ids():
    block = network().model.layers[1].mlp.blocks[1]
    context = BlockContext(torch.empty(0), torch.empty(0), (torch.empty(0), torch.empty(0)), None, None, None)
    with pytest.raises(InvalidValue, match="needs token ids"):
        block(torch.zeros(1, 2, 16), context)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"expert_groups": (GROUPS[1], GROUPS[0])},
            "are deep, feed_forward: at least one feed_forward group comes first",
        ),
        ({"expert_groups": GROUPS[1:]}, "at least one feed_forward group"),
        ({"expert_groups": (GROUPS[0], ExpertGroup("reason", 1, 24, "deep"))}, "24, which is not a multiple of 16"),
        ({"local_layers": (1,), "sliding_window": 4}, r"layers \[1\] are sparse and local"),
    ],
)
def test_impossible_blocks_are_refused(change, message):
    with pytest.raises(InvalidValue, match=message):
        replace(CONFIG, **change)


def test_no_stock_class_says_them():
    with pytest.raises(InvalidValue, match="3 experts that are not feed-forward"):
        choose_target(CONFIG)
    with pytest.raises(InvalidValue, match="Did you mean 'deep'"):
        ExpertGroup("reason", 1, 16, "dep")
