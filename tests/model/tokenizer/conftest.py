"""A small base as others make it, and small tokenizers trained and extended here: full recipe, few entries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from zenray.model.tokenizer import bpe, build, corpus
from zenray.model.tokenizer.build import BuiltTokenizer, extend, train
from zenray.model.tokenizer.layout import Layout

LAYOUT = Layout(entries=4000, code_entries=300, control_entries=40)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [Path(module.__file__).read_text(encoding="utf-8") for module in (bpe, build, corpus)]


@pytest.fixture(scope="session")
def base() -> bpe.ByteLevelBPE:
    """GPT-2's rule of cutting, digits one by one, two special tokens in front, some bytes missing: like SmolLM2's."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bare.decoder = decoders.ByteLevel()
    alphabet = [letter for byte, letter in enumerate(bpe.byte_letters()) if byte < 0xC0]
    bare.train_from_iterator(
        [Path(build.__file__).read_text(encoding="utf-8")[:3000]],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>", "<|im_end|>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    bare.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    return bpe.read_document(json.loads(bare.to_str()))


@pytest.fixture(scope="session")
def encoders(trained: BuiltTokenizer, extended: BuiltTokenizer) -> list[Tokenizer]:
    """Both, with control tokens and without."""
    return [one.bpe.backend(with_control_tokens=which) for one in (trained, extended) for which in (True, False)]


@pytest.fixture(scope="session")
def trained(texts: list[str]) -> BuiltTokenizer:
    return train(texts, LAYOUT)


@pytest.fixture(scope="session")
def extended(base: bpe.ByteLevelBPE, texts: list[str]) -> BuiltTokenizer:
    return extend(base, texts, LAYOUT)
