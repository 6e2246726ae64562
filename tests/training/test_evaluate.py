"""Evaluation against sums done by hand, and what it refuses."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from tests.training.tiny import END, write_text, write_version
from zenray.spec.errors import InvalidValue, NotFound
from zenray.spec.evaluation import EvaluateJob
from zenray.spec.versions import VersionRef
from zenray.storage.fake import FakeStore
from zenray.storage.versions import publish
from zenray.training.evaluate import Question, Subject, choose, evaluate, rolling
from zenray.training.networks import Checkpoint


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_version(tmp_path_factory.mktemp("evaluated") / "tiny", seed=3)


@pytest.fixture(scope="module")
def subject(version: Path) -> Subject:
    checkpoint = Checkpoint.open(version)
    return Subject(checkpoint.network().eval(), Tokenizer.from_file(str(checkpoint.tokenizer_file)), END, 4096)


@pytest.fixture
def store(version: Path) -> FakeStore:
    store = FakeStore()
    publish(store, VersionRef(model="tiny", version="v0"), version)
    return store


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
        assert choose(asked, subject) == means.index(max(means))
        totals = [sum(one) for one in sums]
        disagreements += totals.index(max(totals)) != means.index(max(means))
    assert disagreements, "otherwise this test would not see the difference"


def test_a_whole_text_is_scored_in_windows(subject: Subject) -> None:
    text = "nine bytes!"
    small = Subject(subject.model, subject.tokenizer, END, 4)
    tokens = subject.encode(text)
    expected = 0.0
    for start in range(0, len(tokens), 4):
        before = tokens[start - 1] if start else END
        expected += sum(alone(subject, [before], tokens[start : start + 4]))
    assert rolling(small, text) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(InvalidValue, match="do not fit into a context of 4"):
        small.log_likelihoods([1, 2, 3], [[4, 5, 6]])


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
    told: list[str] = []
    found = evaluate(
        job(text=text, sequences=6, choices=[write_questions(tmp_path, *lines)]),
        store,
        tmp_path / "work",
        progress=lambda phase, done, total: told.append(phase),
    )
    assert found.version == "tiny@v0/safetensors"
    assert [one.domain for one in found.domains] == ["count", "spell"]
    for one in found.domains:
        assert one.perplexity == pytest.approx(math.exp(one.loss)) and 100 < one.perplexity < 600 and one.tokens > 100
    (quiz,) = found.choices
    expected = [choose(Question.model_validate(line), subject) == line["answer"] for line in lines]
    assert quiz.accuracy == pytest.approx(sum(expected) / 6) and quiz.by_chance == 0.25 and quiz.questions == 6
    assert {"perplexity of count", "questions of quiz"} <= set(told)


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
        evaluate(job(choices=[write_questions(tmp_path, good, line)]), store, tmp_path)
    assert said in str(refused.value)
    with pytest.raises(NotFound, match="no such file"):
        evaluate(job(choices=[{"name": "quiz", "path": str(tmp_path / "gone.jsonl")}]), store, tmp_path)


def test_lm_eval_is_refused_where_it_is_not_installed(
    store: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidValue, match=r"zenray\[evaluation\]"):
        evaluate(job(lm_eval={"tasks": ["arc_easy"]}), store, tmp_path)
    assert not store.calls["get_range"], "before anything is downloaded"


def test_lm_eval_is_given_our_likelihoods(
    store: FakeStore, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the harness with its two entry points: what it asks and gets."""
    seen: dict[str, Any] = {}

    def simple_evaluate(model: Any, **how: Any) -> dict[str, Any]:
        seen.update(how)
        requests = [SimpleNamespace(args=("one", " two")), SimpleNamespace(args=("", "two"))]
        seen["scores"] = model.loglikelihood(requests)
        seen["rolling"] = model.loglikelihood_rolling([SimpleNamespace(args=("two",))])
        return {"results": {"arc_easy": {"acc,none": 0.25, "alias": "arc_easy"}}}

    harness = types.ModuleType("lm_eval")
    api, module = types.ModuleType("lm_eval.api"), types.ModuleType("lm_eval.api.model")
    harness.simple_evaluate, module.LM = simple_evaluate, object  # type: ignore[attr-defined]
    for name, one in {"lm_eval": harness, "lm_eval.api": api, "lm_eval.api.model": module}.items():
        monkeypatch.setitem(sys.modules, name, one)
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: harness if name == "lm_eval" else real(name))
    found = evaluate(job(lm_eval={"tasks": ["arc_easy"], "most": 3}), store, tmp_path)
    assert [(one.task, one.metric, one.value) for one in found.tasks] == [("arc_easy", "acc,none", 0.25)]
    assert (seen["tasks"], seen["limit"], seen["num_fewshot"]) == (["arc_easy"], 3, 0)
    expected = sum(alone(subject, subject.encode("one"), subject.encode(" two")))
    assert seen["scores"][0][0] == pytest.approx(expected, abs=1e-4)
    assert seen["scores"][1][0] == pytest.approx(seen["rolling"][0], abs=1e-5)
