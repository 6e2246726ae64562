"""Evaluation against sums done by hand, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.training.tiny import END, write_text, write_version
from zenray.spec.errors import InvalidValue, NotFound
from zenray.spec.evaluation import EvaluateJob, EvaluationResult
from zenray.spec.versions import VersionRef
from zenray.storage.fake import FakeStore
from zenray.storage.job_record import job_journal
from zenray.storage.versions import publish
from zenray.training.evaluate import Asked, Question, choose, evaluate
from zenray.training.events import EventPlace, EventStream
from zenray.training.harness import split
from zenray.training.networks import Checkpoint
from zenray.training.subject import Subject


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_version(tmp_path_factory.mktemp("evaluated") / "tiny", seed=3)


@pytest.fixture(scope="module")
def subject(version: Path) -> Subject:
    return Subject.open(Checkpoint.open(version), torch.float32, torch.device("cpu"))


@pytest.fixture
def store(version: Path) -> FakeStore:
    store = FakeStore()
    publish(store, VersionRef(model="tiny", version="v0"), version)
    return store


def run(wanted: EvaluateJob, store: FakeStore, folder: Path) -> tuple[EvaluationResult, list[dict[str, Any]]]:
    """The result, and the events."""
    with EventStream(store, EventPlace("look")) as tell:
        found = evaluate(wanted, store, folder, tell)
    return found, job_journal(store, "look").read(0)[0]


def alone(subject: Subject, context: list[int], continuation: list[int]) -> list[float]:
    """log p of each token of the continuation, from the network's own logits."""
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        log_p = subject.model(ids).logits[0].double().log_softmax(-1)
    return [float(log_p[len(context) - 1 + n, token]) for n, token in enumerate(continuation)]


def test_likelihoods_are_those_of_each_sequence_alone(subject: Subject) -> None:
    context, continuations = [5, 6, 7], [[8], [9, 10, 11, 12], [13, 14]]
    found = subject.log_likelihoods(context, continuations)
    for (total, is_likeliest), continuation in zip(found, continuations, strict=True):
        assert total == pytest.approx(sum(alone(subject, context, continuation)), abs=1e-4)
        assert not is_likeliest
    greedy: list[int] = []
    for _ in range(3):
        with torch.no_grad():
            greedy.append(int(subject.model(torch.tensor([[*context, *greedy]])).logits[0, -1].argmax()))
    assert subject.log_likelihoods(context, [greedy])[0][1]


def test_the_answer_has_the_highest_likelihood_per_token(subject: Subject) -> None:
    """Not in sum: a long choice is not punished for its length."""
    generator = torch.Generator().manual_seed(0)
    disagreements = 0
    for number in range(12):
        choices = ["x" * (1 + 6 * int(torch.randint(0, 3, (), generator=generator))) + str(n) for n in range(3)]
        asked = Question(question=f"Which of {number}?", choices=tuple(choices), answer=0)
        sums = [alone(subject, subject.encode(asked.question), subject.encode(" " + choice)) for choice in choices]
        means = [sum(one) / len(one) for one in sums]
        assert choose(Asked.of(asked, subject), subject) == means.index(max(means))
        totals = [sum(one) for one in sums]
        disagreements += totals.index(max(totals)) != means.index(max(means))
    assert disagreements, "otherwise this test would not see the difference"


def test_what_is_longer_than_the_context_is_scored_in_windows(subject: Subject) -> None:
    """Each token once: the first window begins with the end of what stands before, and the last one is filled."""
    small = replace(subject, most_tokens=4)
    before, tokens = [21, 22, 23], list(range(1, 7))
    first, last = alone(subject, [23], [1, 2, 3, 4]), alone(subject, [2, 3, 4], [5, 6])
    assert small.log_likelihood(before, tokens)[0] == pytest.approx(sum(first + last), abs=1e-4)
    (expected,) = subject.log_likelihoods([22, 23], [[1, 2, 3]])
    assert small.log_likelihood(before, [1, 2, 3]) == pytest.approx(expected), "the context loses its beginning"
    assert subject.log_likelihood(before, tokens) == pytest.approx(subject.log_likelihoods(before, [tokens])[0])
    with pytest.raises(InvalidValue, match="do not fit into a context of 4"):
        small.log_likelihoods([1, 2, 3], [[4, 5, 6]])


