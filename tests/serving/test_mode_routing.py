"""What our vLLM model adds to vLLM, without an engine: routing in fixed slots, weights apart, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zenray.model.config import ExpertGroup, MoDEConfig, RouterConfig
from zenray.model.dispatch import Assignment
from zenray.model.experts import DiverseExperts, ExpertBank, make_experts
from zenray.model.router import ExpertChoiceRouter, Router, TokenChoiceRouter
from zenray.serving.mode_vllm.routing import choose, most_takers
from zenray.serving.mode_vllm.weights import for_vllm

CONFIG = MoDEConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=16,
    sparse_layers=(0,),
    expert_groups=(ExpertGroup("a", 2, 8), ExpertGroup("b", 3, 12), ExpertGroup("c", 1, 4)),
    router=RouterConfig(experts_per_token=2),
    initializer_range=0.5,
)


def dense(weights_TW: Tensor, experts_TW: Tensor) -> Tensor:
    """Weight of each expert for each token; each expert at most once for a token."""
    assert all(len(set(row)) == len(row) for row in experts_TW.tolist())
    return torch.zeros(len(weights_TW), 6).scatter_(1, experts_TW, weights_TW)


def routed_by(router: Router, x_TD: Tensor) -> Tensor:
    """The same table, from the router of the network."""
    assignment: Assignment = router.eval()(x_TD)[0]
    expert_R = torch.arange(6).repeat_interleave(assignment.rows_E)
    return torch.zeros(len(x_TD), 6).index_put((assignment.token_R, expert_R), assignment.weight_R.detach())


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("kind", ["top-k", "bias", "threshold"])
def test_slots_say_what_the_network_routes(kind: str, renormalize: bool) -> None:
    torch.manual_seed(0)
    settings = RouterConfig(
        2, renormalize, temperature=1.3, selection_bias=kind == "bias", expert_choice_renormalize=renormalize
    )
    config = replace(CONFIG, router=settings)
    router = ExpertChoiceRouter(config) if kind == "threshold" else TokenChoiceRouter(config)
    torch.nn.init.normal_(router.weight, std=0.5)
    x_TD, slots, state = torch.randn(200, 16), 2, {}
    if kind == "bias":
        router.bias_E.copy_(0.3 * torch.randn(6))
        state = {"bias_E": router.bias_E}
    if kind == "threshold":
        router.cutoff_E.copy_(torch.tensor([0.3, 0.3, 0.2, 0.25, 0.4, 0.5]))
        router.steps.fill_(1)
        slots, state = most_takers(router.cutoff_E), {"cutoff_E": router.cutoff_E}
        assert slots == 3
    expected = routed_by(router, x_TD)
    if kind == "threshold":
        takers = (expected > 0).sum(dim=1)
        assert takers.min() == 0 and takers.max() > 2  # none, and more than top-k would allow
    found = dense(*choose(router.score(x_TD)[1].detach(), slots, renormalize=renormalize, **state))
    torch.testing.assert_close(found, expected)


@given(
    st.lists(st.floats(0, 1, width=32), min_size=2, max_size=12),
    st.integers(0, 2**31),
    st.floats(0.1, 8),
)
def test_no_token_has_more_takers_than_slots(cutoffs: list[float], seed: int, sharpness: float) -> None:
    cutoff_E = torch.tensor(cutoffs)
    generator = torch.Generator().manual_seed(seed)
    logits_TE = sharpness * torch.randn(64, len(cutoffs), generator=generator)
    close_TE = cutoff_E.clamp(min=1e-6).log().expand(8, -1) + 1e-3 * torch.randn(8, len(cutoffs), generator=generator)
    probs_TE = torch.cat([logits_TE, close_TE]).softmax(dim=-1)
    assert (probs_TE > cutoff_E).sum(dim=-1).max() <= most_takers(cutoff_E) <= len(cutoffs)


def test_slots_are_no_more_than_can_be_filled() -> None:
    assert most_takers(torch.tensor([0.5, 0.4, 0.2, 0.3])) == 3  # 0.2 + 0.3 + 0.4 < 1, and not 0.5 more
    assert most_takers(torch.tensor([0.0, 0.0, 0.0])) == 3
    assert most_takers(torch.tensor([1.0, 1.0])) == 1


@pytest.mark.parametrize("widths", [(8, 8, 12, 12, 12, 4), (8, 8, 8, 8, 8, 8)])
def test_each_expert_comes_apart_and_computes_the_same(widths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    groups = tuple(ExpertGroup(str(index), 1, width) for index, width in enumerate(widths))
    experts: ExpertBank | DiverseExperts = make_experts(16, widths)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    named = {f"model.layers.0.mlp.experts.{name}": value.detach() for name, value in experts.named_parameters()}
    apart = dict(for_vllm(named.items(), replace(CONFIG, expert_groups=groups)))
    assert len(apart) == 18
    x_TD = torch.randn(5, 16)
    for expert in range(6):
        gate, up, down = (
            apart[f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down")
        )
        assert gate.shape == up.shape == (max(widths), 16) and down.shape == (16, max(widths))
        found = (torch.nn.functional.silu(x_TD @ gate.T) * (x_TD @ up.T)) @ down.T
        rows_E = torch.tensor([5 if index == expert else 0 for index in range(6)])
        torch.testing.assert_close(found, experts.run(x_TD, rows_E).detach())


def test_the_temperature_goes_into_the_routers_weight_in_float32() -> None:
    weight = torch.randn(6, 16).to(torch.bfloat16)
    config = replace(CONFIG, router=RouterConfig(temperature=2.5))
    given_weights = {"model.layers.0.mlp.gate.weight": weight, "model.norm.weight": weight}
    found = dict(for_vllm(given_weights.items(), config))
    torch.testing.assert_close(found["model.layers.0.mlp.gate.weight"], weight.float() / 2.5)
    assert found["model.norm.weight"] is weight
