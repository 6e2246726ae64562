"""What every expert of an evaluated version works on, as data and as a page to read, beside the evaluation's result."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from zenray.model.attribution import Attribution, report
from zenray.model.network import MoDE
from zenray.spec.errors import InvalidValue
from zenray.storage.base import ObjectStore
from zenray.storage.job_record import attribution_prefix

PAGE_NAME = "report.html"


def start_attribution(model: MoDE, version: str, keep: int) -> Attribution:
    """Watches the model's routers. InvalidValue for a model that has none."""
    attribution = Attribution(model, keep=keep)
    if not attribution.routers:
        raise InvalidValue(f"{version} has no experts to look at.", hint="Take `attribution` out of the job.")
    return attribution


def write_attribution(attribution: Attribution, tokenizer: Tokenizer, store: ObjectStore, job: str) -> str:
    """Put the data and the page into the store, and say where the page is. `job`: the evaluation's id. Idempotent."""
    with tempfile.TemporaryDirectory() as scratch:
        attribution.save(Path(scratch))
        Path(scratch, PAGE_NAME).write_text(report(attribution, as_in_text(tokenizer)), encoding="utf-8")
        for file in sorted(Path(scratch).iterdir()):
            store.put_bytes(attribution_prefix(job) + file.name, file.read_bytes())
    return f"{store.uri}/{attribution_prefix(job)}{PAGE_NAME}"


def as_in_text(tokenizer: Tokenizer) -> Callable[[int], str]:
    """A token as it stands in text. The space before a word belongs to it, though some decoders leave out the first."""

    def decode(token: int) -> str:
        text = str(tokenizer.decode([token], skip_special_tokens=False))
        begins_word = (tokenizer.id_to_token(token) or "").startswith("▁")
        return f" {text}" if begins_word and not text.startswith(" ") else text

    return decode
