"""Shapes of networks: what stands in them, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from zenray.spec.dimensions import ModelDimensions, MoeDimensions

DENSE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "layers": 30,
    "heads": 9,
    "kv_heads": 3,
    "head_dim": 64,
    "ffn_width": 1536,
}
MOE: dict[str, Any] = {"experts": 8, "top_k": 2, "expert_width": 64}
DEEP: dict[str, Any] = {"kind": "deep", "experts": 2, "width": 384}


def test_a_dense_model_has_no_sparse_layer() -> None:
    dimensions = ModelDimensions.model_validate(DENSE)
    assert dimensions.sparse_layers == ()
    assert (dimensions.q_width, dimensions.kv_width) == (576, 192)


def test_dense_layers_of_a_mixture() -> None:
    mixed = ModelDimensions.model_validate(DENSE | {"layers": 4, "moe": MOE, "dense_layers": [0, 2]})
    assert mixed.sparse_layers == (1, 3)
    sparse = ModelDimensions.model_validate(DENSE | {"layers": 2, "moe": MOE, "ffn_width": 0})
    assert sparse.sparse_layers == (0, 1)


def test_widths_of_experts() -> None:
    assert MoeDimensions.model_validate(MOE).widths == (64,) * 8
    widths = MoeDimensions.model_validate({"experts": 3, "top_k": 1, "expert_widths": [8, 16, 8]}).widths
    assert widths == (8, 16, 8)
    moe = MoeDimensions.model_validate(MOE | {"blocks": [DEEP, {"kind": "vocabulary", "width": 6}]})
    assert moe.widths == (64,) * 5
    assert (moe.width_of_blocks("deep", "spatial"), moe.width_of_blocks("vocabulary")) == (768, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 2}, "heads 9 is not a multiple of kv_heads 2"),
        ({"head_dim": 63}, "head_dim 63 is odd"),
        ({"ffn_width": 0}, "ffn_width is 0, but there are dense layers"),
        ({"moe": MOE}, "ffn_width 1536 is used by no layer"),
        ({"moe": MOE, "dense_layers": [30]}, r"dense_layers 30…30 is outside 0…29"),
        ({"moe": MOE, "dense_layers": [1, 0]}, "dense_layers must rise and name each layer once"),
        ({"moe": MOE, "dense_layers": [1, 1]}, "dense_layers must rise and name each layer once"),
        ({"dense_layers": [1]}, "dense_layers is only for a model with moe"),
        ({"local_layers": [1]}, "local_layers and local_window_tokens come together"),
        ({"local_window_tokens": 16}, "local_layers and local_window_tokens come together"),
        ({"local_layers": [-1], "local_window_tokens": 16}, r"local_layers -1…-1 is outside"),
        ({"moe": MOE | {"top_k": 9}, "ffn_width": 0}, "top_k 9 is above experts 8"),
        ({"moe": {"experts": 8, "top_k": 2}, "ffn_width": 0}, "either expert_width or expert_widths"),
        ({"moe": MOE | {"expert_widths": [1] * 8}, "ffn_width": 0}, "either expert_width or expert_widths"),
        ({"moe": {"experts": 8, "top_k": 2, "expert_widths": [1]}, "ffn_width": 0}, "1 expert_widths for 8 experts"),
        ({"moe": {"experts": 2, "top_k": 2, "expert_widths": [1, 0]}, "ffn_width": 0}, "must be at least 1, got 0"),
        ({"moe": MOE | {"shared_gate": True}, "ffn_width": 0}, "shared_gate needs a shared expert"),
        ({"moe": MOE | {"blocks": [DEEP | {"experts": 8}]}, "ffn_width": 0}, "8 of 8 experts are blocks"),
        (
            {"moe": {"experts": 3, "top_k": 2, "expert_widths": [1] * 3, "blocks": [DEEP]}, "ffn_width": 0},
            "3 expert_widths for 3 experts, 2 of them blocks",
        ),
        (
            {"moe": MOE | {"blocks": [DEEP | {"width": 64}]}, "ffn_width": 0},
            "deep blocks' width 64 is not a multiple of kv_heads × head_dim, 192",
        ),
        ({"layers": 0}, "greater than or equal to 1"),
        ({"experts": 8}, "Extra inputs"),
    ],
)
def test_a_shape_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelDimensions.model_validate(DENSE | changes)


def test_dimensions_survive_json() -> None:
    dimensions = ModelDimensions.model_validate(DENSE | {"moe": MOE, "dense_layers": list(range(24))})
    assert ModelDimensions.model_validate_json(dimensions.model_dump_json()) == dimensions
    assert hash(dimensions) == hash(ModelDimensions.model_validate(dimensions.model_dump()))
