"""Training and extending: every id accounted for, nothing of a base or a text lost, control tokens only when asked."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, MixtralConfig, Qwen3MoeConfig

from tests.model.tokenizer.conftest import LAYOUT
from zenray.model.tokenizer.bpe import ByteLevelBPE, byte_letters, read_document, spell
from zenray.model.tokenizer.build import BuiltTokenizer, extend, ordinary_encoder, read_base, train
from zenray.model.tokenizer.code_patterns import code_patterns
from zenray.model.tokenizer.layout import CONTROL_TOKENS, Layout, is_reserved
from zenray.spec.errors import InvalidDocument, InvalidValue, NotFound

MAKERS = ["trained", "extended"]
TEXT = "def f(x):\n        return x == 12345  # naïve 日本 🦊\r\n\n\tthe <image> ends<|im_end|>"
TRICKY = st.text() | st.lists(
    st.sampled_from([*CONTROL_TOKENS, "<|reserved_3000|>", "<|code_3700|>", "    ", "\n", "\x00", "\ufeff", "é", "🦊"])
    | st.text(max_size=4)
).map("".join)


@pytest.fixture(params=MAKERS, scope="module")
def built(request: pytest.FixtureRequest) -> BuiltTokenizer:
    return request.getfixturevalue(request.param)


def test_bytes_are_spelled_as_the_library_does():
    assert sorted(byte_letters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert (
        spell("né\n")
        == pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("né\n")[0][0]
    )


def test_the_familys_layout():
    layout = Layout()
    assert (layout.entries, layout.code_start, layout.control_start) == (151_936, 151_168, 151_680)
    assert len(code_patterns()) <= layout.code_entries
    assert not any(is_reserved(token) for token in CONTROL_TOKENS)
    assert is_reserved(layout.reserved_name(151_935))


@pytest.fixture(scope="module")
def ordinary(trained: BuiltTokenizer, extended: BuiltTokenizer) -> list[Tokenizer]:
    return [ordinary_encoder(one.tokenizer()) for one in (trained, extended)]


def test_every_id_is_taken_once_and_the_counts_add_up(built: BuiltTokenizer):
    assert sorted(built.bpe.ids.values()) == list(range(LAYOUT.entries))
    counts = asdict(built.counts)
    assert counts.pop("entries") == sum(counts.values()) == LAYOUT.entries
    assert built.counts.reserved == sum(map(is_reserved, built.bpe.ids)) > 0
    assert len(built.tokenizer()) == built.tokenizer().vocab_size == LAYOUT.entries


def test_trained_ids_are_fixed(trained: BuiltTokenizer):
    ids = trained.bpe.ids
    assert [ids[letter] for letter in byte_letters()] == list(range(256))
    assert [ids[token] for token in CONTROL_TOKENS] == [LAYOUT.control_start + n for n in range(len(CONTROL_TOKENS))]
    patterns = code_patterns()[: LAYOUT.code_entries]
    places = {spell(pattern): LAYOUT.code_start + place for place, pattern in enumerate(patterns)}
    assert {token: ids[token] for token in places if token in ids}.items() <= places.items()


def test_code_patterns_are_one_token(built: BuiltTokenizer):
    encoder = built.bpe.backend()
    tokens = {p: encoder.encode(p).tokens for p in code_patterns()[: LAYOUT.code_entries]}
    cut = encoder.pre_tokenizer.pre_tokenize_str
    one_word = [p for p in tokens if len(cut(p)) == 1]
    assert len(one_word) > 200
    assert {p: tokens[p] for p in one_word if len(tokens[p]) != 1} == {}


def test_an_extension_keeps_the_base(base: ByteLevelBPE, extended: BuiltTokenizer):
    assert base.ids.items() <= extended.bpe.ids.items()
    assert extended.bpe.merges[: len(base.merges)] == base.merges
    assert {token: extended.bpe.added[token] for token in base.added} == base.added
    assert extended.bpe.backend().encode("a  <mask>").tokens == [
        "a",
        "  <mask>",
    ]  # it takes spaces before it along, as in the base
    assert base.parts == extended.bpe.parts
    assert extended.bpe.ids["<|endoftext|>"] == 0
    assert extended.bpe.ids["<image>"] == LAYOUT.control_start + list(CONTROL_TOKENS).index("<image>")
    assert (extended.counts.base, extended.counts.bytes) == (301, 64)


def test_what_the_base_encoded_decodes_the_same(base: ByteLevelBPE, extended: BuiltTokenizer, texts: list[str]):
    for text in texts:
        ids = base.backend().encode(text.encode("ascii", "ignore").decode()).ids
        assert extended.bpe.backend().decode(ids) == base.backend().decode(ids)


def test_more_entries_make_fewer_tokens(base: ByteLevelBPE, extended: BuiltTokenizer, texts: list[str]):
    before, after = base.backend(), extended.bpe.backend()
    for text in texts:
        assert len(after.encode(text).ids) < 0.7 * len(before.encode(text).ids)


def test_extending_again_claims_what_was_reserved(extended: BuiltTokenizer, texts: list[str]):
    more = [*texts, "zyzzyva quixotic axolotl " * 3]
    again = extend(extended.bpe, more, LAYOUT)
    kept = {token: token_id for token, token_id in extended.bpe.ids.items() if not is_reserved(token)}
    assert kept.items() <= again.bpe.ids.items()
    assert again.counts.reserved < extended.counts.reserved
    assert len(again.bpe.backend().encode(" zyzzyva").ids) == 1


def test_the_same_texts_make_the_same_tokenizer(base: ByteLevelBPE, texts: list[str]):
    for make in (lambda: train(texts, LAYOUT), lambda: extend(copy.deepcopy(base), texts, LAYOUT)):
        assert json.dumps(make().bpe.document()) == json.dumps(make().bpe.document())


def test_without_texts_all_is_reserved_that_can_be():
    built = train([], Layout(entries=2500))
    assert built.counts.reserved > 1000
    assert built.tokenizer().decode(built.tokenizer()(TEXT).input_ids) == TEXT


@settings(max_examples=150, deadline=None)
@given(TRICKY)
@example("\ud7ff\ue000\U0010ffff")
@example(bytes(range(256)).decode("latin-1"))
def test_any_text_comes_back(encoders: list[Tokenizer], text: str):
    for encoder in encoders:
        ids = encoder.encode(text, add_special_tokens=False).ids
        assert encoder.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=50, deadline=None)
@given(st.binary())
def test_any_bytes_have_ids_and_come_back(encoders: list[Tokenizer], data: bytes):
    assert encoders[0].decode(list(data)) == data.decode("utf-8", "replace")


@settings(max_examples=150, deadline=None)
@given(TRICKY)
@example("".join(CONTROL_TOKENS))
def test_ordinary_text_holds_no_control_token_and_no_reserved_entry(ordinary: list[Tokenizer], text: str):
    for encoder in ordinary:
        ids = encoder.encode(text, add_special_tokens=False).ids
        assert encoder.decode(ids) == text
        assert not [token for one in ids if is_reserved(token := encoder.id_to_token(one)) or token in CONTROL_TOKENS]


def test_control_tokens_are_one_token_where_they_may_be(built: BuiltTokenizer):
    tokenizer = built.tokenizer()
    for token, dropped in CONTROL_TOKENS.items():
        assert tokenizer(f"a{token}b").input_ids[1:-1] == [built.bpe.ids[token]]
        assert tokenizer.decode([built.bpe.ids[token]], skip_special_tokens=True) == ("" if dropped else token)
    assert tokenizer("<|reserved_3000|>").input_ids != [3000]


@pytest.mark.parametrize("config", [None, MixtralConfig, Qwen3MoeConfig])
def test_a_saved_folder_loads_as_it_was(built: BuiltTokenizer, config: type | None, tmp_path: Path):
    built.save(tmp_path / "one")
    if config:
        config().save_pretrained(tmp_path / "one")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert loaded.get_vocab() == built.tokenizer().get_vocab()
    assert loaded(TEXT).input_ids == built.tokenizer()(TEXT).input_ids
    assert loaded.decode(loaded(TEXT).input_ids) == TEXT
    assert (loaded.eos_token, loaded.pad_token, loaded.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert loaded.chat_template == built.tokenizer().chat_template
    again = read_base(tmp_path / "one")
    assert (again.ids, again.merges, again.added) == (built.bpe.ids, built.bpe.merges, built.bpe.added)


def test_saving_twice_is_byte_identical(built: BuiltTokenizer, tmp_path: Path):
    for name in ("one", "two"):
        built.save(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "chat_template.jinja" in files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_refusals(base: ByteLevelBPE, texts: list[str], tmp_path: Path):
    with pytest.raises(InvalidValue, match="900 entries less 512 for code and 256 for control tokens leave 132"):
        Layout(entries=900)
    with pytest.raises(InvalidValue, match="control tokens"):
        Layout(control_entries=3)
    with pytest.raises(InvalidValue, match="up to id 300; the ranges for code and control tokens begin at 260"):
        extend(base, texts, Layout(entries=600, code_entries=300, control_entries=40))
    with pytest.raises(InvalidValue, match=r"words are not one token yet"):
        train([], Layout(entries=300 + 40 + 256, code_entries=300, control_entries=40))
    with pytest.raises(InvalidDocument, match="WordPiece"):
        read_document({"model": {"type": "WordPiece", "vocab": {}}})
    with pytest.raises(NotFound, match=r"tokenizer\.json does not exist"):
        read_base(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InvalidDocument, match="not JSON"):
        read_base(tmp_path)
