"""When a part that died is started again. Pure: times in, a decision out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CALM_S = 120.0
FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0


@dataclass(frozen=True)
class Restart:
    """Start the part again, `delay_s` after its death."""

    delay_s: float


@dataclass(frozen=True)
class GiveUp:
    """The part never worked: starting it again would only repeat the error that its log already shows."""

    reason: str


def after_death(deaths_s: Sequence[float], *, was_ready: bool) -> Restart | GiveUp:
    """What to do about the newest of `deaths_s` (times, oldest first).

    A part that never became ready is not tried again. One that did is always started again: at once after a calm
    stretch, else after a delay that doubles with each death in a row, up to half a minute.
    """
    if not was_ready:
        return GiveUp("it ended before it was ready")
    in_a_row = 1
    for later, earlier in zip(reversed(deaths_s), reversed(deaths_s[:-1]), strict=False):
        if later - earlier > CALM_S:
            break
        in_a_row += 1
    return Restart(min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** (in_a_row - 1)))
