"""Properties of the network that hold for every configuration."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.strategies import configs
from zenray.catalog.accounting import count_parameters
from zenray.model.balance import RouterStats
from zenray.model.config import ExpertGroup, MoDEConfig, RouterConfig
from zenray.model.dispatch import Assignment
from zenray.model.network import MoDE
from zenray.model.router import ExpertChoiceRouter, Router


def build(config: MoDEConfig, seed: int = 0) -> MoDE:
    """A network whose weights are large enough for routing to differ between tokens."""
    torch.manual_seed(seed)
    return MoDE(replace(config, initializer_range=0.2))


def tokens(config: MoDEConfig, batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


class Seen(NamedTuple):
    logits: torch.Tensor  # (B, S, V)
    choices: list[torch.Tensor]  # (B, S, E) of bool for each sparse layer: which experts compute which token


def seen(model: MoDE, ids: torch.Tensor) -> Seen:
    """One forward pass, and what the routers decided in it."""
    choices = []

    def note(router: Router, inputs: tuple[torch.Tensor, ...], output: tuple[Assignment, RouterStats]) -> None:
        assignment = output[0]
        expert_R = torch.arange(len(assignment.rows_E)).repeat_interleave(assignment.rows_E)
        chosen_TE = torch.zeros(ids.numel(), len(assignment.rows_E), dtype=torch.bool)
        chosen_TE[assignment.token_R, expert_R] = True
        choices.append(chosen_TE.view(*ids.shape, -1))

    hooks = [router.register_forward_hook(note) for router in model.model.routers()]
    with torch.no_grad():
        logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    return Seen(logits, choices)


def seen_with_other_later_tokens(model: MoDE, cut: int) -> tuple[Seen, Seen]:
    """Two batches that are the same before position `cut`, and nowhere from there on."""
    ids = tokens(model.config, 2, 9)
    changed = ids.clone()
    changed[:, cut:] = (changed[:, cut:] + 1) % model.config.vocab_size
    return seen(model, ids), seen(model, changed)


def give_routers_a_past(model: MoDE) -> None:
    """Thresholds and selection biases as training leaves them: not zero."""
    generator = torch.Generator().manual_seed(2)
    for router in model.model.routers():
        if isinstance(router, ExpertChoiceRouter):
            router.cutoff_E.copy_(torch.rand(router.cutoff_E.shape, generator=generator) * 2 / len(router.cutoff_E))
            router.steps.fill_(7)
        elif router.bias_E is not None:
            router.bias_E.copy_(torch.randn(router.bias_E.shape, generator=generator) * 0.1)


@settings(max_examples=60, deadline=None)
@given(configs())
def test_every_legal_configuration_builds_runs_and_trains(config):
    model = build(config)
    output = model(tokens(config, 2, 9))
    assert output.logits.shape == (2, 9, config.vocab_size)
    assert len(output.router_stats) == len(config.sparse_layers)
    for layer, stats in zip(config.sparse_layers, output.router_stats, strict=True):
        if layer not in config.expert_choice_layers:
            assert stats.load_E.sum() == 2 * 9 * config.router.experts_per_token
    (output.logits.square().mean() + model.router_loss(output.router_stats)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@settings(max_examples=60, deadline=None)
@given(configs(), st.integers(1, 8), st.booleans())
def test_later_tokens_change_nothing_before_them(config, cut, learnt):
    """Choices: the same. Logits: apart by at most 1e-6 of the largest one, the largest being 1 to 5 here.

    All that can differ is rounding: an expert that has one row, and with other later tokens several, multiplies in
    another order of summation (docs/experiments.md). Nineteen networks of twenty give the same bits.
    """
    model = build(config).eval()
    if learnt:
        give_routers_a_past(model)
    before, after = seen_with_other_later_tokens(model, cut)
    for one, other in zip(before.choices, after.choices, strict=True):
        assert torch.equal(one[:, :cut], other[:, :cut])
    assert (before.logits - after.logits)[:, :cut].abs().max() <= 1e-6 * before.logits[:, :cut].abs().max()
    assert not torch.equal(before.logits[:, cut:], after.logits[:, cut:])


@pytest.mark.parametrize("routing", ["token choice", "selection bias", "thresholds", "thresholds not yet learnt"])
def test_in_float64_later_tokens_change_less_than_1e_12(routing):
    """The same network, and so the same statement, where rounding is too small to hide a dependence."""
    thresholds = routing.startswith("thresholds")
    config = MoDEConfig(
        vocab_size=40, hidden_size=32, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sparse_layers=(0, 1, 2), expert_choice_layers=(0, 1) if thresholds else (),
        expert_groups=(ExpertGroup("general", 3, 8), ExpertGroup("code", 2, 16), ExpertGroup("deep", 1, 16, "deep")),
        router=RouterConfig(selection_bias=routing == "selection bias"), shared_expert_width=8,
    )  # fmt: skip
    model = build(config).to(torch.float64).eval()
    if routing != "thresholds not yet learnt":
        give_routers_a_past(model)
    for cut in range(1, 9):
        before, after = seen_with_other_later_tokens(model, cut)
        for one, other in zip(before.choices, after.choices, strict=True):
            assert torch.equal(one[:, :cut], other[:, :cut])
        assert (before.logits - after.logits)[:, :cut].abs().max() <= 1e-12


@settings(max_examples=40, deadline=None)
@given(configs(), st.integers(1, 4))
def test_padding_changes_neither_outputs_nor_balance(config, padding):
    model = build(config).eval()
    ids = tokens(config, 2, 6)
    padded = torch.cat([ids, tokens(config, 2, padding, seed=3)], dim=1)
    valid = torch.ones_like(padded, dtype=torch.bool)
    valid[:, 6:] = False
    with torch.no_grad():
        plain, with_padding = model(ids), model(padded, valid_BS=valid)
    torch.testing.assert_close(plain.logits, with_padding.logits[:, :6], rtol=0, atol=1e-5)
    for one, other in zip(plain.router_stats, with_padding.router_stats, strict=True):
        assert torch.equal(one.load_E, other.load_E) and one.num_tokens == other.num_tokens
        torch.testing.assert_close(one.prob_sum_E, other.prob_sum_E, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(configs())
def test_gradient_checkpointing_is_on_in_training_and_changes_no_gradient(config):
    model = build(config).train()
    assert model.model.gradient_checkpointing
    ids = tokens(config, 2, 7)
    gradients = []
    for recompute in (True, False):
        model.model.gradient_checkpointing = recompute
        model.zero_grad()
        output = model(ids)
        (output.logits.logsumexp(-1).mean() + model.router_loss(output.router_stats)).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_experts_of_different_widths_equal_each_expert_on_its_own():
    config = MoDEConfig(
        vocab_size=16,
        hidden_size=24,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        sparse_layers=(0,),
        expert_groups=(ExpertGroup("general", 2, 8), ExpertGroup("code", 3, 20), ExpertGroup("math", 1, 8)),
        router=RouterConfig(experts_per_token=3),
    )
    layer = build(config).model.layers[0].mlp
    x_TD = torch.randn(1, 11, 24)
    y_TD = layer(x_TD)[0][0]
    banks = layer.experts.banks
    assert [bank.width for bank in banks] == [8, 20, 8]
    weights = [(bank.gate_up_proj[e], bank.down_proj[e]) for bank in banks for e in range(bank.num_experts)]
    probabilities = torch.softmax(x_TD[0] @ layer.gate.weight.t(), dim=-1)
    for token in range(11):
        chosen = probabilities[token].topk(3)
        expected = torch.zeros(24)
        for weight, expert in zip(chosen.values / chosen.values.sum(), chosen.indices, strict=True):
            gate_up, down = weights[expert]
            gate, up = (gate_up @ x_TD[0, token]).chunk(2)
            expected += weight * (down @ (torch.nn.functional.silu(gate) * up))
        torch.testing.assert_close(y_TD[token], expected, rtol=1e-5, atol=1e-6)


def test_router_works_in_float32_under_a_bfloat16_model():
    config = MoDEConfig(
        vocab_size=16, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, sparse_layers=(0,), expert_groups=(ExpertGroup("general", 4, 8),),
    )  # fmt: skip
    model = build(config).to(torch.bfloat16)
    output = model(tokens(config, 2, 5))
    assert output.logits.dtype == torch.bfloat16
    assert output.router_stats[0].prob_sum_E.dtype == torch.float32
    gate = model.model.layers[0].mlp.gate
    x_TD = torch.randn(5, 16, dtype=torch.bfloat16)
    assignment, _ = gate(x_TD)
    expected = torch.softmax(x_TD.float() @ gate.weight.float().t(), dim=-1).topk(2).values
    expected = expected / expected.sum(-1, keepdim=True)
    assert torch.equal(assignment.weight_R[assignment.slot_TK], expected)


@settings(max_examples=60, deadline=None)
@given(configs())
def test_the_catalog_counts_every_parameter_that_is_built(config):
    with torch.device("meta"):
        model = MoDE(config)
    assert count_parameters(config.dimensions()).total == sum(parameter.numel() for parameter in model.parameters())
