"""Teachers of which the likeliest tokens are kept: networks, and a scripted server in vLLM's shape."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.tiny import job, write_text, write_version
from zenray.model.distillation import IGNORED, TopLogits
from zenray.model.network import Masks, MoDE
from zenray.spec.errors import InvalidValue, StorageUnavailable, UpstreamFailed
from zenray.spec.training import DistillJob, Teacher, TeacherEndpoint
from zenray.spec.versions import VersionRef
from zenray.storage.fake import FakeStore
from zenray.storage.versions import publish
from zenray.training.data.stream import Batch, pack
from zenray.training.data.tokens import prepare
from zenray.training.loop import TrainingSet
from zenray.training.mesh import Mesh
from zenray.training.networks import Checkpoint
from zenray.training.teachers import EndpointAnswers, NetworkAnswers, TopTeacher
from zenray.training.trainer import Trainer
from zenray.training.worker import assemble

COUNT, VOCABULARY = 5, 257


class ScriptedVllm:
    """A completions server whose model is a small network. `faults`: statuses given before it answers."""

    def __init__(self, network: MoDE) -> None:
        self.network, self.faults, self.requests = network, list[int](), list[dict[str, Any]]()
        self.most_logprobs, self.headers = 20, list[str | None]()
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.headers.append(self.headers.get("Authorization"))
                    outer.requests.append(body)
                    status = outer.faults.pop() if outer.faults else 200
                    said = json.dumps(outer.answer(body)).encode() if status == 200 else b'{"error": "no"}'
                self.send_response(status)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.base_url = f"http://127.0.0.1:{self.server.server_port}/v1"

    @torch.no_grad()
    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """As vLLM: nothing for the first token, then the best of each place, and the prompt's own token."""
        ids = torch.tensor([body["prompt"]])
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None]
        places = torch.arange(ids.shape[1])[None]
        h, _ = self.network.model(self.network.model.embed_tokens(ids), places, Masks(mask, None))
        log_probs = self.network.lm_head(h)[0].float().log_softmax(-1)
        found: list[dict[str, Any] | None] = [None]
        for place in range(ids.shape[1] - 1):
            ranked = log_probs[place].argsort(descending=True).tolist()
            own = int(ids[0, place + 1])
            shown = dict.fromkeys([*ranked[: min(body["prompt_logprobs"], self.most_logprobs)], own])
            found.append({str(t): {"logprob": float(log_probs[place, t]), "rank": ranked.index(t) + 1} for t in shown})
        return {"choices": [{"text": "x", "prompt_logprobs": found}]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_version(tmp_path_factory.mktemp("base") / "v0"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_version(tmp_path_factory.mktemp("teacher") / "v0", seed=7))


@pytest.fixture
def server(teacher: Checkpoint) -> Iterator[ScriptedVllm]:
    torch.set_num_threads(1)
    scripted = ScriptedVllm(teacher.network().eval())
    yield scripted
    scripted.server.shutdown()
    scripted.server.server_close()


def endpoint(server: ScriptedVllm, **changes: Any) -> TeacherEndpoint:
    return TeacherEndpoint(base_url=server.base_url, model="teacher", **changes)


@pytest.fixture
def packed() -> Batch:
    """Three documents in a row, one of a single token, the last of which goes on beyond the sequence."""
    tokens = np.random.default_rng(0).integers(0, 256, (2, 13))
    return pack([(tokens[0], np.array([0] * 5 + [1] + [2] * 7)), (tokens[1], np.zeros(13, dtype=int))])


def test_an_endpoint_says_what_the_same_network_says_here(server, teacher, packed) -> None:
    asked = TopTeacher(EndpointAnswers(endpoint(server), COUNT, VOCABULARY), Path("/dev/null"), "", COUNT)
    for row in range(2):
        one = Batch(*(tensor[row : row + 1] for tensor in vars(packed).values()))
        there = asked._ask(one)
        here = NetworkAnswers(teacher.network, COUNT, 1.0)(one)
        counted = one.labels_BS.flatten() != IGNORED
        assert counted.sum() == (10, 12)[row]
        assert torch.equal(there.ids_TN[counted], here.ids_TN[counted])
        torch.testing.assert_close(there.log_probs_TN[counted], here.log_probs_TN[counted], rtol=0, atol=1e-5)
    assert sorted(len(request["prompt"]) for request in server.requests) == [5, 7, 13]


def test_a_job_is_assembled_with_teachers_of_each_kind(server, base, teacher, tmp_path) -> None:
    """One beside the student, one kept from a version, one kept from an endpoint: the same network, so one distance."""
    store = FakeStore()
    for name, checkpoint in (("tiny", base), ("teacher", teacher)):
        publish(store, VersionRef(model=name, version="v0"), checkpoint.folder)
    version = {"model": "teacher", "version": "v0"}
    kinds = (
        {"version": version},
        {"version": version, "top_logits": VOCABULARY},
        {"endpoint": endpoint(server).model_dump(), "top_logits": VOCABULARY},
    )
    server.most_logprobs = VOCABULARY

    def distance(*teachers: dict[str, Any]) -> float:
        trainer, data = assemble(
            job(write_text(tmp_path / "text"), "distill", teachers=teachers), store, tmp_path / "work", Mesh()
        )
        assert len(trainer.teachers) + len(trainer.kept_teachers) == len(teachers)
        return trainer.step(0, data.step(trainer.job, trainer.mesh, 0)).kl

    alone = [distance(kind) for kind in kinds]
    assert server.requests and alone == pytest.approx([alone[0]] * 3, rel=2e-3) and alone[0] > 0.01
    assert distance(*kinds) == pytest.approx(alone[0], rel=2e-3)
    two = [one for one in (tmp_path / "work" / "teachers").iterdir() if any(one.rglob("*.npz"))]
    assert len(two) == 2, "a network's answers and an endpoint's are kept apart"


def test_a_network_answers_from_where_it_is_told_to_be(teacher) -> None:
    answers = NetworkAnswers(teacher.network, COUNT, 1.0, torch.device("meta"))
    assert answers._network.lm_head.weight.is_meta


def test_each_sequence_is_asked_for_once_whatever_batch_it_is_in(server, packed, tmp_path) -> None:
    def fresh(name: str = "teacher", count: int = COUNT) -> TopTeacher:
        return TopTeacher(EndpointAnswers(endpoint(server), count, VOCABULARY), tmp_path, name, count)

    first = fresh().top_logits(packed)
    asked = len(server.requests)
    swapped = Batch(*(tensor.flip(0) for tensor in vars(packed).values()))
    again = fresh().top_logits(swapped)
    assert len(server.requests) == asked
    assert torch.equal(torch.cat([again.ids_TN[12:], again.ids_TN[:12]]), first.ids_TN)
    assert not list(tmp_path.rglob("tmp*"))
    fresh(count=4).top_logits(packed)
    fresh("another").top_logits(packed)
    assert len(server.requests) == 3 * asked


def test_a_disk_that_takes_no_more_answers_is_named(teacher, packed, tmp_path, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    kept = TopTeacher(NetworkAnswers(teacher.network, 4, 1.0), tmp_path, "teacher", 4)
    with pytest.raises(StorageUnavailable, match=r"disk is full: a teacher's answer to one sequence takes [\d.]+ MB"):
        kept.top_logits(packed)


def test_a_server_that_is_busy_is_asked_again_and_one_that_refuses_is_not(server, packed, monkeypatch) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    one = Batch(*(tensor[1:] for tensor in vars(packed).values()))
    server.faults = [503, 429, 500]
    EndpointAnswers(endpoint(server), COUNT, VOCABULARY)(one)
    assert len(server.requests) == 4
    server.faults = [404]
    with pytest.raises(UpstreamFailed, match="refused: status 404"):
        EndpointAnswers(endpoint(server), COUNT, VOCABULARY)(one)
    server.faults = [503]
    with pytest.raises(UpstreamFailed, match="did not answer in 0 s: status 503"):
        EndpointAnswers(endpoint(server), COUNT, VOCABULARY, patience_s=0)(one)


def test_too_few_log_probabilities_and_foreign_tokens_are_refused(server, packed) -> None:
    server.most_logprobs = 3
    with pytest.raises(UpstreamFailed, match="of the 5 likeliest tokens") as error:
        EndpointAnswers(endpoint(server), COUNT, VOCABULARY)(packed)
    assert "--max-logprobs" in str(error.value)
    server.most_logprobs = 20
    with pytest.raises(UpstreamFailed, match="beyond the student's vocabulary of 2"):
        EndpointAnswers(endpoint(server), COUNT, 2)(packed)


def test_the_key_comes_from_the_environment_of_the_worker(server, packed, monkeypatch) -> None:
    with pytest.raises(InvalidValue, match=r"\$TEACHER_KEY, which is not set"):
        EndpointAnswers(endpoint(server, key_from="TEACHER_KEY"), COUNT, VOCABULARY)
    monkeypatch.setenv("TEACHER_KEY", "secret")
    EndpointAnswers(endpoint(server, key_from="TEACHER_KEY"), COUNT, VOCABULARY)(packed)
    assert set(server.headers) == {"Bearer secret"}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_all_tokens_kept_a_step_is_that_with_the_teacher_beside_it(base, teacher, tmp_path, temperature) -> None:
    text = write_text(tmp_path / "text")
    wanted = job(text, "distill", temperature=temperature)
    data = TrainingSet.open(wanted, prepare(wanted.data, base.tokenizer_file, base.end_token, 0, tmp_path / "tokens"))
    reports = []
    for count in (None, VOCABULARY, 20):
        beside = [(teacher.network(), (1.0, 1.0))] if count is None else []
        answers = NetworkAnswers(teacher.network, count or 0, temperature)
        kept = [(TopTeacher(answers, tmp_path / "kept", "t", count, temperature), (1.0, 1.0))] if count else []
        trainer = Trainer(base.network(), wanted, teachers=beside, kept_teachers=kept)
        reports.append([trainer.step(step, data.step(wanted, trainer.mesh, step)) for step in range(2)])
    for full, all_kept, few in zip(*reports, strict=True):
        assert all_kept.kl == pytest.approx(full.kl, rel=2e-3) and full.kl > 0.01
        assert all_kept.gradient_norm == pytest.approx(full.gradient_norm, rel=2e-3)
        assert 0 < few.kl < full.kl


class Counting:
    """A teacher that notes how many sequences it was asked about."""

    def __init__(self, answers: NetworkAnswers) -> None:
        self.answers, self.asked = answers, 0

    def __call__(self, sequence: Batch) -> TopLogits:
        self.asked += 1
        return self.answers(sequence)


@pytest.mark.parametrize("keeps", [False, True])
def test_teachers_of_two_domains_teach_what_each_would_alone(base, teacher, tmp_path, keeps) -> None:
    """Gradients and distances are the sum of those of each domain's sequences with their teacher."""
    text = write_text(tmp_path / "text")
    teachers = {"count": teacher, "spell": Checkpoint.open(write_version(tmp_path / "second", seed=9))}
    asked = [{"version": {"model": name}, "domains": [name]} for name in teachers]
    linear = {"clip_norm": 1e9, "balance_coefficient": 0.0}
    wanted = job(text, "distill", teachers=asked, distillation=0.7, optimisation=linear)
    assert isinstance(wanted, DistillJob) and wanted.shares == ((1.0, 0.0), (0.0, 1.0))
    tokens = prepare(wanted.data, base.tokenizer_file, base.end_token, 0, tmp_path / "tokens")
    batches = TrainingSet.open(wanted, tokens).step(wanted, Mesh(), 0)
    of_domain = [batch.domain_BS[:, 0] for batch in batches]
    counts = dict(zip(teachers, torch.cat(of_domain).bincount().tolist(), strict=True))
    assert min(counts.values()) > 0

    def learn(shares: dict[str, tuple[float, ...]], sequences: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
        """Distances and gradients, summed over targets."""
        answers = {name: Counting(NetworkAnswers(teachers[name].network, VOCABULARY, 1.0)) for name in shares}
        folder = tmp_path / f"kept by {len(shares)}"
        kept = [(TopTeacher(answers[name], folder, name, VOCABULARY), share) for name, share in shares.items()]
        beside = [(teachers[name].network(), share) for name, share in shares.items()]
        trainer = Trainer(base.network(), wanted, None, () if keeps else beside, kept if keeps else ())
        report = trainer.step(0, sequences)
        if keeps:  # nobody is asked about what it does not teach
            assert {name: one.asked for name, one in answers.items()} == {name: counts[name] for name in shares}
        targets = sum(batch.num_targets for batch in sequences)
        return report.kl * targets, {one.name: one.gradient * targets for one in trainer.trainables}

    kl, gradients = learn(dict(zip(teachers, wanted.shares, strict=True)), batches)
    parts = []
    for number, name in enumerate(teachers):
        own = [batch.sequences(of == number) for batch, of in zip(batches, of_domain, strict=True)]
        parts.append(learn({name: (1.0, 1.0)}, [batch for batch in own if len(batch.ids_BS)]))
    assert kl == pytest.approx(sum(one for one, _ in parts), rel=1e-4) and min(one for one, _ in parts) > 1
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, parts[0][1][name] + parts[1][1][name], rtol=1e-3, atol=1e-3)


def test_shares_are_of_each_domains_teachers(tmp_path) -> None:
    about = [
        {"version": {"model": "a"}, "weight": 3.0},
        {"version": {"model": "b"}, "domains": ["spell"]},
    ]
    wanted = job(write_text(tmp_path), "distill", teachers=about)
    assert isinstance(wanted, DistillJob) and wanted.shares == ((1.0, 0.75), (0.0, 0.25))
    alone = job(write_text(tmp_path), "distill", teachers=about[1:])
    assert isinstance(alone, DistillJob) and alone.shares == ((0.0, 1.0),)
    with pytest.raises(ValueError, match=r"no domain 'spel', which a teacher names\. Did you mean 'spell'"):
        job(write_text(tmp_path), "distill", teachers=[{"version": {"model": "b"}, "domains": ["spel"]}])


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({}, "either version or endpoint"),
        ({"version": {"model": "a"}, "endpoint": {"base_url": "http://x", "model": "m"}}, "either version or endpoint"),
        ({"endpoint": {"base_url": "http://x", "model": "m"}}, "needs top_logits"),
        ({"endpoint": {"base_url": "x:80", "model": "m"}, "top_logits": 5}, "pattern"),
    ],
)
def test_a_teacher_that_makes_no_sense_is_refused(about, message) -> None:
    with pytest.raises(ValueError, match=message):
        Teacher(**about)


def test_an_endpoint_cannot_soften(tmp_path) -> None:
    about = {"endpoint": {"base_url": "http://x", "model": "m"}, "top_logits": 5}
    with pytest.raises(ValueError, match="tells its distribution at 1 only"):
        job(write_text(tmp_path), "distill", teachers=[about], temperature=2.0)
