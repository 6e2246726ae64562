"""Attribution: exactly the strongest tokens of each expert, whatever the batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from zenray.model.attribution import Attribution, StrongestTokens, kind_of, kind_shares, report
from zenray.model.config import MoDEConfig, RouterConfig, uniform_experts
from zenray.model.dispatch import Assignment
from zenray.model.network import MoDE

CONFIG = MoDEConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    sparse_layers=(0, 1),
    expert_groups=uniform_experts(4, 8),
    router=RouterConfig(experts_per_token=2, renormalize=False),
    initializer_range=0.3,
)
IDS = torch.randint(0, 50, (12, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> MoDE:
    torch.manual_seed(0)
    return MoDE(CONFIG).eval()


def collect(model: MoDE, batch: int, keep: int) -> Attribution:
    attribution = Attribution(model, keep=keep)
    for ids in IDS.split(batch):
        with attribution.watch(ids), torch.no_grad():
            model(ids)
    return attribution


@settings(deadline=None, max_examples=15)
@given(batch=st.integers(1, 12), keep=st.integers(1, 200))
def test_streaming_keeps_exactly_the_strongest(model, batch, keep):
    streamed, whole = collect(model, batch, keep), collect(model, 12, 10_000)
    for name, layer in whole.layers.items():
        assert sum(layer.seen) == 12 * 10 * 2
        for expert in range(4):
            assert len(layer.weights[expert]) == layer.seen[expert]  # nothing was dropped from the reference
            weights = streamed.layers[name].weights[expert]
            torch.testing.assert_close(weights, layer.weights[expert][:keep], rtol=0, atol=1e-6)
            positions = streamed.layers[name].positions[expert]
            assert torch.equal(streamed.layers[name].tokens[expert], IDS.flatten()[positions])


def test_the_weights_are_the_routers(model):
    attribution = collect(model, 12, 5)
    inputs = []
    gate = model.model.layers[0].mlp.gate
    handle = gate.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model(IDS)
    handle.remove()
    probabilities = gate.score(inputs[0])[1]
    strongest = attribution.layers["model.layers.0.mlp.gate"]
    for expert in range(4):
        found = probabilities[strongest.positions[expert], expert]
        torch.testing.assert_close(found, strongest.weights[expert], rtol=1e-5, atol=1e-6)


def test_of_equal_weights_the_earlier_stay():
    kept = StrongestTokens(1, keep=3)
    for batch, weights in enumerate(([0.5, 0.25], [0.5, 0.5, 0.125], [0.5, 0.75], [0.25])):
        rows = len(weights)
        rows_R = torch.arange(rows)
        assignment = Assignment(rows_R, torch.tensor(weights), torch.tensor([rows]))
        kept.add(assignment, rows_R + 10 * batch, rows_R + 100 * batch, torch.ones(rows, dtype=torch.bool))
    assert kept.weights[0].tolist() == [0.75, 0.5, 0.5]
    assert kept.positions[0].tolist() == [201, 0, 100] and kept.tokens[0].tolist() == [21, 0, 10]
    assert kept.seen == [8]


def test_padding_is_left_out(model):
    attribution = Attribution(model)
    valid = torch.ones_like(IDS, dtype=torch.bool)
    valid[:, 6:] = False
    with attribution.watch(IDS, valid):
        model(IDS, valid_BS=valid)
    for layer in attribution.layers.values():
        assert sum(layer.seen) == 12 * 6 * 2
        assert all((positions % 10 < 6).all() for positions in layer.positions)


def test_saved_and_reported(model, tmp_path):
    attribution = collect(model, 4, 7)
    attribution.save(tmp_path)
    tensors = load_file(tmp_path / "attribution.safetensors")
    layer = attribution.layers["model.layers.1.mlp.gate"]
    assert torch.equal(tensors["model.layers.1.mlp.gate.2.tokens"], layer.tokens[2])
    texts = ["<b>", " the", "7", " ", "слово", " word", "ing", "."]
    page = report(attribution, lambda token: texts[token % len(texts)])
    assert page.count("<tr>") == 2 * (1 + 4)
    assert "&lt;b&gt;" in page and "<b>" not in page
    for shares in kind_shares(layer, lambda token: texts[token % len(texts)]):
        assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("  \n", "whitespace"),
        (" 42", "number"),
        (" {", "code"),
        (",", "punctuation"),
        (" The", "function word"),
        (" слово", "other script"),
        (b"\xe4\xb8".decode(errors="replace"), "part of a character"),
        ("(\ufffd", "part of a character"),
        ("ing", "word piece"),
        (" mountain", "word"),
    ],
)
def test_kinds(text, kind):
    assert kind_of(text) == kind
