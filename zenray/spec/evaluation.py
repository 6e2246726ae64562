"""Evaluation jobs: what a published version is asked, and what came out."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from zenray.spec.documents import Document
from zenray.spec.lineage import BaseVersion, NewVersion
from zenray.spec.training import TrainingData
from zenray.spec.versions import check_name


class ChoiceQuestions(Document):
    """A .jsonl file, each line {"question": …, "choices": [… at least two], "answer": its number from 0}.

    Each choice is scored by the log-likelihood of its tokens after the question, divided by their number
    (length-normalised); the highest score is the model's answer.
    """

    name: str = Field(min_length=1)
    path: str
    most: int | None = Field(None, ge=1, description="Ask only so many, from the file's start; None: all.")


class HarnessTasks(Document):
    """Tasks of EleutherAI's lm-evaluation-harness: needs the optional package `lm-eval`, and the network for data.

    Only tasks of likelihoods. What does not fit into the network's context loses its beginning.
    """

    tasks: tuple[str, ...] = Field(min_length=1, description="Names, or absolute paths of task files in YAML.")
    few_shot: int = Field(0, ge=0)
    most: int | None = Field(None, ge=1, description="Documents of each task, at most; None: all.")


class AttributionSettings(Document):
    """For each expert, the tokens of the held-out text that activate it most strongly, as data and as a page."""

    tokens: int = Field(10_000, ge=1, description="Kept of each expert.")


class EvaluateJob(Document):
    """Measure a version: perplexity on held-out text of each domain, accuracy on questions, tasks of lm-eval."""

    kind: Literal["evaluate"]
    name: str
    version: BaseVersion
    text: TrainingData | None = Field(
        None, description="Its held-out part is read, as a training job would hold it out."
    )
    sequences: int = Field(64, ge=1, description="Of each domain's held-out part, at most.")
    attribution: AttributionSettings | None = Field(
        None, description="What each expert works on in that text; `{}` for the blog's 10,000 tokens of each."
    )
    seed: int = Field(0, description="Which documents are held out: the seed of the training job, for the same ones.")
    choices: tuple[ChoiceQuestions, ...] = ()
    lm_eval: HarnessTasks | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    gpu: bool = Field(
        False,
        description="On one GPU, which must have room for the whole network; else on the CPU, where the job runs.",
    )

    @field_validator("name")
    @classmethod
    def _legal(cls, value: str) -> str:
        return check_name("job", value)

    @model_validator(mode="after")
    def _asks_something(self) -> EvaluateJob:
        if self.text is None and not self.choices and self.lm_eval is None:
            raise ValueError("nothing is asked: write text, choices or lm_eval")
        if self.text is not None and self.text.validation_share == 0:
            raise ValueError("text.validation_share is 0: nothing is held out to measure on")
        if self.attribution is not None and self.text is None:
            raise ValueError("attribution is asked for, but there is no text to see experts at work")
        return self


class DomainResult(BaseModel):
    """`perplexity` is exp of `loss`, the mean negative log-likelihood over `tokens` targets."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    domain: str
    loss: float
    perplexity: float
    tokens: int


class ChoiceResult(BaseModel):
    """`accuracy` with length-normalised scores; `standard_error` is that of a proportion."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    questions: int
    accuracy: float
    standard_error: float
    by_chance: float


class TaskResult(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    task: str
    metric: str
    value: float


class EvaluationResult(BaseModel):
    """What one evaluation job found, of one version."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    version: str
    domains: tuple[DomainResult, ...] = ()
    choices: tuple[ChoiceResult, ...] = ()
    tasks: tuple[TaskResult, ...] = ()
    attribution: str | None = None  # where the page is; the data lie beside it


class PublishJob(Document):
    """Publish an evaluated version under the name that it is served by, unless it is not good enough."""

    kind: Literal["publish"]
    name: str
    version: BaseVersion
    into: NewVersion
    largest_perplexity: dict[str, float] = Field(
        default_factory=dict, description="Of each domain named: a version above it is refused."
    )
    least_accuracy: dict[str, float] = Field(
        default_factory=dict, description="Of each set of questions named: a version below it is refused."
    )

    @field_validator("name")
    @classmethod
    def _legal(cls, value: str) -> str:
        return check_name("job", value)
