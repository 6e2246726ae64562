"""Clipping each expert by itself: in banks of several widths, in domain blocks, and where workers hold parts."""

import torch

from tests.model.whole_gradients import expert_gradients
from zenray.model.config import ExpertGroup, MoDEConfig
from zenray.model.gradients import ExpertGradient, clip_expert_gradients, expert_squares
from zenray.model.network import MoDE

CONFIG = MoDEConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    sparse_layers=(1,),
    expert_groups=(
        ExpertGroup("general", 2, 12),
        ExpertGroup("code", 2, 12),
        ExpertGroup("math", 1, 20),
        ExpertGroup("reason", 2, 16, "deep"),
        ExpertGroup("language", 1, 6, "vocabulary"),
    ),
    initializer_range=0.2,
)


def with_gradients() -> MoDE:
    torch.manual_seed(0)
    model = MoDE(CONFIG)
    output = model(torch.randint(0, 32, (4, 16)))
    (output.logits.square().sum() + model.router_loss(output.router_stats)).backward()
    return model


def of_each_expert(model: MoDE) -> list[torch.Tensor]:
    """One flat gradient for each expert, in the router's order."""
    layer = model.model.layers[1].mlp
    in_banks = [
        torch.cat([bank.gate_up_proj.grad[e].flatten(), bank.down_proj.grad[e].flatten()])
        for bank in layer.experts.banks
        for e in range(bank.num_experts)
    ]
    return in_banks + [torch.cat([weight.grad.flatten() for weight in block.parameters()]) for block in layer.blocks]


def clip(gradients: list[ExpertGradient], max_norm: float) -> torch.Tensor:
    """The norms before, in the router's order."""
    squares = expert_squares(gradients)
    clip_expert_gradients(gradients, squares, max_norm)
    return torch.cat(list(squares.values())).sqrt()


def test_only_experts_above_the_norm_are_scaled_each_to_it() -> None:
    plain, model = with_gradients(), with_gradients()
    before = of_each_expert(plain)
    limit = sorted(float(gradient.norm()) for gradient in before)[4]
    gradients = expert_gradients(model)
    squares = expert_squares(gradients)
    norms = torch.cat(list(squares.values())).sqrt()
    torch.testing.assert_close(norms.float(), torch.stack([gradient.norm() for gradient in before]))
    after = clip_expert_gradients(gradients, squares, limit)
    torch.testing.assert_close(torch.cat(list(after.values())).sqrt(), norms.clamp(max=limit))
    scaled = 0
    for old, new in zip(before, of_each_expert(model), strict=True):
        factor = min(1.0, limit / float(old.norm()))
        scaled += factor < 1
        torch.testing.assert_close(new, old * factor)
    assert scaled == 3
    for name, parameter in model.named_parameters():
        if "experts" not in name and "blocks" not in name:
            assert torch.equal(parameter.grad, dict(plain.named_parameters())[name].grad)


def test_parts_are_clipped_as_the_whole_is_when_their_squares_are_added_up() -> None:
    """Two workers: each has half of the rows of each expert of the first bank, and some experts of the others."""
    whole, shared = expert_gradients(with_gradients()), expert_gradients(with_gradients())
    clip(whole, 0.5)
    workers: list[list[ExpertGradient]] = [[], []]
    for bank, experts, here, values in shared:
        for worker, mine in enumerate(workers):
            if bank.endswith("banks.0"):
                mine.append(ExpertGradient(bank, experts, here, values.chunk(2, dim=1)[worker]))
            else:  # a single expert is the first worker's; the second has none, and says so
                mine.append(ExpertGradient(bank, experts, slice(0, 1 - worker), values[: 1 - worker]))
    squares = [expert_squares(mine) for mine in workers]
    total = {bank: sum(one[bank] for one in squares) for bank in squares[0]}
    for mine in workers:
        clip_expert_gradients(mine, total, 0.5)  # in the memory of `shared`
    for expected, found in zip(whole, shared, strict=True):
        torch.testing.assert_close(found.values_F, expected.values_F)
