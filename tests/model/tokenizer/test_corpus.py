"""Texts from packages, what is held out of them, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zenray.model.tokenizer.__main__ import main
from zenray.model.tokenizer.bpe import from_bytes
from zenray.model.tokenizer.corpus import docstring_prose, held_out, read_packages, training_texts
from zenray.model.tokenizer.measure import measure
from zenray.spec.errors import NotFound

PROSE = '''"""First line.

Some prose that goes on.

>>> 1 + 1
2

And on.
"""
def f():
    "Says f."
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forty files of code, some copies of one another, and one that is not text."""
    root = tmp_path / "made_for_zenray"
    (root / "tests").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    for number in range(40):
        text = (
            f'"""{f"Module {number} says what it is for. " * 20}"""\n\ndef function_{number}():\n    return {number}\n'
        )
        (root / f"m{number}.py").write_text(text)
        (root / "tests" / f"m{number}.py").write_text(text)
        (root / f"copy{number}.py").write_text(text)
    (root / "broken.py").write_bytes(b"\xff" * 1000)
    monkeypatch.syspath_prepend(tmp_path)
    return "made_for_zenray"


def test_prose_is_docstrings_without_examples():
    assert docstring_prose(PROSE) == "First line.\n\nSome prose that goes on.\n\nAnd on.\n\nSays f.\n"
    assert docstring_prose("def") == ""


def test_each_text_once_and_a_tenth_held_out_by_file(package: str):
    told: list[tuple[str, int, int]] = []
    documents = read_packages([package], progress=lambda *step: told.append(step))
    assert [document.kind for document in documents].count("code") == 40
    assert [document.kind for document in documents].count("english") == 40
    assert told[-1][1] == told[-1][2] > 0
    out = {document.source.partition("#")[0] for document in documents if document.is_held_out}
    kept = {document.source.partition("#")[0] for document in documents if not document.is_held_out}
    assert out and not out & kept
    assert len(held_out(documents, "code")) == len(held_out(documents, "english")) == len(out) < 12
    assert not set(training_texts(documents)) & {*held_out(documents, "code"), *held_out(documents, "english")}
    assert documents == read_packages([package])


@pytest.mark.parametrize("name", ["no_such_package", "os.path", "../x", "json.decoder"])
def test_an_unknown_package_is_refused(name: str):
    with pytest.raises(NotFound, match="No package"):
        read_packages([name])


def test_bytes_are_the_longest_measure():
    length = measure(from_bytes().backend(), ["abc", "é"])
    assert (length.documents, length.tokens, length.bytes, length.used_entries) == (2, 5, 5, 5)
    assert length.tokens_per_document == 2.5
    assert length.bytes_per_token == 1
    half = measure(from_bytes().backend(), ["a", "bc"])
    assert half.change_from(length) == pytest.approx(-0.4)


def test_the_command(package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert main(["train", one, "--entries", "2500", "--package", package]) == 0
    assert "2,500 entries: 256 of the base" in capsys.readouterr().out
    assert main(["extend", one, two, "--entries", "2600", "--package", package]) == 1
    assert "begin at 1,832" in capsys.readouterr().err
    assert main(["extend", one, two, "--entries", "2500", "--package", package]) == 0
    assert json.loads(Path(two, "tokenizer_report.json").read_text())["entries"] == 2500
    assert main(["measure", one, two, "--package", package]) == 0
    said = capsys.readouterr().out
    assert "english" in said and "code" in said
    assert main(["measure", str(tmp_path / "none"), "--package", package]) == 1
    assert "does not exist" in capsys.readouterr().err