def test_a_network_is_where_it_is_told_to_be(version: Path) -> None:
    nowhere = Subject.open(Checkpoint.open(version), torch.bfloat16, torch.device("meta"))
    assert nowhere.device.type == "meta" and nowhere.model.lm_head.weight.dtype == torch.bfloat16


def job(**changes: Any) -> EvaluateJob:
    return EvaluateJob.model_validate({"kind": "evaluate", "name": "look", "version": {"model": "tiny"}, **changes})


def write_questions(folder: Path, *lines: Any) -> dict[str, str]:
    path = folder / "quiz.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"name": "quiz", "path": str(path)}


def test_a_version_is_measured_on_text_and_questions(store: FakeStore, subject: Subject, tmp_path: Path) -> None:
    text = {
        "sources": [{"domain": name, "path": str(path)} for name, path in write_text(tmp_path / "text").items()],
        "sequence_tokens": 32,
        "validation_share": 0.2,
    }
    lines = [{"question": f"{n}?", "choices": ["a", "bb", "ccc", "d"], "answer": n % 4} for n in range(6)]
    found, events = run(job(text=text, sequences=6, choices=[write_questions(tmp_path, *lines)]), store, tmp_path)
    assert found.version == "tiny@v0/safetensors"
    assert [one.domain for one in found.domains] == ["count", "spell"]
    for one in found.domains:
        assert one.perplexity == pytest.approx(math.exp(one.loss)) and 100 < one.perplexity < 600 and one.tokens > 100
    (quiz,) = found.choices
    expected = [choose(Asked.of(Question.model_validate(line), subject), subject) == line["answer"] for line in lines]
    assert quiz.accuracy == pytest.approx(sum(expected) / 6) and quiz.by_chance == 0.25 and quiz.questions == 6
    assert {"perplexity of count", "questions of quiz"} <= {event.get("what") for event in events}
    assert [event["data"] for event in events if event["event"] == "result"] == [found.model_dump(mode="json")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"question": "?", "choices": ["a"], "answer": 0}, "quiz.jsonl:2: choices"),
        ({"question": "?", "choices": ["a", "b"], "answer": 2}, "answer 2 is not one of 2 choices"),
        ({"question": "", "choices": ["a", "b"], "answer": 0}, "quiz.jsonl:2: question"),
        ("text", "quiz.jsonl:2"),
    ],
)
def test_questions_that_cannot_be_asked_are_named(store: FakeStore, tmp_path: Path, line: Any, said: str) -> None:
    good = {"question": "?", "choices": ["a", "b"], "answer": 0}
    with pytest.raises(InvalidValue) as refused:
        run(job(choices=[write_questions(tmp_path, good, line)]), store, tmp_path)
    assert said in str(refused.value)
    with pytest.raises(NotFound, match="no such file"):
        run(job(choices=[{"name": "quiz", "path": str(tmp_path / "gone.jsonl")}]), store, tmp_path)


def test_a_question_that_does_not_fit_is_named(subject: Subject) -> None:
    """Cut, it would be another question."""
    asked = Question(question="123456", choices=("78", "9"), answer=0)
    assert len(Asked.of(asked, replace(subject, most_tokens=8)).choices) == 2
    with pytest.raises(InvalidValue, match="'123456' and a choice are 8 tokens; the network's context is 7"):
        Asked.of(asked, replace(subject, most_tokens=7))


def test_lm_eval_is_refused_where_it_is_not_installed(
    store: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidValue, match=r"zenray\[evaluation\]"):
        run(job(lm_eval={"tasks": ["arc_easy"]}), store, tmp_path)
    assert not store.calls["get_range"], "before anything is downloaded"


