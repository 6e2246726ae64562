"""Packing, masks, mixing and order: what a step reads is a function of its number."""

from __future__ import annotations

import errno
import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.training.tiny import END, job, write_text, write_version
from zenray.model.distillation import IGNORED
from zenray.spec.errors import Conflict, InvalidValue, NotFound, StorageUnavailable
from zenray.spec.training import DataSource, TrainingData
from zenray.storage.arrow import arrow_filesystem
from zenray.training.data.corpus import builtin_documents
from zenray.training.data.documents import TextFile, identity, read_documents, source_files, write_corpus
from zenray.training.data.shards import TokenShards, make_shard
from zenray.training.data.stream import PackedDomain, SequenceStream, pack
from zenray.training.data.tokens import DomainTokens, prepare
from zenray.training.history import require_same_data
from zenray.training.loop import TrainingSet
from zenray.training.mesh import Mesh
from zenray.training.networks import Checkpoint


def domain(name: str, lengths: list[int]) -> DomainTokens:
    """Documents of these lengths whose tokens count up from 0 over the whole domain."""
    return DomainTokens(name, np.arange(sum(lengths), dtype=np.uint16), np.cumsum([0, *lengths]))


@given(st.lists(st.integers(1, 30), min_size=4, max_size=30), st.integers(2, 16))
def test_every_token_is_an_input_once_and_a_target_only_within_its_document(lengths, length) -> None:
    if sum(lengths) <= length:
        return
    packed = PackedDomain(domain("a", lengths), length, seed=0)
    batch = pack([packed.at(index) for index in range(packed.num_sequences)])
    ids = batch.ids_BS.flatten()
    assert ids.tolist() == list(range(packed.num_sequences * length))
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    first_of = np.cumsum([0, *lengths])
    for token, label, position in zip(
        ids.tolist(), batch.labels_BS.flatten().tolist(), batch.positions_BS.flatten().tolist(), strict=True
    ):
        continues = token + 1 < len(document_of) and document_of[token + 1] == document_of[token]
        assert label == (token + 1 if continues else IGNORED)
        begins = max(first_of[document_of[token]], token // length * length)
        assert position == token - begins


def test_who_teaches_a_sequence_is_known_without_asking_the_device() -> None:
    batch = pack([(np.arange(9), np.zeros(9, dtype=np.int64))], [1]).to(torch.device("meta"))
    assert (batch.ids_BS.device.type, batch.domain_BS.device.type) == ("meta", "cpu")


def test_the_mask_lets_a_token_see_its_own_document_up_to_itself() -> None:
    batch = pack([(np.arange(7), np.array([4, 4, 5, 5, 5, 9, 9]))])
    assert batch.document_BS.tolist() == [[0, 0, 1, 1, 1, 5]]
    seen = batch.mask()[0, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert batch.mask(window=2)[0, 0, 4].int().tolist() == [0, 0, 0, 1, 1, 0]
    assert batch.positions_BS.tolist() == [[0, 1, 0, 1, 2, 0]]
    assert batch.num_targets == 4


@example(weights=[63.0, 0.03125, 0.03125], seed=0)
@settings(max_examples=15)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(0, 5))
def test_domains_come_by_weight_and_every_sequence_before_any_comes_again(weights, seed) -> None:
    packed = [PackedDomain(domain(str(n), [10] * (20 + 7 * n)), 9, seed) for n in range(len(weights))]
    stream = SequenceStream(packed, weights, seed)
    chosen = Counter(stream.domain_of(index) for index in range(1000))
    for number, weight in enumerate(weights):
        assert chosen[number] >= 1
        assert abs(chosen[number] - 1000 * weight / sum(weights)) <= len(weights)
    seen: dict[int, list[int]] = {number: [] for number in range(len(weights))}
    for index in range(500):
        seen[stream.domain_of(index)].append(int(stream.batch(index, 1).ids_BS[0, 0]))
    for number, firsts in seen.items():
        one_pass = packed[number].num_sequences
        for start in range(0, len(firsts) - one_pass, one_pass):
            assert len(set(firsts[start : start + one_pass])) == one_pass
        if len(firsts) >= 2 * one_pass:
            assert firsts[:one_pass] != firsts[one_pass : 2 * one_pass]


def test_a_step_reads_the_same_sequences_on_any_number_of_workers(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    base = Checkpoint.open(write_version(tmp_path / "base"))
    tokens = prepare(job(text).data, base.tokenizer_file, base.end_token, 0, tmp_path / "tokens")
    wanted = job(text, sequences_per_step=8, sequences_per_pass=2)
    data = TrainingSet.open(wanted, tokens)
    whole = data.step(job(text, sequences_per_step=8, sequences_per_pass=8), Mesh(), 3)[0].ids_BS

    class Part(Mesh):
        """Worker `place` of two."""

        place = 0
        of_stage, rank = property(lambda self: 2), property(lambda self: self.place)

    found = []
    for place in (0, 1):
        mesh = Part()
        object.__setattr__(mesh, "place", place)
        found.append([batch.ids_BS for batch in data.step(wanted, mesh, 3)])
    passes = [torch.cat([worker[number] for worker in found]) for number in range(2)]
    assert torch.equal(torch.cat(passes), whole)


def test_tokens_are_the_documents_each_ended_and_split_once(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    base = Checkpoint.open(write_version(tmp_path / "base"))
    data = job(text).data
    made = prepare(data, base.tokenizer_file, END, 0, tmp_path / "tokens")
    lines = [json.loads(line)["text"] for line in text["count"].read_text().splitlines()]
    parts = [made.load("count", part) for part in ("train", "validation")]
    assert [len(part.starts) - 1 for part in parts] == [48, 12]
    found = [
        bytes_of(part.tokens[start : end - 1], base)
        for part in parts
        for start, end in zip(part.starts, part.starts[1:], strict=False)
    ]
    assert sorted(found) == sorted(lines)
    assert all(int(part.tokens[end - 1]) == END for part in parts for end in part.starts[1:])
    stamp = (made.folder / "about.json").stat().st_mtime_ns
    assert prepare(data, base.tokenizer_file, END, 0, tmp_path / "tokens") == made
    assert (made.folder / "about.json").stat().st_mtime_ns == stamp
    text["count"].write_text(json.dumps({"text": "other " * 99}) + "\n")
    assert prepare(data, base.tokenizer_file, END, 0, tmp_path / "tokens").folder != made.folder


def bytes_of(tokens: np.ndarray, base: Checkpoint) -> str:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(base.tokenizer_file)).decode(tokens.tolist())


def test_text_comes_from_jsonl_parquet_and_plain_files_in_the_order_of_names(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["p1", "p2"], "more": [1, 2]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "j1"}\n\n{"text": "j2", "domain": "x"}\n')
    (tmp_path / "c.txt").write_text("plain")
    (tmp_path / "d.bin").write_text("not text")
    assert list(read_documents(DataSource(domain="x", path=str(tmp_path)))) == ["p1", "p2", "j1", "j2", "plain"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such file or folder"):
        list(read_documents(DataSource(domain="x", path=str(tmp_path / "gone"))))
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"texts": "wrong"}\n')
    with pytest.raises(InvalidValue, match=r"bad\.jsonl:2 is not a JSON object with a key `text`"):
        list(read_documents(DataSource(domain="x", path=str(tmp_path / "bad.jsonl"))))
    with pytest.raises(InvalidValue, match="'short' has 5 tokens: too few for one sequence of 8"):
        SequenceStream([PackedDomain(domain("short", [5]), 8, 0)], [1.0], 0)


def test_the_corpus_of_every_machine(tmp_path: Path) -> None:
    prose = list(builtin_documents("prose"))
    assert len(prose) > 50 and all(len(text) >= 200 for text in prose)
    source = DataSource(domain="manual", builtin="prose")
    assert identity(source, ()).startswith("prose:1:python-3.")
    assert write_corpus(tmp_path / "corpus", [source]) == {"manual": len(prose)}
    again = DataSource(domain="manual", path=str(tmp_path / "corpus"))
    assert list(read_documents(again)) == prose
    line = json.loads((tmp_path / "corpus" / "manual.jsonl").read_text().splitlines()[0])
    assert line == {"text": prose[0], "domain": "manual"}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{"domain": "a"}], "needs either path or builtin"),
        ([{"domain": "a", "path": "x", "builtin": "code"}], "needs either path or builtin"),
        ([{"domain": "a", "path": "x"}, {"domain": "a", "path": "y"}], "domains repeat"),
        ([{"domain": "a", "path": "x", "weight": 0}], "greater than 0"),
    ],
)
def test_data_that_makes_no_sense_is_refused(sources, message) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingData(sources=sources)


