"""Our network with the weights of transformers' Qwen3-MoE, Mixtral, Llama and Qwen2: their logits and gradients."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from zenray.model.config import MoDEConfig, RopeParameters, RouterConfig, uniform_experts
from zenray.model.network import MoDE

pytestmark = pytest.mark.parity

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def assert_same(ours: MoDE, theirs: torch.nn.Module, *, tolerance: float = 1e-5) -> None:
    """Same parameters, then logits, loss and every gradient equal, relative to their size."""
    theirs.eval()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(0, SHAPE["vocab_size"], (3, 23), generator=torch.Generator().manual_seed(7))
    expected = theirs(input_ids=ids, labels=ids)
    logits = ours(ids).logits
    torch.testing.assert_close(logits, expected.logits, rtol=tolerance, atol=tolerance)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected.loss, rtol=tolerance, atol=tolerance)
    loss.backward()
    expected.loss.backward()
    reference = dict(theirs.named_parameters())
    compared = 0
    for name, parameter in ours.named_parameters():
        scale = reference[name].grad.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(parameter.grad / scale, reference[name].grad / scale, rtol=0, atol=tolerance)
        compared += 1
    assert compared == len(reference)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_qwen3_moe(renormalize, implementation):
    torch.manual_seed(0)
    theirs = Qwen3MoeForCausalLM._from_config(
        Qwen3MoeConfig(
            **SHAPE,
            intermediate_size=96,
            head_dim=24,
            moe_intermediate_size=40,
            num_experts=6,
            num_experts_per_tok=3,
            norm_topk_prob=renormalize,
            mlp_only_layers=[1],
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        experts_implementation=implementation,
    )
    ours = MoDE(
        MoDEConfig(
            **SHAPE,
            intermediate_size=96,
            head_dim=24,
            sparse_layers=(0, 2),
            expert_groups=uniform_experts(6, 40),
            router=RouterConfig(experts_per_token=3, renormalize=renormalize),
            qk_norm=True,
            rope_parameters=RopeParameters(rope_theta=1e6),
        )
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("window", [None, 5])
def test_mixtral(window):
    torch.manual_seed(0)
    theirs = MixtralForCausalLM(
        MixtralConfig(**SHAPE, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, sliding_window=window)
    )
    ours = MoDE(
        MoDEConfig(
            **SHAPE,
            intermediate_size=48,
            head_dim=16,
            sparse_layers=(0, 1, 2),
            expert_groups=uniform_experts(4, 48),
            rms_norm_eps=1e-5,
            rope_parameters=RopeParameters(rope_theta=1e6),
            sliding_window=window,
            local_layers=(0, 1, 2) if window else (),
        )
    )
    assert_same(ours, theirs)


def test_qwen2_moe_with_its_gated_shared_expert():
    torch.manual_seed(0)
    theirs = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SHAPE,
            intermediate_size=96,
            moe_intermediate_size=40,
            shared_expert_intermediate_size=56,
            num_experts=6,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            mlp_only_layers=[0],
        )
    )
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    ours = MoDE(
        MoDEConfig(
            **SHAPE,
            intermediate_size=96,
            head_dim=16,
            sparse_layers=(1, 2),
            expert_groups=uniform_experts(6, 40),
            router=RouterConfig(experts_per_token=2, renormalize=False),
            shared_expert_width=56,
            shared_expert_gate=True,
            attention_bias=True,
        )
    )
    assert_same(ours, theirs)


def test_llama_with_tied_head_is_the_dense_case():
    torch.manual_seed(0)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    theirs = LlamaForCausalLM(
        LlamaConfig(**SHAPE, intermediate_size=96, tie_word_embeddings=True, rope_parameters=rope)
    )
    ours = MoDE(
        MoDEConfig(
            **SHAPE,
            intermediate_size=96,
            head_dim=16,
            tie_word_embeddings=True,
            rope_parameters=RopeParameters(**rope),
        )
    )
    assert_same(ours, theirs)


def test_qwen2_with_biased_projections():
    torch.manual_seed(0)
    theirs = Qwen2ForCausalLM(Qwen2Config(**SHAPE, intermediate_size=96))
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    ours = MoDE(MoDEConfig(**SHAPE, intermediate_size=96, head_dim=16, attention_bias=True))
    assert_same(ours, theirs)
