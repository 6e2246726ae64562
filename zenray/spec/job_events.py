"""What a job says while it runs: typed events, written by the job, kept by control, shown as a progress bar."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter


class _Event(BaseModel):
    """`at`: seconds since the epoch. `phase`: of a pipeline, the name of the job that speaks."""

    model_config = ConfigDict(extra="ignore", frozen=True, ser_json_inf_nan="strings")

    at: float = Field(default_factory=time.time)
    phase: str | None = None


class Started(_Event):
    """A process has taken the job up. `first_step`: where it goes on; `steps`: of all, for training."""

    event: Literal["started"] = "started"
    kind: str
    steps: int | None = None


class Progress(_Event):
    """A long piece of work that is not counted in steps: a download, an upload, layers that are made."""

    event: Literal["progress"] = "progress"
    what: str
    done: int
    total: int


class Step(_Event):
    """One optimiser step. Losses are means over all targets; per-layer lists go by sparse layer."""

    event: Literal["step"] = "step"
    step: int
    loss: float
    lm_loss: float = 0.0
    kl: float = 0.0
    balance: float = 0.0
    gradient_norm: float = 0.0
    gradient_norms: dict[str, float] = Field(default_factory=dict)
    learning_rate: float = 0.0
    tokens: int = 0
    tokens_per_s: float = 0.0
    was_skipped: bool = False
    fault: str | None = Field(None, description="Why nothing was learnt from it.")
    entropy_ratios: list[float] = Field(default_factory=list, description="H / log E; 1 is even.")
    effective_ratios: list[float] = Field(
        default_factory=list, description="exp(H) / E, the share of experts in effective use; 1 is even."
    )
    max_violations: list[float] = Field(default_factory=list, description="Largest load / mean load − 1; 0 is even.")
    loads: list[list[float]] = Field(default_factory=list, description="Share of the routed tokens of each expert.")
    dropped_choices: list[int] = Field(
        default_factory=list, description="A token chose an expert that had no room for it (capacity)."
    )
    fallback_tokens: list[int] = Field(
        default_factory=list, description="Tokens that lost at least one expert so, and have the shared one instead."
    )
    mfu: float | None = Field(None, description="Share of the hardware's peak arithmetic; None: the peak is unknown.")
    memory_bytes: int | None = Field(None, description="The most that one worker has held.")
    communication_share: float | None = Field(None, description="Of the step's time, on the first worker.")

    @property
    def entropy(self) -> float | None:
        """H / log E of the most unevenly loaded layer; 1 is even."""
        return min(self.entropy_ratios, default=None)


class Placed(_Event):
    """How many workers a run starts now. `missing`: what they wait for; None: they have it."""

    event: Literal["workers"] = "workers"
    count: int
    missing: str | None = None


class Evaluated(_Event):
    """Mean loss on a domain's held-out text after so many steps; those of teachers, once."""

    model_config = ConfigDict(extra="allow", frozen=True, ser_json_inf_nan="strings")

    event: Literal["evaluation"] = "evaluation"
    step: int
    domain: str
    loss: float


class Checkpointed(_Event):
    event: Literal["checkpoint"] = "checkpoint"
    step: int


class Phase(_Event):
    """A phase of a pipeline. `skipped`: what it makes is there already."""

    event: Literal["phase"] = "phase"
    name: str
    number: int
    of: int
    state: Literal["started", "done", "skipped"]


class Published(_Event):
    event: Literal["published"] = "published"
    ref: str
    size_bytes: int = 0
    report: str | None = Field(None, description="Where the page with the plots lies.")


class Result(_Event):
    """What an evaluation has found so far and not told before: `zenray.spec.evaluation.EvaluationResult` as JSON."""

    event: Literal["result"] = "result"
    data: dict[str, Any]


class StateChanged(_Event):
    """Written by control: the job's state, and why it changed."""

    event: Literal["state"] = "state"
    from_state: str | None
    to_state: str
    message: str | None = None


