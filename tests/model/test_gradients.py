"""Clipping each expert by itself, and training groups or routers alone."""

import pytest
import torch

from zenray.model.config import ExpertGroup, MoDEConfig
from zenray.model.gradients import clip_expert_gradients, train_only_groups, train_only_routers
from zenray.model.network import MoDE
from zenray.spec.errors import InvalidValue

CONFIG = MoDEConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    sparse_layers=(1,),
    expert_groups=(ExpertGroup("general", 2, 12), ExpertGroup("code", 2, 12), ExpertGroup("math", 1, 20)),
    initializer_range=0.2,
)


def with_gradients() -> MoDE:
    torch.manual_seed(0)
    model = MoDE(CONFIG)
    output = model(torch.randint(0, 32, (4, 16)))
    (output.logits.square().sum() + model.router_loss(output.router_stats)).backward()
    return model


def expert_gradients(model: MoDE) -> list[torch.Tensor]:
    """One flat gradient for each expert, in the router's order."""
    return [
        torch.cat([bank.gate_up_proj.grad[e].flatten(), bank.down_proj.grad[e].flatten()])
        for bank in model.model.layers[1].mlp.experts.banks
        for e in range(bank.num_experts)
    ]


def test_only_experts_above_the_norm_are_scaled_each_to_it():
    plain, model = with_gradients(), with_gradients()
    before = expert_gradients(plain)
    limit = sorted(float(gradient.norm()) for gradient in before)[2]
    norms = torch.cat(list(clip_expert_gradients(model, limit).values()))
    torch.testing.assert_close(norms, torch.stack([gradient.norm() for gradient in before]))
    scaled = 0
    for old, new in zip(before, expert_gradients(model), strict=True):
        factor = min(1.0, limit / float(old.norm()))
        scaled += factor < 1
        torch.testing.assert_close(new, old * factor)
    assert scaled == 2
    for name, parameter in model.named_parameters():
        if "experts" not in name:
            assert torch.equal(parameter.grad, dict(plain.named_parameters())[name].grad)


def test_cut_matrices_are_clipped_as_whole_ones_when_squares_are_summed_over_the_cuts():
    """Two ranks with half of each expert's rows; `reduce` plays the all-reduce."""
    whole = with_gradients()
    halves = [with_gradients(), with_gradients()]
    for rank, half in enumerate(halves):
        for bank in half.model.layers[1].mlp.experts.banks:
            for parameter in bank.parameters():
                parameter.grad[
                    :, (0 if rank else parameter.shape[1] // 2) : (None if not rank else parameter.shape[1] // 2)
                ] = 0
    squares = [clip_expert_gradients(half, float("inf")) for half in halves]
    clip_expert_gradients(whole, 0.5)
    for rank, half in enumerate(halves):
        other = iter(squares[1 - rank].values())
        clip_expert_gradients(half, 0.5, reduce=lambda mine, other=other: mine + next(other).square())
    for mine, one, two in zip(expert_gradients(whole), *map(expert_gradients, halves), strict=True):
        torch.testing.assert_close(one + two, mine)


def changed_by_a_step(model: MoDE) -> set[str]:
    """Names of parameters, and of single experts, that a step of AdamW without weight decay changes."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0)
    output = model(torch.randint(0, 32, (4, 16)))
    output.logits.square().sum().backward()
    optimizer.step()
    changed = set()
    for name, parameter in model.named_parameters():
        if "experts.banks" in name:
            bank = int(name.split("banks.")[1][0])
            changed |= {
                f"expert {bank * 4 + e}"
                for e in range(len(parameter))
                if not torch.equal(parameter[e], before[name][e])
            }
        elif not torch.equal(parameter, before[name]):
            changed.add(name)
    return changed


@pytest.mark.parametrize(("groups", "experts"), [(["code"], {2, 3}), (["math"], {4}), (["general", "math"], {0, 1, 4})])
def test_a_group_is_trained_alone_and_all_else_stays_bit_for_bit(groups, experts):
    torch.manual_seed(0)
    model = MoDE(CONFIG)
    train_only_groups(model, CONFIG, groups)
    assert changed_by_a_step(model) == {f"expert {index}" for index in experts}


def test_routers_are_trained_alone():
    torch.manual_seed(0)
    model = MoDE(CONFIG)
    train_only_routers(model)
    assert changed_by_a_step(model) == {"model.layers.1.mlp.gate.weight"}


def test_an_unknown_or_no_group_is_refused():
    with pytest.raises(InvalidValue, match="Did you mean 'code'"):
        train_only_groups(MoDE(CONFIG), CONFIG, ["coder"])
    with pytest.raises(InvalidValue, match="nothing would be trained"):
        train_only_groups(MoDE(CONFIG), CONFIG, [])