class StandIn:
    """For lm-eval, which is not among the packages of the tests: what it asks and gets, in the shape that it has.

    `kinds`: of each task that it has, its output_type. `fails`: when the model is asked.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kinds: dict[str, str], *, fails: bool = False) -> None:
        self.kinds, self.fails, self.seen = kinds, fails, dict[str, Any]()
        harness, api, model = (types.ModuleType(f"lm_eval{name}") for name in ("", ".api", ".api.model"))
        tasks = types.ModuleType("lm_eval.tasks")
        vars(harness).update(simple_evaluate=self.simple_evaluate)
        vars(model).update(LM=object)
        vars(tasks).update(TaskManager=lambda: self)
        for module in (harness, api, model, tasks):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        real = importlib.util.find_spec
        monkeypatch.setattr("importlib.util.find_spec", lambda name: harness if name == "lm_eval" else real(name))

    def load(self, names: list[str]) -> dict[str, Any]:
        for name in names:
            if name not in self.kinds:
                raise KeyError(f"Spec {name!r} is not a registered task/group/tag name or valid YAML path")
        return {"tasks": {name: SimpleNamespace(get_config={"output_type": self.kinds[name]}.get) for name in names}}

    def simple_evaluate(self, model: Any, **how: Any) -> dict[str, Any]:
        if self.fails:
            raise RuntimeError("the hub is away")
        asked = [SimpleNamespace(args=args) for args in (("one", " two"), ("", "two"), ("one ", "two"))]
        whole = model.loglikelihood_rolling([SimpleNamespace(args=("two",))])
        self.seen = {**how, "scores": model.loglikelihood(asked), "rolling": whole}
        found = {"acc,none": 0.25, "acc_stderr,none": "N/A", "alias": "arc_easy", "sample_len": 3}
        return {"results": {"arc_easy": found}}


def test_lm_eval_is_given_our_likelihoods(
    store: FakeStore, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = StandIn(monkeypatch, {"arc_easy": "multiple_choice"})
    found, _ = run(job(lm_eval={"tasks": ["arc_easy"], "most": 3}), store, tmp_path)
    assert [(one.task, one.metric, one.value) for one in found.tasks] == [("arc_easy", "acc,none", 0.25)]
    seen = harness.seen
    assert (seen["tasks"], seen["limit"], seen["num_fewshot"]) == (["arc_easy"], 3, 0)
    expected = sum(alone(subject, subject.encode("one"), subject.encode(" two")))
    assert seen["scores"][0][0] == pytest.approx(expected, abs=1e-4)
    assert seen["scores"][1][0] == pytest.approx(seen["rolling"][0], abs=1e-5)
    assert seen["scores"][2] == seen["scores"][0], "a space belongs to what follows"
    assert split(subject, " ", "a") == ([END], subject.encode(" a"))
    merging = SimpleNamespace(encode={"(": [1], "()": [2], ")": [3], "( )": [1, 4]}.__getitem__, first_token=END)
    assert split(merging, "(", ")") == ([1], [3])  # type: ignore[arg-type]
    assert split(merging, "(", " )") == ([1], [4])  # type: ignore[arg-type]


def test_what_was_measured_is_told_before_tasks_fail(
    store: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    StandIn(monkeypatch, {"arc_easy": "multiple_choice"}, fails=True)
    quiz = write_questions(tmp_path, {"question": "?", "choices": ["a", "b"], "answer": 0})
    with pytest.raises(RuntimeError, match="the hub is away"):
        run(job(choices=[quiz], lm_eval={"tasks": ["arc_easy"]}), store, tmp_path)
    (told,) = (event for event in job_journal(store, "look").read(0)[0] if event["event"] == "result")
    assert told["data"]["choices"][0]["questions"] == 1


@pytest.mark.parametrize(
    ("task", "error", "said"),
    [("gsm8k", InvalidValue, "In gsm8k the model writes"), ("arc_esy", NotFound, "'arc_esy' is not a registered task")],
)
def test_tasks_that_cannot_be_asked_are_refused_first(
    store: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, error: type[Exception], said: str
) -> None:
    StandIn(monkeypatch, {"gsm8k": "generate_until"})
    with pytest.raises(error, match=said):
        run(job(lm_eval={"tasks": [task]}), store, tmp_path)
    assert not store.calls["get_range"], "before anything is downloaded"
