"""Measures a published version: perplexity by domain, accuracy on questions with choices, tasks of lm-eval.

T tokens, D hidden, V vocabulary, C choices, S sequence.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from tokenizers import Tokenizer

from zenray.model.network import MoDE
from zenray.spec.errors import InvalidValue, NotFound
from zenray.spec.evaluation import (
    ChoiceQuestions,
    ChoiceResult,
    DomainResult,
    EvaluateJob,
    EvaluationResult,
    HarnessTasks,
    TaskResult,
)
from zenray.spec.training import TrainingData
from zenray.storage.base import ObjectStore, Progress
from zenray.storage.cache import fetch
from zenray.storage.pinning import pinned
from zenray.training.data.stream import IGNORED, Batch, PackedDomain, pack
from zenray.training.data.tokens import prepare
from zenray.training.loss import head_loss, hidden_states
from zenray.training.networks import Checkpoint

_SEQUENCES_AT_ONCE = 4
_PADDING = 0  # any token: nothing is computed from it


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


@dataclass(frozen=True)
class Subject:
    """What is measured: a network in evaluation mode, and its tokenizer."""

    model: MoDE
    tokenizer: Tokenizer
    end_token: int
    most_tokens: int

    @torch.no_grad()
    def log_likelihoods(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """Of each continuation's tokens after the context, summed, and whether each was the likeliest token.

        InvalidValue for what is longer than the network's context.
        """
        longest = len(context) + max(len(one) for one in continuations)
        if longest - 1 > self.most_tokens:
            raise InvalidValue(f"{longest:,} tokens do not fit into a context of {self.most_tokens:,}.")
        batch = _rows([[*context, *one] for one in continuations], len(context))
        h_TD, _ = hidden_states(self.model, batch)
        h_CSD = h_TD.unflatten(0, batch.ids_BS.shape)
        found = []
        for row, labels_S in zip(h_CSD, batch.labels_BS, strict=True):
            counted = labels_S != IGNORED
            log_p_TV = F.linear(row[counted], self.model.lm_head.weight).float().log_softmax(dim=-1)
            targets_T = labels_S[counted]
            of_tokens = log_p_TV.gather(1, targets_T[:, None])
            found.append((float(of_tokens.double().sum()), bool((log_p_TV.argmax(dim=-1) == targets_T).all())))
        return found

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def evaluate(
    job: EvaluateJob, store: ObjectStore, work_dir: Path, *, progress: Progress | None = None
) -> EvaluationResult:
    """Ask everything that the job asks, in this process. Blocks.

    NotFound for an unknown version or file; InvalidValue for questions that cannot be read, and for lm-eval where it is
    not installed, before anything is downloaded.
    """
    questions = {asked.name: read_questions(asked) for asked in job.choices}
    if job.lm_eval is not None and importlib.util.find_spec("lm_eval") is None:
        raise InvalidValue(
            "This job asks for lm_eval, which is not installed.",
            hint="pip install 'zenray[evaluation]', or take `lm_eval` out of the job.",
        )
    ref = pinned(job.version, store)
    checkpoint = Checkpoint.open(fetch(store, ref, work_dir / "versions", progress=progress))
    model = checkpoint.network(getattr(torch, job.dtype)).eval().requires_grad_(False)
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_file))
    subject = Subject(model, tokenizer, checkpoint.end_token, model.config.max_position_embeddings)
    torch.set_flush_denormal(True)
    domains = tuple(_text(job, job.text, checkpoint, model, work_dir, progress)) if job.text is not None else ()
    choices = tuple(_choices(name, asked, subject, progress) for name, asked in questions.items())
    tasks = _harness(job.lm_eval, subject) if job.lm_eval is not None else ()
    return EvaluationResult(version=str(ref), domains=domains, choices=choices, tasks=tasks)


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
    job: EvaluateJob, data: TrainingData, checkpoint: Checkpoint, model: MoDE, work_dir: Path, progress: Progress | None
) -> Iterator[DomainResult]:
    tokens = prepare(data, checkpoint.tokenizer_file, checkpoint.end_token, job.seed, work_dir / "tokens")
    for domain in tokens.domains:
        packed = PackedDomain(tokens.load(domain, "validation"), data.sequence_tokens, job.seed).require_one()
        count = min(packed.num_sequences, job.sequences)
        loss, targets = 0.0, 0
        for first in range(0, count, _SEQUENCES_AT_ONCE):
            batch = pack([packed.at(index) for index in range(first, min(first + _SEQUENCES_AT_ONCE, count))])
            h_TD, _ = hidden_states(model, batch)
            loss += float(head_loss(h_TD, model.lm_head.weight, batch.labels_BS.flatten()).lm)
            targets += batch.num_targets
            if progress:
                progress(f"perplexity of {domain}", min(first + _SEQUENCES_AT_ONCE, count), count)
        mean = loss / max(targets, 1)
        yield DomainResult(domain=domain, loss=mean, perplexity=math.exp(mean), tokens=targets)


def _choices(name: str, questions: list[Question], subject: Subject, progress: Progress | None) -> ChoiceResult:
    """The choice with the highest log-likelihood per token is the answer; among equals the first."""
    right = 0
    for number, asked in enumerate(questions, 1):
        right += choose(asked, subject) == asked.answer
        if progress:
            progress(f"questions of {name}", number, len(questions))
    count = len(questions)
    accuracy = right / count
    return ChoiceResult(
        name=name,
        questions=count,
        accuracy=accuracy,
        standard_error=math.sqrt(accuracy * (1 - accuracy) / count),
        by_chance=sum(1 / len(asked.choices) for asked in questions) / count,
    )


def choose(asked: Question, subject: Subject) -> int:
    """The number of the choice that the network prefers. A space stands between question and choice."""
    gap = "" if asked.question[-1].isspace() else " "
    choices = [subject.encode(gap + choice) for choice in asked.choices]
    if not all(choices):
        raise InvalidValue(f"A choice of {asked.question[:60]!r} is empty.")
    scores = [
        total / len(tokens)
        for (total, _), tokens in zip(
            subject.log_likelihoods(subject.encode(asked.question), choices), choices, strict=True
        )
    ]
    return scores.index(max(scores))


def _rows(rows: Sequence[Sequence[int]], given: int) -> Batch:
    """Sequences side by side, padded on the right; their targets are the tokens after the first `given`."""
    S = max(len(row) for row in rows) - 1
    ids_BS = torch.full((len(rows), S), _PADDING)
    labels_BS = torch.full((len(rows), S), IGNORED)
    for place, row in enumerate(rows):
        ids_BS[place, : len(row) - 1] = torch.tensor(row[:-1])
        labels_BS[place, given - 1 : len(row) - 1] = torch.tensor(row[given:])
    # Padding comes last, and nothing looks ahead: it need not be told apart.
    return Batch(ids_BS, labels_BS, torch.arange(S).expand(len(rows), S), torch.zeros_like(ids_BS))


def _harness(wanted: HarnessTasks, subject: Subject) -> tuple[TaskResult, ...]:
    """lm-evaluation-harness over our network. NotFound for a task that it does not have."""
    import lm_eval
    from lm_eval.api.model import LM

    class Adapter(LM):
        """What the harness asks of a model; each request's `args` are its arguments."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [self._one(*request.args) for request in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [rolling(subject, request.args[0]) for request in requests]

        def generate_until(self, requests: list[Any]) -> list[str]:
            raise InvalidValue("A task of this job lets the model write; here only likelihoods are measured.")

        def _one(self, context: str, continuation: str) -> tuple[float, bool]:
            before = subject.encode(context) or [subject.end_token]
            return subject.log_likelihoods(before, [subject.encode(continuation)])[0]

    found = lm_eval.simple_evaluate(
        model=Adapter(), tasks=list(wanted.tasks), num_fewshot=wanted.few_shot, limit=wanted.most
    )
    return tuple(
        TaskResult(task=task, metric=metric, value=float(value))
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    )


def rolling(subject: Subject, text: str) -> float:
    """Log-likelihood of a whole text after the end token, in windows that fill the context."""
    tokens = subject.encode(text)
    total, before = 0.0, [subject.end_token]
    for start in range(0, len(tokens), subject.most_tokens):
        part = tokens[start : start + subject.most_tokens]
        total += subject.log_likelihoods(before, [part])[0][0]
        before = part[-1:]
    return total
