"""Quantized weights that were pulled, on real vLLM: it computes what they stand for, or the device is refused them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.serving.tiny_model import make_tiny_model, quantize
from zenray.control.registry.service import pull
from zenray.spec.versions import VersionRef
from zenray.storage.cache import fetch
from zenray.storage.local import LocalStore

pytestmark = [pytest.mark.contract, pytest.mark.nightly]

PROMPTS = [[5, 80, 90, 100, 110, 33, 44], [7, 200, 201, 202]]


FORMAT = "awq-int4"  # of the two the one for which vLLM has a kernel on the CPU


def test_vllm_computes_what_the_packed_weights_stand_for(tmp_path: Path) -> None:
    """From a folder through the store to the engine, beside the same model with the rounded numbers unpacked."""
    make_tiny_model(tmp_path / "plain", hidden=256)
    quantize(tmp_path / "plain", tmp_path / "packed", FORMAT, rounded=tmp_path / "rounded")
    store, folders = LocalStore(tmp_path / "store"), []
    for name, format in (("packed", FORMAT), ("rounded", "safetensors")):
        pull(store, "tiny", str(tmp_path / name), cache_dir=tmp_path / "cache", version="v1", format=format)
        folders.append(fetch(store, VersionRef(model="tiny", version="v1", format=format), tmp_path / "node"))
    packed, rounded = answers(tmp_path, folders)
    for ours, theirs in zip(packed, rounded, strict=True):
        assert ours["prompt_logprobs"] == pytest.approx(theirs["prompt_logprobs"], abs=0.05)


def answers(folder: Path, models: list[Path]) -> list[list[dict[str, Any]]]:
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    command = [sys.executable, "-m", "tests.contract.vllm_answers", str(folder / "prompts.json"), "{}"]
    done = subprocess.run(
        [*command, *map(str, models)],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [line.removeprefix("answers: ") for line in done.stdout.splitlines() if line.startswith("answers: ")]
    return [json.loads(line) for line in lines]
