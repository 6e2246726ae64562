"""Impossible combinations are refused, with the numbers; legal ones survive JSON."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    ({"vocab_size": 31.5}, "vocab_size is 31.5", ""),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0", ""),
    ({"initializer_range": -0.02}, "initializer_range is -0.02", ""),
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
    ({"shared_expert_width": 8.0}, "shared_expert_width is 8.0: it must be a whole number", ""),
    ({"local_layers": (0,), "sliding_window": 2.5}, "sliding_window is 2.5: it must be a whole number", ""),
    ({"sparse_layers": (1, 2.5)}, "has [2.5], but layers go from 0 to 3", ""),
    (
        {"expert_choice_layers": (1, 3), "router": RouterConfig(selection_bias=True)},
        "selection_bias would do nothing: experts choose in all 2 sparse layers",
        "even by construction",
    ),
    (
        {
            "expert_choice_layers": (1, 3),
            "router": RouterConfig(capacity_factor=1.0),
            "shared_expert_width": 8,
        },
        "capacity_factor would do nothing",
        "",
    ),
]


@pytest.mark.parametrize(("change", "message", "hint"), ILLEGAL)
def test_refusal_says_the_numbers_and_the_way_out(change, message, hint):
    with pytest.raises(InvalidValue) as caught:
        replace(LEGAL, **change)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")
    assert caught.value.param


def rope(rope_type, **changes):
    return RopeParameters(rope_type=rope_type, factor=4.0, original_max_position_embeddings=8, **changes)


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
        (lambda: RopeParameters(rope_theta=0.0), r"rope_theta is 0\.0"),
        (lambda: rope("yarn", beta_fast=1.0), r"beta_fast 1\.0 must be above beta_slow 1\.0"),
        (lambda: rope("llama3", low_freq_factor=4.0), r"high_freq_factor 4\.0 must be above low_freq_factor 4\.0"),
        (lambda: ExpertGroup("code", 1, 8, "dep"), "Did you mean 'deep'?"),
        (lambda: ExpertGroup("image", 1, 8, "spatial", radius=-1), "radius of expert group 'image' is -1"),
        (lambda: ExpertGroup("code", 0, 8), "num_experts of expert group 'code' is 0"),
        (lambda: ExpertGroup("code", 1, 0), "width of expert group 'code' is 0"),
        (lambda: ExpertGroup("code", 1, 8.5), "width of expert group 'code' is 8.5: it must be a whole number"),
        (lambda: RouterConfig(experts_per_token=2.5), "experts_per_token is 2.5: it must be a whole number"),
        (lambda: RouterConfig(temperature="hot"), "temperature is hot: it must be a number"),
        (lambda: RopeParameters(original_max_position_embeddings=-8), "original_max_position_embeddings is -8"),
        (lambda: rope("yarn", rope_theta=1.0), "rope_theta is 1.0: it must be above 1"),
        (lambda: rope("yarn", attention_factor=0.0), "attention_factor is 0.0"),
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


@given(configs())
def test_a_shape_gives_the_network_back(config):
    """All that a shape says. Group names, positions and the rules of routing it does not."""
    made = MoDEConfig.from_dimensions(config.dimensions())
    assert made.dimensions() == config.dimensions()
    assert (made.expert_widths, made.sparse_layers) == (config.expert_widths, config.sparse_layers)


def test_a_shape_with_a_bias_that_the_network_lacks_is_refused_by_its_name():
    biased = LEGAL.dimensions().model_copy(update={"o_bias": True})
    with pytest.raises(InvalidValue, match="o_bias is set"):
        MoDEConfig.from_dimensions(biased)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 4}, "'hiden_size' in the model's configuration. Did you mean 'hidden_size'?"),
        ({"router": {"temprature": 2.0}}, "'temprature' in router. Did you mean 'temperature'?"),
        ({"rope_parameters": {"rope_teta": 1e4}}, "'rope_teta' in rope_parameters. Did you mean 'rope_theta'?"),
        (
            {"expert_groups": [{"name": "a", "experts": 4, "width": 8}]},
            "'experts' in an expert group. Did you mean 'num_experts'?",
        ),
        ({"expert_groups": [{"name": "a", "width": 8}]}, "The field 'num_experts' is missing in an expert group."),
    ],
)
def test_unknown_and_missing_fields_are_refused_by_name_with_the_nearest(change, message):
    with pytest.raises(InvalidValue) as caught:
        MoDEConfig.from_dict({**LEGAL.to_dict(), **change})
    assert message in str(caught.value)
    assert caught.value.param


@settings(deadline=None)
@given(configs(), st.data())
def test_any_legal_configuration_made_illegal_is_refused_with_the_reason(config, data):
    """One thing is broken at a time; the message names the field or the numbers."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    breaks = {
        "vocab_size": 0,
        "hidden_size": -1,
        "intermediate_size": 0,
        "num_hidden_layers": 0,
        "num_attention_heads": 0,
        "max_position_embeddings": 0,
        "rms_norm_eps": 0.0,
        "initializer_range": -1.0,
        "head_dim": config.head_dim + 1,
        "num_key_value_heads": heads + 1,
        "sparse_layers": (*config.sparse_layers, layers),
        "local_layers": (*config.local_layers, layers + 3),
        "sliding_window": 0 if config.local_layers else 4,
        "expert_choice_layers": (*config.expert_choice_layers, layers),
        "shared_expert_width": -1,
    }
    if config.sparse_layers:  # else nothing is routed
        breaks["router"] = replace(config.router, experts_per_token=config.num_experts + 1)
    name = data.draw(st.sampled_from(sorted(breaks)))
    with pytest.raises(InvalidValue) as caught:
        replace(config, **{name: breaks[name]})
    assert any(character.isdigit() for character in caught.value.message)
    assert caught.value.param


PART_BREAKS = {
    RouterConfig: {
        "experts_per_token": [0, 1.5],
        "temperature": [0.0, -1.0, math.nan, math.inf],
        "balance_coefficient": [-0.1],
        "z_coefficient": [-1e-3],
        "capacity_factor": [0.0, -1.0],
        "threshold_warmup_steps": [0, 0.5],
        "threshold_decay": [-0.1, 1.0],
    },
    RopeParameters: {
        "rope_theta": [0.0, -1.0, math.nan],
        "factor": [0.5, -4.0],
        "original_max_position_embeddings": [0, -1, 4.5],
        "attention_factor": [0.0],
        "beta_fast": [0.0],
        "low_freq_factor": [-1.0],
    },
    ExpertGroup: {"num_experts": [0, 2.5], "width": [0, 1.5], "radius": [-1, 0.5]},
}


@settings(deadline=None)
@given(configs(), st.data())
def test_any_part_made_illegal_is_refused_with_the_reason(config, data):
    """As above, within the router, the positions and a group: on their own, and in a config.json."""
    parts = [config.router, config.rope_parameters, *config.expert_groups]
    part = data.draw(st.sampled_from(parts))
    name = data.draw(st.sampled_from(sorted(PART_BREAKS[type(part)])))
    value = data.draw(st.sampled_from(PART_BREAKS[type(part)][name]))
    with pytest.raises(InvalidValue, match=f"{name}.* is {value}".replace(".", r"\.").replace(r"\.*", ".*")) as caught:
        replace(part, **{name: value})
    assert caught.value.param
    written = json.loads(json.dumps(config.to_dict()))
    places = [written["router"], written["rope_parameters"], *written["expert_groups"]]
    places[parts.index(part)][name] = value
    with pytest.raises(InvalidValue, match=name):
        MoDEConfig.from_dict(written)
