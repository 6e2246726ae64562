"""Files that a person writes: what is read, and what an error says and where."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from zenray.spec.documents import Document, load_document, parse_document
from zenray.spec.errors import InvalidDocument


class Part(Document):
    port: int = Field(ge=0)
    host: str = "127.0.0.1"


class Whole(Document):
    name: str
    gateway: Part | None = None
    parts: tuple[Part, ...] = ()
    labels: dict[str, int] = Field(default_factory=dict)


def test_a_good_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "# a comment\nname: zwölf\nparts: [{port: 1}, {port: 2, host: h}]\nlabels: {a: 1}\n", encoding="utf-8"
    )
    whole = load_document(path, Whole)
    assert (whole.name, whole.parts[1].host, whole.labels) == ("zwölf", "h", {"a": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\ngatway: {port: 1}\n", "here:2: unknown key 'gatway'. Did you mean 'gateway'?"),
        ("name: a\nzzz: 1\n", "here:2: unknown key 'zzz'. Known keys: gateway, labels, name, parts."),
        ("name: a\ngateway:\n  prot: 1\n", "here:3: unknown key 'gateway.prot'. Did you mean 'port'?"),
        (
            "name: a\nparts:\n- port: 1\n- port: 1\n  hst: b\n",
            "here:5: unknown key 'parts.1.hst'. Did you mean 'host'?",
        ),
        ("name: a\nparts:\n- port: 1\n- port: x\n", "here:4: parts.1.port: Input should be a valid integer"),
        ("name: a\nparts:\n- host: h\n", "here:3: key 'parts.0.port' is missing."),
        ("gateway: {port: 1}\n", "here:1: key 'name' is missing."),
        ("name: a\nlabels:\n  x: 1\n  y: z\n", "here:4: labels.y: Input should be a valid integer"),
        ("name: a\ngateway:\n  port: -1\n", "here:3: gateway.port: Input should be greater than or equal to 0."),
        ("name: a\nname: b\n", "here:2: key 'name' is already on line 1."),
        ("name: a\nparts:\n- {port: 1, port: 2}\n", "here:3: key 'port' is already on line 3."),
        ("name: a\n  bad: b\n", "here:2: not valid YAML: mapping values are not allowed here."),
        ("name: 'a\n", "not valid YAML"),
        ("- a\n- b\n", "here: expected keys and values, got list."),
        ("just words\n", "here: expected keys and values, got str."),
        ("", "key 'name' is missing."),
        ("a: !!python/object:os.system {}\n", "not valid YAML"),
        ("name: 2024-13-45\n", "here: not valid YAML: month must be in 1..12."),
        ("name: !!int x\n", "here: not valid YAML: invalid literal for int()"),
        ("name: a\n? [b]\n: c\n", "here:2: a key must be a word, not a list or mapping."),
        ("name: " + "[" * 3000, "here: not valid YAML: nested too deeply"),
        ("--- {name: a}\n--- {name: b}\n", "not valid YAML"),
    ],
)
def test_what_is_wrong_and_where(text: str, message: str) -> None:
    with pytest.raises(InvalidDocument) as caught:
        parse_document(text, Whole, where="here")
    assert message in str(caught.value)


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(InvalidDocument) as caught:
        parse_document("nam: a\ngateway: {port: x}\n", Whole, where="here")
    told = str(caught.value).splitlines()
    assert len(told) == 3
    assert {line.split(":")[1] for line in told} == {"1", "2"}


def test_a_file_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "local.yaml").write_text("name: a\n")
    with pytest.raises(InvalidDocument, match=r"locl\.yaml: no such file\. Files in .*: local\.yaml\."):
        load_document(tmp_path / "locl.yaml", Whole)
    with pytest.raises(InvalidDocument, match=r"has no \.yaml file"):
        load_document(tmp_path / "nowhere" / "a.yaml", Whole)


def test_a_folder_or_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(InvalidDocument, match="cannot be read"):
        load_document(tmp_path, Whole)
    (tmp_path / "b.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(InvalidDocument, match="cannot be read"):
        load_document(tmp_path / "b.yaml", Whole)


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        assert isinstance(parse_document(text, Whole, where="here"), Whole)
    except InvalidDocument as error:
        assert "here" in str(error)


def test_a_list_within_itself_ends() -> None:
    with pytest.raises(InvalidDocument, match=r"here:2: unknown key 'a'"):
        parse_document("name: b\na: &x [*x, *x]\n", Whole, where="here")


def test_documents_do_not_change() -> None:
    whole = parse_document("name: a\n", Whole, where="here")
    with pytest.raises(ValueError, match="frozen"):
        whole.name = "b"  # type: ignore[misc]
