"""Who chooses whom: token choice, expert choice and its causal threshold, capacity and its fallback."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zenray.model.capacity import expert_capacity
from zenray.model.config import ExpertGroup, MoDEConfig, RouterConfig
from zenray.model.feed_forward import MixtureOfExperts
from zenray.model.network import MoDE, initialize
from zenray.model.router import ExpertChoiceRouter, TokenChoiceRouter

CONFIG = MoDEConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    sparse_layers=(0, 1),
    expert_groups=(ExpertGroup("general", 4, 12),),
    router=RouterConfig(experts_per_token=2),
    expert_choice_layers=(0, 1),
    initializer_range=0.3,
)


def with_router(config: MoDEConfig = CONFIG, **changes) -> MoDEConfig:
    return replace(config, router=replace(config.router, **changes))


def trained(config: MoDEConfig, steps: int = 3) -> MoDE:
    """A network whose thresholds have seen a few batches."""
    torch.manual_seed(0)
    model = MoDE(config).train()
    for _ in range(steps):
        output = model(torch.randint(0, config.vocab_size, (4, 32)))
        model.model.after_step(output.router_stats)
    return model


def logits_before_and_after(model: MoDE, cut: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits before position `cut`, for two batches that differ from there on."""
    ids = torch.randint(0, CONFIG.vocab_size, (2, 24), generator=torch.Generator().manual_seed(5))
    changed = ids.clone()
    changed[:, cut:] = (changed[:, cut:] + 7) % CONFIG.vocab_size
    with torch.no_grad():
        return model(ids).logits[:, :cut], model(changed).logits[:, :cut]


@pytest.mark.parametrize("training_choice", ["threshold", "expert_choice"])
def test_inference_is_causal_whatever_was_trained(training_choice):
    before, after = logits_before_and_after(trained(with_router(expert_choice_training=training_choice)).eval())
    torch.testing.assert_close(before, after, rtol=0, atol=1e-6)


def test_thresholds_are_causal_in_training_too_and_expert_choice_is_not():
    model = trained(with_router(threshold_warmup_steps=3))  # its warm-up has just ended
    torch.testing.assert_close(*logits_before_and_after(model), rtol=0, atol=1e-6)
    model = trained(with_router(expert_choice_training="expert_choice"))
    before, after = logits_before_and_after(model)
    assert (before - after).abs().max() > 1e-3


def test_experts_that_choose_take_the_same_number_of_tokens_each():
    model = trained(with_router(expert_choice_training="expert_choice"))
    stats = model(torch.randint(0, 40, (2, 20))).router_stats
    assert all(layer.load_E.tolist() == [20.0] * 4 for layer in stats)  # 40 tokens · 2 / 4
    assert model.router_loss(stats) == 0  # even by construction: nothing to push


def test_thresholds_learn_the_cut_off_and_give_about_the_load_of_expert_choice():
    torch.manual_seed(0)
    router = ExpertChoiceRouter(with_router(threshold_decay=0.5))
    initialize(router, 0.5)
    router.train()
    for _ in range(30):
        _, stats = router(torch.randn(2048, 16))
        router.after_step(stats)
    router.eval()
    _, stats = router(torch.randn(8192, 16))
    torch.testing.assert_close(stats.load_E / 8192, torch.full((4,), 0.5), rtol=0, atol=0.03)
    torch.testing.assert_close(router.cutoff_E, stats.cutoff_E, rtol=0, atol=0.02)


def test_a_forward_pass_alone_changes_no_router():
    """Gradient checkpointing runs it twice, and must route the same both times."""
    model = trained(CONFIG)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randint(0, 40, (2, 8))).logits.sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("experts_choose", [True, False])
def test_what_is_learnt_without_gradients_is_float32_in_a_bfloat16_network(experts_choose):
    """bfloat16 knows no number between 1 and 1.0078, and a bias learns by 0.001."""
    config = CONFIG if experts_choose else replace(CONFIG, expert_choice_layers=())
    config = with_router(config, selection_bias=not experts_choose)
    model = trained(config)
    learnt = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert any((buffer != buffer.bfloat16()).any() for buffer in learnt.values())
    for name, buffer in model.to(torch.bfloat16).named_buffers():
        assert torch.equal(buffer, learnt[name]) and buffer.dtype == learnt[name].dtype, name
    assert model.model.layers[0].mlp.gate.weight.dtype == torch.bfloat16
    assert all(buffer.device.type == "meta" for buffer in model.to("meta").buffers())


def test_before_any_training_tokens_choose():
    torch.manual_seed(0)
    experts, tokens = ExpertChoiceRouter(CONFIG).eval(), TokenChoiceRouter(CONFIG).eval()
    initialize(experts, 0.5)
    tokens.weight = experts.weight
    x_TD = torch.randn(30, 16)
    assert torch.equal(experts(x_TD)[1].load_E, tokens(x_TD)[1].load_E)


def test_a_token_that_no_expert_wants_passes_by():
    layer = MixtureOfExperts(CONFIG, experts_choose=True).eval()
    initialize(layer, 0.5)
    layer.gate.steps += 1
    layer.gate.cutoff_E.fill_(1.0)  # a probability is never above it
    y_BSD, stats = layer(torch.randn(1, 5, 16))
    assert y_BSD.abs().max() == 0 and stats.load_E.sum() == 0


