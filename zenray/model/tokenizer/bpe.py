"""A byte-level BPE as data: entries and merges, learned from text, continued, and words forced to be one token.

Merges are learned by the `tokenizers` library. It cannot go on from merges that exist, so a base's pieces are handed to
it as letters of an alphabet: what it then learns are merges of those pieces, which come after the base's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from zenray.spec.errors import InvalidDocument, InvalidValue

Merge = tuple[str, str]

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How text is cut before merging (Qwen's and cl100k's rule, one digit at a time): a token never crosses such a cut."""

MAX_TOKEN_BYTES = 48
_FIRST_LETTER = 0x10000  # above the surrogates: every piece of a base is one valid code point
_MAX_ROUNDS = 64


def byte_letters() -> list[str]:
    """How each byte, 0 to 255, is spelled in an entry (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


_LETTERS = byte_letters()


def spell(text: str) -> str:
    """Text in the letters of byte-level entries."""
    return "".join(_LETTERS[byte] for byte in text.encode())


def match_exactly(*, special: bool) -> dict[str, bool]:
    """The switches of an added token that is found as it is written, anywhere; `special`: decoding may drop it."""
    return {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}


@dataclass
class ByteLevelBPE:
    """Entries with their ids, merges by rank, and the other parts of a tokenizer.json, which are kept as they are."""

    ids: dict[str, int]
    merges: list[Merge]
    added: dict[str, dict[str, bool]] = field(default_factory=dict)  # token → how it is matched, and `special`
    parts: dict[str, Any] = field(default_factory=dict)  # normalizer, pre_tokenizer, post_processor, decoder
    model: dict[str, Any] = field(default_factory=dict)  # the model's switches

    def document(self) -> dict[str, Any]:
        """The tokenizer.json. Added tokens stand in order of their ids."""
        added = [
            {"id": self.ids[token], "content": token, **switches}
            for token, switches in sorted(self.added.items(), key=lambda item: self.ids[item[0]])
        ]
        vocabulary = dict(sorted(self.ids.items(), key=lambda item: item[1]))
        model = {**self.model, "type": "BPE", "vocab": vocabulary, "merges": [list(merge) for merge in self.merges]}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            **self.parts,
            "model": model,
        }

    def backend(self, *, with_control_tokens: bool = True) -> Tokenizer:
        """The encoder. Without control tokens, text that spells one is ordinary text."""
        document = self.document()
        if not with_control_tokens:
            document["added_tokens"] = []
        return Tokenizer.from_str(json.dumps(document))


def from_bytes() -> ByteLevelBPE:
    """A BPE that knows the 256 bytes, each at its own value as id, and no merge."""
    level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
    return ByteLevelBPE(
        ids={letter: byte for byte, letter in enumerate(_LETTERS)},
        merges=[],
        parts={
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "post_processor": level,
            "decoder": level,
        },
        model={"dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False},
    )


def read_document(document: Mapping[str, Any]) -> ByteLevelBPE:
    """The BPE of a tokenizer.json; raises InvalidDocument when it is not a byte-level BPE."""
    model = document.get("model", {})
    if model.get("type") != "BPE" or '"ByteLevel"' not in json.dumps(document.get("pre_tokenizer")):
        raise InvalidDocument(
            f"The tokenizer's model is {model.get('type')} without byte-level words.",
            hint="Only a byte-level BPE can be extended: GPT-2's, SmolLM2's, Qwen's, Llama 3's.",
        )
    merges = [tuple(one.split(" ") if isinstance(one, str) else one) for one in model["merges"]]
    ids = dict(model["vocab"])
    for token in document.get("added_tokens", []):
        if ids.setdefault(token["content"], token["id"]) != token["id"]:
            raise InvalidDocument(f"{token['content']!r} has two ids: {ids[token['content']]} and {token['id']}.")
    return ByteLevelBPE(
        ids=ids,
        merges=merges,
        added={
            token["content"]: {name: value for name, value in token.items() if name not in ("id", "content")}
            for token in document.get("added_tokens", [])
        },
        parts={name: document.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")},
        model={name: value for name, value in model.items() if name not in ("vocab", "merges", "type")},
    )


def learn_merges(base: ByteLevelBPE, texts: Iterable[str], count: int, *, min_count: int, show: bool) -> list[Merge]:
    """At most `count` merges that continue the base's, the most frequent pair of pieces first.

    A pair that occurs fewer than `min_count` times is not learned. Deterministic for the same texts.
    """
    if not base.merges:
        return _run_trainer(texts, base.backend().pre_tokenizer, _LETTERS, count, min_count, show)
    pieces = {token_id: piece for piece, token_id in base.ids.items()}
    encoder = base.backend(with_control_tokens=False)
    learned = _run_trainer(
        (_as_letters(encoder, text) for text in texts),
        pre_tokenizers.CharDelimiterSplit(" "),
        [],
        count,
        min_count,
        show,
    )

    def spelled(letters: str) -> str:
        return "".join(pieces[ord(letter) - _FIRST_LETTER] for letter in letters)

    return [(spelled(left), spelled(right)) for left, right in learned]


def _run_trainer(
    texts: Iterable[str], words: Any, alphabet: list[str], count: int, min_count: int, show: bool
) -> list[Merge]:
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = words
    letters = len(alphabet) if alphabet else 0x110000 - _FIRST_LETTER
    trainer = trainers.BpeTrainer(
        vocab_size=letters + count,
        min_frequency=min_count,
        initial_alphabet=alphabet,
        show_progress=show,
        max_token_length=MAX_TOKEN_BYTES,
    )
    bare.train_from_iterator(texts, trainer)
    return [tuple(merge) for merge in json.loads(bare.to_str())["model"]["merges"][:count]]


def _as_letters(encoder: Tokenizer, text: str) -> str:
    """The pieces of a text, one letter each, with a space between words."""
    encoding = encoder.encode(text, add_special_tokens=False)
    letters: list[str] = []
    before = None
    for token_id, word in zip(encoding.ids, encoding.word_ids, strict=True):
        if word != before and letters:
            letters.append(" ")
        letters.append(chr(_FIRST_LETTER + token_id))
        before = word
    return "".join(letters)


def add_merges(bpe: ByteLevelBPE, merges: Iterable[Merge], free_ids: Iterator[int], wanted: Mapping[str, int]) -> int:
    """Append merges and enter what they make, at its `wanted` id or the next free one, until no id is free.

    A merge is left out when it is there, is too long, or needs an entry that was left out.
    Returns how many entries are new.
    """
    known, before = set(bpe.merges), len(bpe.ids)
    for left, right in merges:
        made = left + right
        if (left, right) in known or left not in bpe.ids or right not in bpe.ids or len(made) > MAX_TOKEN_BYTES:
            continue
        if made not in bpe.ids:
            token_id = wanted.get(made) if made in wanted else next(free_ids, None)
            if token_id is None:
                break
            bpe.ids[made] = token_id
        known.add((left, right))
        bpe.merges.append((left, right))
    return len(bpe.ids) - before


def force_words(
    bpe: ByteLevelBPE, words: Iterable[str], free_ids: Iterator[int], wanted: Mapping[str, int]
) -> list[str]:
    """Append merges until each word, when it stands alone, is one token. Returns those words.

    Words that the pre-tokenizer cuts are left out: no merge could join them. The new merges rank last: they join only
    what all others left apart. Raises InvalidValue when the free ids do not suffice for what lies between.
    """
    cut = bpe.backend(with_control_tokens=False).pre_tokenizer
    whole = [word for word in words if [piece for piece, _ in cut.pre_tokenize_str(word)] == [spell(word)]]
    for _ in range(_MAX_ROUNDS):
        encoder = bpe.backend(with_control_tokens=False)
        pieces = [encoder.encode(word, add_special_tokens=False).tokens for word in whole]
        missing = [(tokens[0], tokens[1]) for tokens in pieces if len(tokens) > 1]
        if not missing:
            return whole
        before = len(bpe.merges)
        add_merges(bpe, missing, free_ids, wanted)
        if len(bpe.merges) == before:
            break
    raise InvalidValue(
        f"{len(missing)} of {len(whole)} words are not one token yet, and no id is free for what lies between.",
        hint="Take more entries.",
    )
