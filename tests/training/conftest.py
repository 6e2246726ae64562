"""The little that tests of the loop train on: text, a network's version, and the text's tokens."""

from pathlib import Path

import pytest

from tests.training.tiny import job, write_text, write_version
from zenray.training.data.tokens import prepare
from zenray.training.networks import Checkpoint


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_version(tmp_path_factory.mktemp("base") / "v0"))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, text: dict[str, Path], base: Checkpoint):
    data = job(text).data
    return prepare(data, base.tokenizer_file, base.end_token, 0, tmp_path_factory.mktemp("tokens"))
