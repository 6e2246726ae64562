"""What an evaluation says about experts: which tokens, how it reads, where it lies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from tokenizers import Tokenizer, decoders, models

from tests.training.tiny import CONFIG, write_text, write_version
from zenray.model.attribution import KINDS
from zenray.spec.errors import InvalidValue
from zenray.spec.evaluation import EvaluateJob, EvaluationResult
from zenray.spec.jobs import job_id
from zenray.spec.versions import VersionRef
from zenray.storage.fake import FakeStore
from zenray.storage.versions import publish
from zenray.training.attributing import as_in_text
from zenray.training.evaluate import evaluate
from zenray.training.events import EventPlace, EventStream
from zenray.training.networks import Checkpoint

SEQUENCES, LENGTH = 6, 32


def job(folder: Path, **changes: Any) -> EvaluateJob:
    text = {
        "sources": [{"domain": name, "path": str(path)} for name, path in write_text(folder / "text").items()],
        "sequence_tokens": LENGTH,
        "validation_share": 0.2,
    }
    about = {"kind": "evaluate", "name": "look", "version": {"model": "tiny"}, "text": text, "sequences": SEQUENCES}
    return EvaluateJob.model_validate({**about, "attribution": {"tokens": 20}, **changes})


def run(asked: EvaluateJob, store: FakeStore, folder: Path) -> EvaluationResult:
    with EventStream(store, EventPlace("look"), is_silent=True) as tell:
        return evaluate(asked, store, folder / "work", tell)


def test_an_evaluation_puts_data_and_a_page_beside_its_result(tmp_path: Path) -> None:
    version = write_version(tmp_path / "tiny", seed=3)
    store = FakeStore()
    publish(store, VersionRef(model="tiny", version="v0"), version)
    asked = job(tmp_path)
    found = run(asked, store, tmp_path)
    folder = f"jobs/{job_id(asked)}/attribution/"
    assert found.attribution == f"{store.uri}/{folder}report.html"
    counts = json.loads(store.get_bytes(f"{folder}attribution.json"))
    assert counts["num_tokens"] == 2 * SEQUENCES * LENGTH
    (rows,) = counts["rows"].values()
    assert sum(rows) == 2 * counts["num_tokens"], "two experts for each token"
    tensors = load(store.get_bytes(f"{folder}attribution.safetensors"))
    gate = "model.layers.1.mlp.gate"
    for expert in range(4):
        weights = tensors[f"{gate}.{expert}.weights"]
        assert len(weights) == min(20, rows[expert]) and torch.equal(weights, weights.sort(descending=True).values)
    page = store.get_bytes(f"{folder}report.html").decode()
    assert f"<h2>{gate}</h2>" in page and page.count("hsl(") == 4 * len(KINDS)
    assert page.count("<tr>") == 1 + 4
    without = run(job(tmp_path, attribution=None), store, tmp_path)
    assert without.attribution is None and without.domains == found.domains


def test_a_dense_version_has_nothing_to_attribute(tmp_path: Path) -> None:
    dense = replace(CONFIG, sparse_layers=(), expert_groups=())
    store = FakeStore()
    publish(store, VersionRef(model="tiny", version="v0"), write_version(tmp_path / "tiny", dense))
    with pytest.raises(InvalidValue, match="tiny@v0/safetensors has no experts to look at"):
        run(job(tmp_path), store, tmp_path)
    with pytest.raises(ValueError, match="no text to see experts at work"):
        job(tmp_path, text=None, lm_eval={"tasks": ["arc_easy"]})


def test_tokens_read_as_they_stand_in_text(tmp_path: Path) -> None:
    """Whichever way a tokenizer writes a space; a byte of a longer character is no character."""
    by_bytes = Tokenizer.from_file(str(Checkpoint.open(write_version(tmp_path / "tiny")).tokenizer_file))
    decode = as_in_text(by_bytes)
    assert decode(by_bytes.token_to_id("\u0120")) == " " and decode(by_bytes.token_to_id("\u00e4")) == "\ufffd"
    by_words = Tokenizer(models.WordLevel({"\u2581the": 0, "ing": 1}, unk_token="ing"))
    by_words.decoder = decoders.Metaspace()
    assert [as_in_text(by_words)(token) for token in (0, 1)] == [" the", "ing"]