@pytest.mark.parametrize("training_choice", ["threshold", "expert_choice"])
def test_a_token_that_one_expert_takes_still_teaches_its_router(training_choice):
    """Weights are the plain probabilities, as in the paper: with a sum of 1, that token's would always be 1."""
    torch.manual_seed(0)
    plain, evened = (
        ExpertChoiceRouter(with_router(expert_choice_training=training_choice, expert_choice_renormalize=renormalize))
        for renormalize in (False, True)
    )
    initialize(plain, 0.5)
    evened.load_state_dict(plain.state_dict())
    x_TD = torch.randn(30, 16)
    for router in (plain, evened):
        assignment, _ = router.train()(x_TD)
        alone_R = (torch.bincount(assignment.token_R, minlength=30) == 1)[assignment.token_R]
        assert alone_R.any()
        assignment.weight_R[alone_R].sum().backward()
    expert_R = torch.arange(4).repeat_interleave(assignment.rows_E)
    probs_TE = plain.score(x_TD)[1]
    torch.testing.assert_close(plain(x_TD)[0].weight_R, probs_TE[assignment.token_R, expert_R])
    assert plain.weight.grad.abs().max() > 1e-2 > 1e-6 > evened.weight.grad.abs().max()


def test_selection_bias_evens_the_load_and_leaves_the_weights_alone():
    torch.manual_seed(0)
    config = with_router(replace(CONFIG, expert_choice_layers=()), selection_bias=True, balance_loss="none")
    router = TokenChoiceRouter(config).train()
    initialize(router, 0.1)
    x_TD = torch.randn(512, 16) + 1.0
    first = None
    for _ in range(800):
        _, stats = router(x_TD)
        first = stats.load_E if first is None else first
        router.after_step(stats)
    assert (stats.load_E.max() - stats.load_E.min()) < (first.max() - first.min()) / 4
    probs_TE = router.score(x_TD)[1]
    weights_TK, experts_TK = router.choose(probs_TE)
    plain = probs_TE.gather(1, experts_TK)
    torch.testing.assert_close(weights_TK, plain / plain.sum(-1, keepdim=True))


@pytest.mark.parametrize("renormalize", [True, False])
def test_temperature_divides_the_logits(renormalize):
    torch.manual_seed(0)
    config = with_router(replace(CONFIG, expert_choice_layers=()), temperature=2.5, renormalize=renormalize)
    router = TokenChoiceRouter(config)
    initialize(router, 1.0)
    x_TD = torch.randn(20, 16)
    assignment, _ = router(x_TD)
    expected = torch.softmax(x_TD @ router.weight.t() / 2.5, dim=-1).topk(2).values
    if renormalize:
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(assignment.weight_R[assignment.slot_TK], expected)


CAPACITY = replace(CONFIG, expert_choice_layers=(), shared_expert_width=8)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([0.25, 0.5, 1.0, 4.0]), st.integers(0, 10), st.integers(0, 1000))
def test_capacity_keeps_the_first_and_hands_the_rest_to_the_shared_expert(factor, padding, seed):
    """Against the definition, token by token; padding takes no room."""
    torch.manual_seed(seed)
    layer = MixtureOfExperts(with_router(CAPACITY, capacity_factor=factor)).train()
    initialize(layer, 0.5)
    x_TD = torch.randn(20, 16)
    valid_T = torch.arange(20) < 20 - padding
    y_TD, stats = layer(x_TD[None], valid_T[None])
    capacity = expert_capacity(int(valid_T.sum()), 2, 4, factor)
    probs_TE = torch.softmax(x_TD @ layer.gate.weight.t(), dim=-1)
    used, overflow, fallback_tokens = [0] * 4, [0] * 4, 0
    for token in range(20 - padding):
        top = probs_TE[token].topk(2)
        expected, lost = torch.zeros(16), 0.0
        for weight, expert in zip(top.values / top.values.sum(), top.indices.tolist(), strict=True):
            if used[expert] < capacity:
                used[expert] += 1
                gate, up = (layer.experts.gate_up_proj[expert] @ x_TD[token]).chunk(2)
                expected += weight * (layer.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
            else:
                overflow[expert] += 1
                lost += float(weight.detach())
        expected += (1 + lost) * layer.shared_expert(x_TD[token])
        fallback_tokens += lost > 0
        torch.testing.assert_close(y_TD[0, token], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y_TD[0, ~valid_T], layer.shared_expert(x_TD[~valid_T]))  # its experts are not asked
    assert stats.overflow_E.tolist() == overflow
    assert stats.fallback_tokens == fallback_tokens
    assert stats.load_E.sum() == 2 * (20 - padding)  # what the router wanted, which is what balancing is about


def test_inference_knows_no_capacity():
    torch.manual_seed(0)
    limited = MixtureOfExperts(with_router(CAPACITY, capacity_factor=0.25))
    initialize(limited, 0.5)
    free = MixtureOfExperts(CAPACITY)
    free.load_state_dict(limited.state_dict())
    x_BSD = torch.randn(2, 20, 16)
    assert not torch.allclose(limited.train()(x_BSD)[0], free.train()(x_BSD)[0])
    assert torch.equal(limited.eval()(x_BSD)[0], free.eval()(x_BSD)[0])
