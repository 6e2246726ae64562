"""Balancing: what the losses are at known loads, that they push the right way, and the metrics' definitions."""

import math

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from zenray.model.balance import (
    RouterStats,
    cv_squared_loss,
    load_report,
    router_loss,
    switch_loss,
    update_selection_bias,
    z_loss,
)
from zenray.model.config import RouterConfig
from zenray.model.router import count, load_of


def stats_of(logits_TE: torch.Tensor, k: int, valid_T: torch.Tensor | None = None) -> RouterStats:
    probs_TE = logits_TE.softmax(-1)
    load_E = load_of(probs_TE.topk(k, dim=-1).indices, logits_TE.shape[1], valid_T)
    return count(logits_TE, probs_TE, load_E, valid_T)


@pytest.mark.parametrize(("experts", "k"), [(8, 1), (8, 2), (16, 4)])
def test_switch_loss_is_one_when_even_and_experts_over_k_when_collapsed(experts, k):
    even = RouterStats(
        torch.full((experts,), 6.0 * k), torch.full((experts,), 6.0), torch.zeros(()), torch.tensor(48.0)
    )
    assert switch_loss(even._replace(num_tokens=torch.tensor(6.0 * experts))) == pytest.approx(1.0)
    load_E = torch.zeros(experts)
    load_E[:k] = 48.0
    prob_E = torch.zeros(experts)
    prob_E[:k] = 48.0 / k
    collapsed = RouterStats(load_E, prob_E, torch.zeros(()), torch.tensor(48.0))
    assert switch_loss(collapsed) == pytest.approx(experts / k)


@pytest.mark.parametrize("padded", [False, True])
def test_switch_loss_is_transformers_divided_by_k(padded):
    logits_TE = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(4, 10)
    if padded:
        valid[1, 6:] = 0
    expected = load_balancing_loss_func((logits_TE,), 8, 3, attention_mask=valid)
    assert switch_loss(stats_of(logits_TE, 3, valid.flatten())) * 3 == pytest.approx(float(expected), rel=1e-5)


def test_global_counts_are_what_one_big_batch_would_give():
    """Micro-batches with summed counts give the big batch's loss and gradient (arXiv 2501.11873)."""
    logits = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    whole = logits.clone().requires_grad_()
    switch_loss(stats_of(whole, 2)).backward()
    parts = logits.clone().requires_grad_()
    stats = [stats_of(half, 2) for half in parts.chunk(2)]
    load_E = stats[0].load_E + stats[1].load_E
    (sum(switch_loss(half, load_E) for half in stats) / 2).backward()
    torch.testing.assert_close(parts.grad, whole.grad)


@pytest.mark.parametrize("kind", ["switch", "cv2"])
def test_descending_the_loss_evens_the_load(kind):
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(256, 16, generator=generator) + 0.5
    weight = (torch.randn(8, 16, generator=generator) * 0.5).requires_grad_()
    config = RouterConfig(balance_loss=kind, balance_coefficient=1.0)
    before = load_report(stats_of(x_TD @ weight.t(), 2).load_E)
    for _ in range(60):
        (gradient,) = torch.autograd.grad(router_loss(stats_of(x_TD @ weight.t(), 2), config), weight)
        weight.data -= 0.5 * gradient
    after = load_report(stats_of(x_TD @ weight.t(), 2).load_E)
    assert after.max_violation < before.max_violation / 2
    assert after.entropy_ratio > before.entropy_ratio


def test_z_loss_is_the_mean_square_of_logsumexp():
    logits_TE = torch.randn(10, 4)
    assert z_loss(stats_of(logits_TE, 1)) == pytest.approx(float(logits_TE.logsumexp(-1).square().mean()))


def test_cv_squared():
    stats = RouterStats(torch.zeros(2), torch.tensor([1.0, 3.0]), torch.zeros(()), torch.tensor(4.0))
    assert cv_squared_loss(stats) == pytest.approx(1 / 4)


def test_selection_bias_moves_towards_the_underloaded():
    bias_E = torch.zeros(3)
    update_selection_bias(bias_E, torch.tensor([5.0, 1.0, 3.0]), rate=0.01)
    assert bias_E.tolist() == pytest.approx([-0.01, 0.01, 0.0])


def test_report_names_the_two_entropies_apart():
    even = load_report(torch.ones(8))
    assert (even.entropy_ratio, even.effective_ratio, even.max_violation) == pytest.approx((1.0, 1.0, 0.0))
    half = load_report(torch.tensor([1.0] * 4 + [0.0] * 4))
    assert half.entropy_ratio == pytest.approx(math.log(4) / math.log(8))
    assert half.effective_ratio == pytest.approx(0.5)
    assert half.max_violation == pytest.approx(1.0)
