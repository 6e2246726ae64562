"""Tokens per document of the full vocabulary against smaller ones, on real English and code that was held out.

    python -m benchmarks.tokenizer [--quick] [--base FOLDER]

All of ours are trained by one recipe on the same texts: nine tenths of the files of Python and sympy. They are measured
on the last tenth, and on packages of which nothing was learned. With `--base`, a checkpoint's folder (such as
SmolLM2's, by `zenray models pull smollm2-135m`), that byte-level BPE is measured too, as it is and extended to the full
size. `--quick` learns from Python's files alone, and compares with one smaller vocabulary.
The blog claims 12 % fewer tokens for English and 25 % fewer for code "compared to smaller vocabularies".
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.report import Cell, print_report
from zenray.model.tokenizer.build import BuiltTokenizer, extend, read_base, train
from zenray.model.tokenizer.corpus import (
    DEFAULT_PACKAGES,
    Kind,
    held_out,
    python_version,
    read_packages,
    training_texts,
)
from zenray.model.tokenizer.layout import Layout
from zenray.model.tokenizer.measure import measure
from zenray.storage.progress import transfer_bar

SMALLER = (32_000, 49_152)
FOREIGN = ("numpy", "sqlalchemy", "aiohttp", "pydantic")
CLAIMED: dict[Kind, float] = {"english": -0.12, "code": -0.25}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, help="a folder with the tokenizer.json of a byte-level BPE")
    parser.add_argument("--quick", action="store_true", help="fewer texts, one smaller vocabulary: under a minute")
    options = parser.parse_args()
    smaller = SMALLER[:1] if options.quick else SMALLER
    with transfer_bar() as progress:
        documents = read_packages(("stdlib",) if options.quick else DEFAULT_PACKAGES, progress=progress)
        foreign = read_packages(FOREIGN[-1:] if options.quick else FOREIGN, progress=progress)
    texts = training_texts(documents)
    full = train(texts)
    encoders = {f"ours, {entries:,}": encoder_of(train(texts, Layout(entries=entries))) for entries in smaller}
    encoders[f"ours, {full.counts.entries:,}"] = encoder_of(full)
    pairs = [(f"ours, {entries:,}", f"ours, {full.counts.entries:,}") for entries in smaller]
    notes = [describe("ours", full)]
    if options.base:
        base = read_base(options.base)
        grown = extend(base, texts)
        before, after = f"base, {len(base.ids):,}", f"base extended, {grown.counts.entries:,}"
        encoders |= {before: base.backend(with_control_tokens=False), after: encoder_of(grown)}
        pairs += [(before, after), (before, pairs[0][1])]
        notes.append(describe("base extended", grown))
    samples: dict[tuple[str, Kind], Sequence[str]] = {}
    for kind in CLAIMED:
        samples["held out", kind] = held_out(documents, kind)
        samples["foreign", kind] = [document.text for document in foreign if document.kind == kind]
    report(encoders, pairs, samples, notes)


def encoder_of(built: BuiltTokenizer) -> Tokenizer:
    return built.bpe.backend(with_control_tokens=False)


def describe(name: str, built: BuiltTokenizer) -> str:
    counts = built.counts
    return (
        f"{name}: {counts.learned:,} entries learned (pairs that occur twice), {counts.code} in the code range, "
        f"{counts.control} control tokens, {counts.reserved:,} of {counts.entries:,} reserved"
    )


def report(
    encoders: Mapping[str, Tokenizer],
    pairs: Sequence[tuple[str, str]],
    samples: Mapping[tuple[str, Kind], Sequence[str]],
    notes: Sequence[str],
) -> None:
    rows: list[list[Cell]] = []
    result: dict[str, float] = {}
    verdicts = []
    for (where, kind), texts in samples.items():
        lengths = {name: measure(encoder, texts) for name, encoder in encoders.items()}
        for name, one in lengths.items():
            sizes = [f"{one.tokens_per_document:,.1f}", f"{one.bytes_per_token:.3f}", f"{one.used_entries:,}"]
            rows.append([f"{kind}, {where}", name, f"{one.documents:,}", *sizes])
        for smaller, larger in pairs:
            change = lengths[larger].change_from(lengths[smaller])
            compared = f"{kind}, {where}: {larger} to {smaller}"
            result[re.sub(r"\W+", "_", compared.replace(",", ""))] = round(change, 4)
            verdict = "reached" if change <= CLAIMED[kind] else "missed"
            verdicts.append(f"{compared}: {change:+.1%}; the blog's {CLAIMED[kind]:+.0%} is {verdict}")
    columns = ["text", "vocabulary", "documents", "tokens a document", "bytes a token", "entries used"]
    title = f"Tokens per document, texts of Python {python_version()}"
    print_report(title, columns, rows, result, notes=[*notes, *verdicts])


if __name__ == "__main__":
    main()
