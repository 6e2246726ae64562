"""Expert LoRA gives PEFT's numbers: output, gradients, merged weights."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from zenray.model.config import MoDEConfig, RouterConfig, uniform_experts
from zenray.model.dispatch import assign_top_k
from zenray.model.expert_lora import LoRAExperts, PeftFactors, add_expert_lora, from_peft, lora_by_kernel, to_peft
from zenray.model.experts import ExpertBank
from zenray.model.network import MoDE

pytestmark = pytest.mark.parity

SHAPE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 24,
}
EXPERTS, RANK, ALPHA = 5, 4, 12


def pair(dtype: torch.dtype = torch.float32) -> tuple[MoDE, torch.nn.Module]:
    """The same weights and adapters in ours and in PEFT's model."""
    torch.manual_seed(0)
    theirs = Qwen3MoeForCausalLM._from_config(
        Qwen3MoeConfig(
            **SHAPE,
            moe_intermediate_size=24,
            num_experts=EXPERTS,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        experts_implementation="eager",
    )
    ours = MoDE(
        MoDEConfig(
            **SHAPE,
            sparse_layers=(0, 1),
            expert_groups=uniform_experts(EXPERTS, 24),
            router=RouterConfig(experts_per_token=2),
            qk_norm=True,
        )
    )
    ours.load_state_dict(theirs.state_dict())
    names = [f"model.layers.{n}.mlp.experts.{part}" for n in (0, 1) for part in ("gate_up_proj", "down_proj")]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=names, lora_dropout=0.0)
    theirs = get_peft_model(theirs, config)
    assert add_expert_lora(ours, RANK, ALPHA) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    for layer in (0, 1):
        adapted = ours.model.layers[layer].mlp.experts
        assert isinstance(adapted, LoRAExperts)
        for part, (a, b) in factors_of(adapted).items():
            with torch.no_grad():
                a.normal_(std=0.3)
                b.normal_(std=0.3)
            peft = to_peft(a.detach(), b.detach())
            weights = peft_parameters(theirs, part, f"layers.{layer}.")
            weights.lora_A.data.copy_(peft.lora_A)
            weights.lora_B.data.copy_(peft.lora_B)
    return ours.to(dtype), theirs.to(dtype)


def factors_of(adapted: LoRAExperts) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {
        "gate_up_proj": (adapted.gate_up_A, adapted.gate_up_B),
        "down_proj": (adapted.down_A, adapted.down_B),
    }


def peft_parameters(model: torch.nn.Module, part: str, within: str = "") -> PeftFactors:
    """PEFT's factors of one parameter, in the module whose name has `within`."""
    found = [
        module
        for name, module in model.named_modules()
        if within in name and getattr(module, "parameter_name", None) == part
    ]
    (wrapper,) = found
    return PeftFactors(wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight)


class StockLayer(torch.nn.Module):
    """transformers' experts alone, for PEFT to wrap."""

    def __init__(self, hidden: int, width: int, experts: int, implementation: str) -> None:
        super().__init__()
        config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=width, num_experts=experts)
        config._experts_implementation = implementation
        self.experts = Qwen3MoeExperts(config)

    def forward(self, x_TD: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        return self.experts(x_TD, experts_TK, weights_TK)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize(("hidden", "width", "experts", "k"), [(32, 24, 5, 2), (64, 48, 8, 2), (64, 32, 64, 8)])
def test_a_layers_output_and_gradients_are_pefts(hidden, width, experts, k, dtype, tolerance):
    """One adapted layer, given input and routing: output, and gradients of input, gate weights and all factors.

    Of each tensor the largest difference, as a share of its largest entry.
    """
    torch.manual_seed(0)
    # transformers' grouped products, which are what is trained with, know no float64.
    theirs = StockLayer(hidden, width, experts, "grouped_mm" if dtype == torch.float32 else "eager")
    bank = ExpertBank(experts, hidden, width)
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    theirs.experts.load_state_dict(bank.state_dict())
    ours = LoRAExperts(bank, RANK, ALPHA).to(dtype)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=names)
    theirs = get_peft_model(theirs, config).to(dtype)
    for part, (a, b) in factors_of(ours).items():
        torch.nn.init.normal_(b, std=0.05)
        for to, value in zip(peft_parameters(theirs, part), to_peft(a.detach(), b.detach()), strict=True):
            to.data.copy_(value)
    x_TD, dy_TD = torch.randn(2, 40, hidden).to(dtype)
    weights_TK, experts_TK = torch.randn(40, experts).softmax(-1).topk(k, dim=-1)

    inputs = [(x_TD.clone().requires_grad_(), weights_TK.to(dtype).requires_grad_()) for _ in range(2)]
    mine = ours(inputs[0][0], assign_top_k(experts_TK, inputs[0][1], experts))
    expected = theirs(inputs[1][0], experts_TK, inputs[1][1])
    mine.backward(dy_TD)
    expected.backward(dy_TD)
    compared = {"output": (mine, expected)}
    for name, one, other in zip(("input", "gate weights"), *inputs, strict=True):
        compared[name] = (one.grad, other.grad)
    for part, (a, b) in factors_of(ours).items():
        peft = peft_parameters(theirs, part)
        for name, one, other in zip("AB", to_peft(a.grad, b.grad), peft, strict=True):
            compared[f"{part}, {name}"] = (one, other.grad)
    for name, (one, other) in compared.items():
        assert other.abs().max() > 0, name
        assert (one - other).abs().max() <= tolerance * other.abs().max(), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 3e-6)])
