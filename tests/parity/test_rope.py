"""Rotary frequencies against transformers' own, for every kind of scaling."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from zenray.model.config import RopeParameters
from zenray.model.rope import inverse_frequencies

pytestmark = pytest.mark.parity


def reference(rope: dict, head_dim: int) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(hidden_size=head_dim * 2, num_attention_heads=2, head_dim=head_dim, rope_parameters=dict(rope))
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))


@given(
    head_dim=st.sampled_from([4, 16, 64, 128]),
    theta=st.sampled_from([1e4, 5e5, 1e6, 1e7]),
    factor=st.floats(1.0, 64.0),
    context=st.sampled_from([512, 4096, 32768, 262144]),
    attention_factor=st.one_of(st.none(), st.floats(0.5, 2.0)),
)
def test_yarn(head_dim, theta, factor, context, attention_factor):
    rope = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": context,
        "attention_factor": attention_factor,
    }
    expected, expected_factor = reference(rope, head_dim)
    frequencies, scale = inverse_frequencies(RopeParameters(**rope), head_dim)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert scale == pytest.approx(expected_factor)


def test_zen4_ultra_reaches_a_million_tokens_by_a_factor_of_four():
    rope = RopeParameters(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=262_144)
    frequencies, scale = inverse_frequencies(rope, 128)
    plain, _ = inverse_frequencies(RopeParameters(rope_theta=1e6), 128)
    assert torch.equal(frequencies[:8], plain[:8])  # the fastest pairs are kept
    torch.testing.assert_close(frequencies[-1], plain[-1] / 4)  # the slowest are slowed by the factor
    assert scale == pytest.approx(1.1386, abs=1e-4)


@pytest.mark.parametrize("head_dim", [16, 128])
def test_llama3(head_dim):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected, _ = reference(rope, head_dim)
    torch.testing.assert_close(inverse_frequencies(RopeParameters(**rope), head_dim)[0], expected, rtol=2e-5, atol=0)


def test_linear():
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
    expected, _ = reference(rope, 32)
    torch.testing.assert_close(inverse_frequencies(RopeParameters(**rope), 32)[0], expected)