def made_by_cluster(data: TrainingData, base: Checkpoint, folder: Path) -> TokenShards:
    """As `tokenise_on_cluster`, one file after the other in this process."""
    filesystem, root = arrow_filesystem(f"file:{folder}")
    tokenizer = base.tokenizer_file.read_bytes()
    files = {
        source.domain: tuple(make_shard(file, tokenizer, END, filesystem, root) for file in source_files(source))
        for source in data.sources
        if source.path is not None
    }
    return TokenShards(filesystem, root, files)


def test_tokens_that_the_cluster_made_are_those_that_a_worker_makes(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    more = tmp_path / "many"
    more.mkdir()
    for number in range(3):
        lines = [json.dumps({"text": f"document {number} {line} é"}) + "\n" for line in range(number * 7)]
        (more / f"{number}.jsonl").write_text("".join(lines))
    sources = [{"domain": "many", "path": str(more)}, {"domain": "count", "path": str(text["count"])}]
    data = TrainingData(
        sources=[*sources, {"domain": "manual", "builtin": "prose"}], sequence_tokens=8, validation_share=0.2
    )
    base = Checkpoint.open(write_version(tmp_path / "base"))
    shards = made_by_cluster(data, base, tmp_path / "shards")
    alone = prepare(data, base.tokenizer_file, END, 3, tmp_path / "alone")
    sent = pickle.loads(pickle.dumps(shards))  # noqa: S301
    with_shards = prepare(data, base.tokenizer_file, END, 3, tmp_path / "cluster", sent)
    assert alone.files == with_shards.files and [Path(file.path).name for file in alone.files][:3] == [
        "0.jsonl",
        "1.jsonl",
        "2.jsonl",
    ]
    assert alone.files[-1].path.startswith("prose:1:python-3.") and alone.files[-1].size_bytes > 100_000
    assert alone.identities == with_shards.identities and alone.folder.name == with_shards.folder.name
    names = sorted(path.name for path in alone.folder.iterdir())
    assert names == sorted(path.name for path in with_shards.folder.iterdir()) and len(names) == 13
    for name in names:
        assert (alone.folder / name).read_bytes() == (with_shards.folder / name).read_bytes(), name


def test_a_file_is_tokenised_once_whatever_it_is_called(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    base = Checkpoint.open(write_version(tmp_path / "base"))
    shards = made_by_cluster(job(text).data, base, tmp_path / "shards")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    assert len(before) == 2
    moved = {"else": text["spell"].rename(tmp_path / "other.jsonl")}
    again = made_by_cluster(job(moved).data, base, tmp_path / "shards")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()} == before
    assert again.files["else"][0].sha256 == shards.files["spell"][0].sha256


def test_a_run_does_not_go_on_with_other_texts() -> None:
    history = [{"event": "data", "step": 0, "domains": {"a": "sha256:1", "b": "sha256:2"}}]
    require_same_data(history, {"b": "sha256:2", "a": "sha256:1"})
    with pytest.raises(Conflict, match="The texts of b changed since this run began"):
        require_same_data(history, {"a": "sha256:1", "b": "sha256:3"})


def test_texts_are_read_for_their_digest_once_on_a_machine_until_they_change(tmp_path: Path, monkeypatch) -> None:
    text, read = write_text(tmp_path / "text"), []
    base = Checkpoint.open(write_version(tmp_path / "base"))
    real = TextFile.entry
    monkeypatch.setattr(TextFile, "entry", lambda file: (read.append(Path(file.path).name), real(file))[1])
    made = [prepare(job(text).data, base.tokenizer_file, END, 0, tmp_path / "tokens") for _ in range(2)]
    assert sorted(read) == ["count.jsonl", "spell.jsonl"] and made[0] == made[1]
    text["count"].write_text(text["count"].read_text().replace("make", "take"))
    other = prepare(job(text).data, base.tokenizer_file, END, 0, tmp_path / "tokens")
    assert sorted(read) == ["count.jsonl", "count.jsonl", "spell.jsonl"]
    assert other.identities["count"] != made[0].identities["count"]
    assert other.identities["spell"] == made[0].identities["spell"]


def test_a_disk_that_is_too_small_for_the_tokens_is_named(tmp_path: Path, monkeypatch) -> None:
    base = Checkpoint.open(write_version(tmp_path / "base"))

    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    data = job(write_text(tmp_path / "text")).data
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(StorageUnavailable, match=r"disk is full: the list of the files of text takes 0\.0 MB"):
            prepare(data, base.tokenizer_file, END, 0, tmp_path / "tokens")
    monkeypatch.setattr("zenray.training.data.tokens._lay_out", full)
    with pytest.raises(StorageUnavailable, match=r"disk is full: the tokens of count, spell take more than 0 MB"):
        prepare(data, base.tokenizer_file, END, 0, tmp_path / "tokens")