class Ended(_Event):
    """The last word of a job's process."""

    event: Literal["ended"] = "ended"
    outcome: Literal["succeeded", "failed"]
    message: str | None = None


class Note(_Event):
    """An event that this version has no type for: shown by its name."""

    model_config = ConfigDict(extra="allow", frozen=True, ser_json_inf_nan="strings")

    event: str


_KNOWN = (Started, Progress, Placed, Step, Evaluated, Checkpointed, Phase, Published, Result, StateChanged, Ended)
_NAMES = frozenset(kind.model_fields["event"].default for kind in _KNOWN)


def _tag(value: Any) -> str:
    name = value.get("event") if isinstance(value, dict) else value.event
    return str(name) if name in _NAMES else "note"


JobEvent = Annotated[
    Annotated[Started, Tag("started")]
    | Annotated[Progress, Tag("progress")]
    | Annotated[Placed, Tag("workers")]
    | Annotated[Step, Tag("step")]
    | Annotated[Evaluated, Tag("evaluation")]
    | Annotated[Checkpointed, Tag("checkpoint")]
    | Annotated[Phase, Tag("phase")]
    | Annotated[Published, Tag("published")]
    | Annotated[Result, Tag("result")]
    | Annotated[StateChanged, Tag("state")]
    | Annotated[Ended, Tag("ended")]
    | Annotated[Note, Tag("note")],
    Discriminator(_tag),
]
_ADAPTER: TypeAdapter[JobEvent] = TypeAdapter(JobEvent)


def parse_event(value: dict[str, Any]) -> JobEvent:
    """An event as it came from JSON. Unknown kinds become a Note; pydantic's ValidationError for a broken known one."""
    return _ADAPTER.validate_python(value)


def in_words(event: JobEvent) -> str:
    """One line for a person."""
    said = _said(event)
    return f"{event.phase}: {said}" if event.phase else said


def _said(event: JobEvent) -> str:
    if isinstance(event, Step):
        parts = [f"step {event.step + 1}", f"loss {event.loss:.4f}", f"lm {event.lm_loss:.4f}"]
        parts += [f"kl {event.kl:.4f}"] if event.kl else []
        parts += [f"entropy {event.entropy:.3f}"] if event.entropy is not None else []
        parts += [f"norm {event.gradient_norm:.2f}", f"{event.tokens_per_s:,.0f} tokens/s"]
        return "  ".join(parts) + (f"  NOT LEARNT FROM: {event.fault or 'not finite'}" if event.was_skipped else "")
    if isinstance(event, Evaluated):
        teachers = [f"{name} {value:.4f}" for name, value in (event.model_extra or {}).items() if "teacher" in name]
        return "  ".join([f"step {event.step}  held-out {event.domain}: loss {event.loss:.4f}", *teachers])
    if isinstance(event, Started):
        return f"started: {event.kind}" + (f", {event.steps} steps" if event.steps else "")
    if isinstance(event, Progress):
        return f"{event.what} {event.done / max(event.total, 1):.0%}"
    if isinstance(event, Placed):
        return f"{event.count} workers start" if event.missing is None else f"waiting for workers: {event.missing}"
    if isinstance(event, Checkpointed):
        return f"step {event.step}  checkpoint"
    if isinstance(event, Phase):
        return f"phase {event.number} of {event.of}, {event.name}: {event.state}"
    if isinstance(event, Published):
        report = f"; its report: {event.report}" if event.report else ""
        return f"published {event.ref} ({event.size_bytes / 1e6:,.0f} MB){report}"
    if isinstance(event, StateChanged):
        return event.to_state + (f": {event.message}" if event.message else "")
    if isinstance(event, Ended):
        return event.outcome + (f": {event.message}" if event.message else "")
    if isinstance(event, Result):
        return "result"
    return _said_of_note(event)


def _said_of_note(event: Note) -> str:
    about = event.model_extra or {}
    place = f"step {about['step']}  " if "step" in about else ""
    return place + event.event.replace("_", " ") + (f": {about['fault']}" if about.get("fault") else "")
