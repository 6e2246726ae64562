"""Packed weights are kept as they are, if they are whole and packed as it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serving.tiny_model import make_tiny_model, quantize
from zenray.control.registry.service import QUANTIZED_FORMATS
from zenray.model.checkpoints.convert import convert
from zenray.model.checkpoints.quantized import PACKINGS
from zenray.spec.errors import InvalidDocument, InvalidValue


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "tiny"
    make_tiny_model(folder)
    return folder


def test_the_registry_knows_these_formats() -> None:
    """By name: it imports no torch."""
    assert set(PACKINGS) == set(QUANTIZED_FORMATS)


@pytest.fixture(params=sorted(PACKINGS))
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def packed(plain: Path, format: str, tmp_path: Path) -> Path:
    quantize(plain, tmp_path / "packed", format)
    return tmp_path / "packed"


def refused(source: Path, format: str) -> str:
    target = source.parent / "made"
    with pytest.raises(InvalidDocument) as error:
        convert(source, target, format=format)
    assert not target.exists()
    return str(error.value)


def edited(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        del tensors[name]
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_they_are_kept_to_the_byte(plain: Path, packed: Path, format: str, tmp_path: Path) -> None:
    report = convert(packed, tmp_path / "made", format=format)
    assert (tmp_path / "made" / "model.safetensors").read_bytes() == (packed / "model.safetensors").read_bytes()
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == format.split("-")[0]
    assert (tmp_path / "made" / "tokenizer.json").is_file()
    assert report.parameters == convert(plain, tmp_path / "whole").parameters  # of the model, not of its words


def test_without_the_format_they_are_refused_and_it_is_named(packed: Path) -> None:
    assert "--format awq-int4 or gptq-int8" in refused(packed, "safetensors")


def test_another_format_than_they_have_is_refused(plain: Path, packed: Path, format: str) -> None:
    (other,) = set(PACKINGS) - {format}
    assert f"and {other} is" in refused(packed, other)
    assert "the weights are not quantized" in refused(plain, format)


def test_what_is_missing_or_wrong_is_named(packed: Path, format: str) -> None:
    scales = "model.layers.1.mlp.down_proj.scales"
    edited(packed, **{scales: torch.zeros(3, 64, dtype=torch.float16)})
    assert f"{scales} is [3, 64], its config says [2, 64]" in refused(packed, format)
    edited(packed, **{scales: None})
    assert f"tensors are missing: {scales}" in refused(packed, format)
    whole = (packed / "model.safetensors").read_bytes()
    (packed / "model.safetensors").write_bytes(whole[:-10])
    assert "cut short" in refused(packed, format)


def test_words_that_are_no_words_are_refused(packed: Path, format: str) -> None:
    name = "model.layers.0.self_attn.q_proj.qweight"
    words = load_file(packed / "model.safetensors")[name]
    edited(packed, **{name: words.float()})
    assert f"{name} (F32)" in refused(packed, format)


def test_an_unknown_format_lists_the_known_ones(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="awq-int4"):
        convert(plain, tmp_path / "made", format="awq-int3")