def test_a_networks_output_and_gradients_are_pefts(dtype, tolerance):
    """Two layers with attention, norms and float32 routers between them, whose rounding is not the adapters'.

    In float32 PEFT's own gradients are up to 4e-6 from its float64 ones, so no more than 3e-6 is asked for there.
    """
    ours, theirs = pair(dtype)
    ids = torch.randint(0, 67, (2, 19))
    logits, expected = ours(ids).logits, theirs(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    logits.logsumexp(-1).sum().backward()
    expected.logsumexp(-1).sum().backward()
    for layer in (0, 1):
        adapted = ours.model.layers[layer].mlp.experts
        for part, (a, b) in factors_of(adapted).items():
            peft = peft_parameters(theirs, part, f"layers.{layer}.")
            for mine, other in zip(to_peft(a.grad, b.grad), peft, strict=True):
                scale = other.grad.abs().max()
                assert scale > 0
                torch.testing.assert_close(mine / scale, other.grad / scale, rtol=0, atol=tolerance)


def test_merged_weights_give_the_same_output_and_pefts_deltas():
    ours, theirs = pair()
    ids = torch.randint(0, 67, (1, 9))
    before = ours(ids).logits
    merged = theirs.merge_and_unload().state_dict()
    for layer in ours.model.layers:
        layer.mlp.experts = layer.mlp.experts.merged()
    torch.testing.assert_close(ours(ids).logits, before, rtol=1e-5, atol=1e-5)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-6)


def test_only_the_adapters_of_experts_are_trained_and_a_fresh_one_changes_nothing():
    torch.manual_seed(0)
    bank = ExpertBank(3, 8, 8)
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter)
    x, rows = torch.randn(6, 8), torch.tensor([2, 0, 4])
    plain = bank.run(x, rows)
    adapted = LoRAExperts(bank, 4, 8)
    torch.testing.assert_close(adapted.run(x, rows), plain)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained == {"gate_up_A", "gate_up_B", "down_A", "down_B"}
    adapted.run(x, rows).sum().backward()
    assert adapted.down_B.grad[1].abs().sum() == 0  # expert 1 had no rows
    assert adapted.down_B.grad[0].abs().sum() > 0


def test_the_loop_is_the_kernel_path():
    torch.manual_seed(0)
    adapted = LoRAExperts(ExpertBank(3, 16, 8), 4, 8)
    for parameter in adapted.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, weight, rows = torch.randn(7, 16), torch.rand(7), torch.tensor([3, 0, 4])
    factors = (adapted.gate_up_A, adapted.gate_up_B, adapted.down_A, adapted.down_B)
    matrices = (adapted.base.gate_up_proj, adapted.base.down_proj)
    results = []
    for by_kernel in (False, True):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        if by_kernel:
            y = lora_by_kernel(inputs[0], inputs[1], *factors, *matrices, adapted.scaling, rows)
        else:
            y = adapted.run(inputs[0], rows, inputs[1])
        results.append([y, *torch.autograd.grad(y.square().sum(), [*inputs, *factors])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_pefts_layout_and_back():
    a, b = torch.randn(3, 4, 5), torch.randn(3, 6, 4)
    back = from_peft(to_peft(a, b), 3)
    assert torch.equal(back[0], a) and torch.equal(back[1], b)
