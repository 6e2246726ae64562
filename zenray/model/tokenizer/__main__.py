"""`python -m zenray.model.tokenizer train OUTPUT | extend BASE OUTPUT | measure FOLDER …`: make one, or compare some.

Texts come from installed Python packages (`--package`, several times; stdlib and sympy unless named): nine tenths of
their files are learned from, the rest is measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from zenray.model.tokenizer.corpus import DEFAULT_PACKAGES, Document, held_out, read_packages, training_texts
from zenray.spec.errors import ZenrayError
from zenray.storage.progress import transfer_bar


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when all is made and said; 1 with the error on stderr."""
    parser = argparse.ArgumentParser(prog="python -m zenray.model.tokenizer", description=__doc__)
    corpus = argparse.ArgumentParser(add_help=False)
    corpus.add_argument("--package", action="append", help="stdlib or an installed package; may be given again")
    making = argparse.ArgumentParser(add_help=False)
    making.add_argument("--entries", type=int, default=151_936, help="exactly so many entries (default 151,936)")
    making.add_argument("--min-count", type=int, default=2, help="a pair must occur so often to be learned (default 2)")
    verbs = parser.add_subparsers(dest="verb", required=True)
    trained = verbs.add_parser("train", parents=[corpus, making], help="learn a vocabulary from bytes on")
    trained.add_argument("output", type=Path, help="the folder to make")
    extended = verbs.add_parser("extend", parents=[corpus, making], help="add entries to a byte-level BPE")
    extended.add_argument("base", type=Path, help="a checkpoint's folder, or its tokenizer.json")
    extended.add_argument("output", type=Path, help="the folder to make")
    measured = verbs.add_parser("measure", parents=[corpus], help="tokens per document, on what is held out")
    measured.add_argument(
        "folders", type=Path, nargs="+", help="folders with a tokenizer.json; the first is compared with"
    )
    options = parser.parse_args(arguments)
    try:
        if options.verb == "measure":
            _measure(options)
        else:
            _make(options)
    except ZenrayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _read(options: argparse.Namespace) -> list[Document]:
    with transfer_bar() as progress:
        return read_packages(options.package or DEFAULT_PACKAGES, progress=progress)


def _make(options: argparse.Namespace) -> None:
    from zenray.model.tokenizer.build import extend, read_base, train  # imports transformers
    from zenray.model.tokenizer.layout import Layout

    layout = Layout(entries=options.entries)
    base = read_base(options.base) if options.verb == "extend" else None
    texts = training_texts(_read(options))
    show = sys.stderr.isatty()
    if base is None:
        built = train(texts, layout, min_count=options.min_count, show_progress=show)
    else:
        built = extend(base, texts, layout, min_count=options.min_count, show_progress=show)
    built.save(options.output)
    counts = built.counts
    print(f"learned from {len(texts):,} documents, {sum(map(len, texts)) / 1e6:,.1f} million characters")
    print(
        f"{counts.entries:,} entries: {counts.base:,} of the base, {counts.bytes:,} bytes it lacked, "
        f"{counts.learned:,} learned, {counts.code:,} in the code range, {counts.control:,} control tokens, "
        f"{counts.reserved:,} reserved"
    )
    print(f"saved in {options.output}")


def _measure(options: argparse.Namespace) -> None:
    from zenray.model.tokenizer.build import read_base  # imports transformers
    from zenray.model.tokenizer.measure import measure

    encoders = {folder: read_base(folder).backend(with_control_tokens=False) for folder in options.folders}
    documents = _read(options)
    table = Table(title="Tokens per document on held-out text", title_justify="left", pad_edge=False)
    for column in ("vocabulary", "text"):
        table.add_column(column)
    for column in ("documents", "tokens a document", "bytes a token", "to the first"):
        table.add_column(column, justify="right")
    for kind in ("english", "code"):
        texts = held_out(documents, kind)
        if not texts:
            continue
        first = None
        for folder, encoder in encoders.items():
            length = measure(encoder, texts)
            first = first or length
            table.add_row(
                str(folder),
                kind,
                f"{length.documents:,}",
                f"{length.tokens_per_document:,.1f}",
                f"{length.bytes_per_token:.3f}",
                f"{length.change_from(first):+.1%}",
            )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    sys.exit(main())
