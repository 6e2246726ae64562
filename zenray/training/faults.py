"""What to do about a step that would spoil a run: pure decisions over the run's history.

The history is part of every checkpoint, and everything here is a function of it: a run that is killed after a fault and
started again decides as it did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import median
from typing import Any, Literal

from zenray.spec.training import Faults

Action = Literal["take", "skip", "roll_back", "stop"]
_ROBUST = 1.4826  # of a normal distribution, the standard deviation is so many median absolute deviations


@dataclass(frozen=True)
class Decision:
    """`reason`: what was wrong, for a person; empty when the step is taken."""

    action: Action
    reason: str = ""


TAKE = Decision("take")


def decide(history: Sequence[dict[str, Any]], loss: float, norm: float, policy: Faults, checkpoint: int) -> Decision:
    """About a step of which loss and gradient norm are known and from which nothing was learnt yet.

    `checkpoint`: the step of the last one, 0 where there is none yet. The rules are those of `Faults`.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        action: Action = policy.not_finite
        reason = f"a loss of {loss:.4g} and a gradient norm of {norm:.4g} are not finite"
    else:
        if policy.diverging == "ignore":
            return TAKE
        action = policy.diverging
        reason = divergence(taken_losses(history, policy), loss, policy)
        if not reason:
            return TAKE
    if action == "stop":
        return Decision("stop", reason)
    before = in_a_row(history, checkpoint)
    if before >= policy.most_in_a_row:
        return Decision("stop", f"{reason}; it was so {before} times in a row before")
    if action == "roll_back" and checkpoint == 0:
        return Decision("stop", f"{reason}, and there is no checkpoint yet to go back to")
    return Decision(action, reason)


def divergence(losses: Sequence[float], loss: float, policy: Faults) -> str:
    """How far `loss` lies above the losses of the steps before; empty when that is no divergence."""
    if len(losses) < policy.window_steps:
        return ""
    middle = median(losses)
    spread = _ROBUST * median(abs(one - middle) for one in losses)
    rise = loss - middle
    if rise <= max(policy.least_rise, policy.deviations * spread):
        return ""
    return f"a loss of {loss:.4g} diverges from the last {len(losses)} steps' median of {middle:.4g} ± {spread:.2g}"


def taken_losses(history: Sequence[dict[str, Any]], policy: Faults) -> list[float]:
    """Of the last `window_steps` steps that were learnt from, or fewer; the oldest first."""
    found: list[float] = []
    for event in reversed(history):
        if event["event"] == "step" and not event["was_skipped"]:
            found.append(float(event["loss"]))
            if len(found) == policy.window_steps:
                break
    return found[::-1]


def in_a_row(history: Sequence[dict[str, Any]], checkpoint: int) -> int:
    """Steps skipped one after the other up to now, or rollbacks to `checkpoint`, whichever are more."""
    steps = (event["was_skipped"] for event in reversed(history) if event["event"] == "step")
    skipped = sum(1 for _ in takewhile(bool, steps))
    back = sum(event["event"] == "rolled_back" and event["step"] == checkpoint for event in history)
    return max(skipped, back)


def data_step(history: Sequence[dict[str, Any]], step: int) -> int:
    """The step whose data `step` reads: later than its own by what rollbacks left out."""
    return step + sum(event["from"] + 1 - event["step"] for event in history if event["event"] == "rolled_back")
