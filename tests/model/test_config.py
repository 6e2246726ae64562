"""Impossible combinations are refused, with the numbers; legal ones survive JSON."""

import json
from dataclasses import replace

import pytest
from hypothesis import given

from tests.model.strategies import configs
from zenray.model.config import ExpertGroup, MoDEConfig, RopeParameters, RouterConfig, uniform_experts
from zenray.spec.errors import InvalidValue

LEGAL = MoDEConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    sparse_layers=(1, 3),
    expert_groups=(ExpertGroup("general", 3, 8), ExpertGroup("code", 2, 16)),
)

ILLEGAL = [
    ({"num_key_value_heads": 4}, "6 attention heads cannot share 4 key/value heads", "1, 2, 3, 6"),
    ({"head_dim": 7}, "head_dim is 7", ""),
    ({"hidden_size": 0}, "hidden_size is 0", ""),
    ({"sparse_layers": (1, 4)}, "has [4], but layers go from 0 to 3", ""),
    ({"sparse_layers": (3, 1)}, "ascending", ""),
    ({"sparse_layers": ()}, "There are 5 experts", "Name the sparse layers, 0 to 3"),
    ({"expert_groups": ()}, "2 layers are sparse, but there are no experts", ""),
    ({"expert_groups": (*uniform_experts(1, 8), *uniform_experts(2, 8))}, "names repeat: general, general", ""),
    ({"router": RouterConfig(experts_per_token=6)}, "Each token takes 6 experts, but a layer has only 5", "at most 5"),
    ({"local_layers": (0,)}, "Layers [0] are local, but sliding_window is None", "in tokens"),
    ({"sliding_window": 8}, "no layer is local", ""),
    ({"expert_choice_layers": (0, 1)}, "layers [0], which are dense", "Sparse layers: [1, 3]"),
    ({"router": RouterConfig(capacity_factor=1.0)}, "no expert to fall back to", "shared_expert_width"),
    ({"shared_expert_gate": True}, "shared_expert_width is 0", ""),
    ({"shared_expert_width": -1}, "shared_expert_width is -1", ""),
]


@pytest.mark.parametrize(("change", "message", "hint"), ILLEGAL)
def test_refusal_says_the_numbers_and_the_way_out(change, message, hint):
    with pytest.raises(InvalidValue) as caught:
        replace(LEGAL, **change)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")
    assert caught.value.param


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RouterConfig(experts_per_token=0), "experts_per_token is 0"),
        (lambda: RouterConfig(temperature=0.0), "temperature is 0.0"),
        (lambda: RouterConfig(balance_loss="swich"), "Did you mean 'switch'?"),
        (lambda: RouterConfig(capacity_factor=0.0), r"capacity_factor is 0\.0"),
        (lambda: RouterConfig(threshold_decay=1.0), r"threshold_decay is 1\.0"),
        (lambda: RouterConfig(threshold_warmup_steps=0), "threshold_warmup_steps is 0"),
        (lambda: RouterConfig(expert_choice_training="tresholds"), "Did you mean 'threshold'"),
        (lambda: RouterConfig(z_coefficient=-1.0), "z_coefficient is -1.0"),
        (lambda: RopeParameters(rope_type="yarnn"), "Did you mean 'yarn'?"),
        (lambda: RopeParameters(rope_type="yarn", factor=4.0), "original_max_position_embeddings"),
        (lambda: RopeParameters(factor=0.5), "factor is 0.5"),
        (lambda: ExpertGroup("code", 0, 8), "'code' has 0 experts"),
        (lambda: ExpertGroup("code", 1, 0), "'code' has width 0"),
    ],
)
def test_parts_refuse_too(make, message):
    with pytest.raises(InvalidValue, match=message.replace("?", r"\?")):
        make()


def test_groups_name_ranges_of_experts():
    assert LEGAL.num_experts == 5
    assert LEGAL.expert_widths == (8, 8, 8, 16, 16)
    assert LEGAL.group_range("code") == range(3, 5)
    with pytest.raises(InvalidValue, match="Did you mean 'code'"):
        LEGAL.group_range("cod")


@given(configs())
def test_json_round_trip(config):
    assert MoDEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_field_is_refused_with_the_nearest():
    with pytest.raises(InvalidValue, match="Did you mean 'hidden_size'"):
        MoDEConfig.from_dict({**LEGAL.to_dict(), "hiden_size": 4})
