"""Train a tokenizer, or extend one, to exactly the layout's entries; save it as a folder that AutoTokenizer loads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from zenray.model.tokenizer.bpe import (
    ByteLevelBPE,
    add_merges,
    byte_letters,
    force_words,
    from_bytes,
    learn_merges,
    match_exactly,
    read_document,
    spell,
)
from zenray.model.tokenizer.chat_template import CHAT_TEMPLATE
from zenray.model.tokenizer.code_patterns import code_patterns
from zenray.model.tokenizer.layout import CONTROL_TOKENS, END_OF_TEXT, TURN_END, Layout, is_reserved
from zenray.spec.errors import InvalidDocument, InvalidValue, NotFound

REPORT_NAME = "tokenizer_report.json"


@dataclass(frozen=True)
class Counts:
    """What stands in the entries; they add up to `entries`."""

    entries: int
    bytes: int
    base: int
    learned: int
    code: int
    control: int
    reserved: int


@dataclass(frozen=True)
class BuiltTokenizer:
    bpe: ByteLevelBPE
    counts: Counts

    def tokenizer(self, *, context_tokens: int | None = None) -> PreTrainedTokenizerFast:
        """For transformers and vLLM: ends a turn with <|im_end|>, pads with <|endoftext|>, has no beginning token."""
        made = PreTrainedTokenizerFast(
            tokenizer_object=self.bpe.backend(),
            eos_token=TURN_END,
            pad_token=END_OF_TEXT,
            clean_up_tokenization_spaces=False,
            **({"model_max_length": context_tokens} if context_tokens else {}),
        )
        made.chat_template = CHAT_TEMPLATE
        return made

    def save(self, folder: Path) -> None:
        """tokenizer.json, its configuration, the chat template, and the counts beside them."""
        self.tokenizer().save_pretrained(folder)
        config_path = folder / "tokenizer_config.json"
        config = json.loads(config_path.read_text(encoding="utf-8"))
        # The name that every release of transformers knows, and that keeps the file's own pre-tokenizer.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        for of_this_machine in ("is_local", "local_files_only"):
            config.pop(of_this_machine, None)
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (folder / REPORT_NAME).write_text(json.dumps(asdict(self.counts), indent=2) + "\n", encoding="utf-8")


def train(
    texts: Iterable[str], layout: Layout | None = None, *, min_count: int = 2, show_progress: bool = False
) -> BuiltTokenizer:
    """A tokenizer of the family's own: learned entries as far as the texts carry, the rest reserved."""
    return _grow(from_bytes(), texts, layout or Layout(), min_count, show_progress)


def extend(
    base: ByteLevelBPE,
    texts: Iterable[str],
    layout: Layout | None = None,
    *,
    min_count: int = 2,
    show_progress: bool = False,
) -> BuiltTokenizer:
    """The base with more entries: every id, merge, rule of cutting and added token of the base stays what it is.

    Reserved entries of the base may be claimed. Bytes that the base lacks are added, so that no text is lost.
    Raises InvalidValue when the base reaches into the ranges at the end.
    """
    layout = layout or Layout()
    kept = ByteLevelBPE(
        ids={token: token_id for token, token_id in base.ids.items() if not is_reserved(token)},
        merges=list(base.merges),
        added={token: switches for token, switches in base.added.items() if not is_reserved(token)},
        parts=base.parts,
        model=base.model,
    )
    wanted = _wanted_ids(layout)
    beyond = [one for token, one in kept.ids.items() if one >= layout.code_start and wanted.get(token) != one]
    if beyond:
        raise InvalidValue(
            f"The base has entries up to id {max(beyond):,}; the ranges for code and control tokens begin at "
            f"{layout.code_start:,}.",
            hint="Take more entries, or a smaller base.",
        )
    return _grow(kept, texts, layout, min_count, show_progress)


def read_base(folder: Path) -> ByteLevelBPE:
    """The BPE of a checkpoint's folder. Raises NotFound or InvalidDocument."""
    path = folder / "tokenizer.json" if folder.is_dir() else folder
    try:
        return read_document(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist.", hint="Name a checkpoint's folder with a tokenizer.json.") from None
    except json.JSONDecodeError as error:
        raise InvalidDocument(f"{path} is not JSON: {error}.") from error


def ordinary_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The same ids for ordinary text, in which control tokens do not exist: what spells one is taken as letters.

    For documents that are trained on, and any text whose author may not give orders. `encode(text).ids` never holds a
    control token or a reserved entry.
    """
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    document["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(document))


def _wanted_ids(layout: Layout) -> dict[str, int]:
    """Code patterns (as spelled in entries) and control tokens, with the ids that the layout gives them."""
    patterns = code_patterns()[: layout.code_entries]
    code = {spell(pattern): layout.code_start + place for place, pattern in enumerate(patterns)}
    return code | {token: layout.control_start + place for place, token in enumerate(CONTROL_TOKENS)}


def _grow(bpe: ByteLevelBPE, texts: Iterable[str], layout: Layout, min_count: int, show: bool) -> BuiltTokenizer:
    base_entries = len(bpe.ids)
    wanted = _wanted_ids(layout)
    taken = set(bpe.ids.values())
    room = [token_id for token_id in range(layout.code_start) if token_id not in taken]
    free_ids = iter(room)
    for letter in byte_letters():
        if letter not in bpe.ids:
            bpe.ids[letter] = _claim(free_ids, layout)
    # One entry a pattern is held back for what lies between a pattern's pieces and the whole.
    room_left = layout.code_start - sum(token_id < layout.code_start for token_id in bpe.ids.values())
    learnable = max(0, room_left - layout.code_entries)
    merges = learn_merges(bpe, texts, learnable, min_count=min_count, show=show) if learnable else []
    learning_ids = islice(free_ids, learnable)  # takes them only as they are needed
    before = set(bpe.ids)
    add_merges(bpe, merges, learning_ids, wanted)
    force_words(bpe, code_patterns()[: layout.code_entries], free_ids, wanted)
    for token, special in CONTROL_TOKENS.items():
        bpe.ids.setdefault(token, wanted[token])
        bpe.added.setdefault(token, match_exactly(special=special))
    learned = {token for token in bpe.ids if token not in before and token not in wanted}
    in_code = sum(layout.code_start <= token_id < layout.control_start for token_id in bpe.ids.values())
    in_control = sum(token_id >= layout.control_start for token_id in bpe.ids.values())
    used = len(bpe.ids)
    filled = set(bpe.ids.values())
    for token_id in range(layout.entries):
        if token_id not in filled:
            bpe.ids[layout.reserved_name(token_id)] = token_id
    ordinary = base_entries - sum(token_id >= layout.code_start for token_id in taken)
    counts = Counts(
        entries=len(bpe.ids),
        bytes=len(before) - base_entries,
        base=ordinary,
        learned=len(learned),
        code=in_code,
        control=in_control,
        reserved=layout.entries - used,
    )
    return BuiltTokenizer(bpe, counts)


def _claim(free_ids: Iterator[int], layout: Layout) -> int:
    token_id = next(free_ids, None)
    if token_id is None:
        raise InvalidValue(f"No id below {layout.code_start:,} is free.", hint="Take more entries, or a smaller base.")
    return token_id
