"""Measures a published version: perplexity by domain, accuracy on questions with choices, tasks of lm-eval.

T tokens, D hidden, B sequences of S tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from zenray.model.attribution import Attribution
from zenray.model.distillation import head_loss
from zenray.spec.errors import InvalidValue, NotFound
from zenray.spec.evaluation import ChoiceQuestions, ChoiceResult, DomainResult, EvaluateJob, EvaluationResult
from zenray.spec.job_events import Result
from zenray.spec.jobs import job_id
from zenray.spec.training import TrainingData
from zenray.storage.base import ObjectStore, Progress
from zenray.storage.cache import fetch
from zenray.storage.pinning import pinned
from zenray.training.attributing import start_attribution, write_attribution
from zenray.training.data.stream import PackedDomain, pack
from zenray.training.data.tokens import prepare
from zenray.training.events import EventStream, ProgressEvents
from zenray.training.harness import ask_tasks, check_tasks
from zenray.training.loss import hidden_states
from zenray.training.networks import Checkpoint
from zenray.training.subject import Subject

_SEQUENCES_AT_ONCE = 4


class Question(BaseModel):
    """One line of a user's file."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    question: str = Field(min_length=1)
    choices: tuple[str, ...] = Field(min_length=2)
    answer: int = Field(ge=0)

    @model_validator(mode="after")
    def _is_a_choice(self) -> Question:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer {self.answer} is not one of {len(self.choices)} choices, counted from 0")
        return self


Questions = Mapping[str, list[Question]]


def evaluate(
    job: EvaluateJob,
    store: ObjectStore,
    work_dir: Path,
    tell: EventStream,
    questions: Questions | None = None,
    *,
    device: torch.device | None = None,
) -> EvaluationResult:
    """Ask everything that the job asks, in this process, on the CPU unless `device` is given. Blocks.

    `questions`: the job's, where they have been read already, as its files may not be on this machine.

    `tell` has what was found before the tasks of lm-eval are asked, which may still fail. NotFound for an unknown
    version, file or task; InvalidValue for questions and tasks that cannot be asked, before anything is measured.
    """
    questions = questions_of(job) if questions is None else questions
    if job.lm_eval is not None:
        check_tasks(job.lm_eval)
    progress = ProgressEvents(tell)
    ref = pinned(job.version, store)
    checkpoint = Checkpoint.open(fetch(store, ref, work_dir / "versions", progress=progress))
    subject = Subject.open(checkpoint, getattr(torch, job.dtype), device or torch.device("cpu"))
    quizzes = {name: [Asked.of(one, subject) for one in asked] for name, asked in questions.items()}
    torch.set_flush_denormal(True)
    watched = start_attribution(subject.model, str(ref), job.attribution.tokens) if job.attribution else None
    domains: tuple[DomainResult, ...] = ()
    if job.text is not None:
        domains = tuple(_text(job, job.text, checkpoint, subject, work_dir, progress, watched))
    page = write_attribution(watched, subject.tokenizer, store, job_id(job)) if watched else None
    choices = tuple(_choices(name, asked, subject, progress) for name, asked in quizzes.items())
    found = EvaluationResult(version=str(ref), domains=domains, choices=choices, attribution=page)
    if domains or choices:
        tell(Result(data=found.model_dump(mode="json")))
    if job.lm_eval is not None:
        tasks = EvaluationResult(version=str(ref), tasks=ask_tasks(job.lm_eval, subject))
        tell(Result(data=tasks.model_dump(mode="json")))
        found = found.model_copy(update={"tasks": tasks.tasks})
    return found


def questions_of(job: EvaluateJob) -> Questions:
    """All that the job asks, by its name. NotFound, InvalidValue naming the line."""
    return {asked.name: read_questions(asked) for asked in job.choices}


def read_questions(asked: ChoiceQuestions) -> list[Question]:
    """The file's questions. NotFound, InvalidValue naming the line."""
    path = Path(asked.path)
    if not path.is_file():
        raise NotFound(f"{path}: no such file.", hint="`choices` names .jsonl files of questions.")
    found: list[Question] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip() or (asked.most is not None and len(found) >= asked.most):
                continue
            try:
                found.append(Question.model_validate_json(line))
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"])) or "the line"
                raise InvalidValue(f"{path}:{number}: {where}: {first['msg']}.") from None
    if not found:
        raise InvalidValue(f"{path} has no questions.")
    return found


@torch.no_grad()
def _text(
    job: EvaluateJob,
    data: TrainingData,
    checkpoint: Checkpoint,
    subject: Subject,
    work_dir: Path,
    progress: Progress,
    watched: Attribution | None,
) -> Iterator[DomainResult]:
    tokens = prepare(data, checkpoint.tokenizer_file, checkpoint.end_token, job.seed, work_dir / "tokens")
    for domain in tokens.domains:
        packed = PackedDomain(tokens.load(domain, "validation"), data.sequence_tokens, job.seed).require_one()
        count = min(packed.num_sequences, job.sequences)
        loss, targets = 0.0, 0
        for first in range(0, count, _SEQUENCES_AT_ONCE):
            last = min(first + _SEQUENCES_AT_ONCE, count)
            batch = pack([packed.at(index) for index in range(first, last)])
            targets += batch.num_targets
            batch = batch.to(subject.device)
            with watched.watch(batch.ids_BS) if watched else nullcontext():
                h_TD, _ = hidden_states(subject.model, batch)
            loss += float(head_loss(h_TD, subject.model.lm_head.weight, batch.labels_BS.flatten()).lm)
            progress(f"perplexity of {domain}", last, count)
        mean = loss / max(targets, 1)
        yield DomainResult(domain=domain, loss=mean, perplexity=math.exp(mean), tokens=targets)


@dataclass(frozen=True)
class Asked:
    """A question in tokens. A space stands between question and choice."""

    question: list[int]
    choices: list[list[int]]
    answer: int

    @classmethod
    def of(cls, asked: Question, subject: Subject) -> Asked:
        """InvalidValue for what the network cannot be asked."""
        gap = "" if asked.question[-1].isspace() else " "
        question, choices = subject.encode(asked.question), [subject.encode(gap + choice) for choice in asked.choices]
        if not all(choices):
            raise InvalidValue(f"A choice of {asked.question[:60]!r} is empty.")
        longest = len(question) + max(len(choice) for choice in choices) - 1
        if longest > subject.most_tokens:
            raise InvalidValue(
                f"{asked.question[:60]!r} and a choice are {longest:,} tokens; the network's context is "
                f"{subject.most_tokens:,}."
            )
        return cls(question, choices, asked.answer)


def _choices(name: str, quiz: list[Asked], subject: Subject, progress: Progress) -> ChoiceResult:
    """The choice with the highest log-likelihood per token is the answer; among equals the first."""
    right = 0
    for number, asked in enumerate(quiz, 1):
        right += choose(asked, subject) == asked.answer
        progress(f"questions of {name}", number, len(quiz))
    count = len(quiz)
    accuracy = right / count
    return ChoiceResult(
        name=name,
        questions=count,
        accuracy=accuracy,
        standard_error=math.sqrt(accuracy * (1 - accuracy) / count),
        by_chance=sum(1 / len(asked.choices) for asked in quiz) / count,
    )


def choose(asked: Asked, subject: Subject) -> int:
    """The number of the choice that the network prefers."""
    found = subject.log_likelihoods(asked.question, asked.choices)
    scores = [total / len(tokens) for (total, _), tokens in zip(found, asked.choices, strict=True)]
    return scores.index(max(scores))
