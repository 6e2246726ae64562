"""Notice that this worker will be taken away: a signal to its process, or Ray's own word that its node drains."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

import ray
import ray.train

_given = threading.Event()
_ASK_RAY_EVERY_S = 5.0


def watch_for_notice() -> None:
    """From now on the first SIGTERM to this process is a notice; a second one ends it as before. For main threads."""
    before = signal.getsignal(signal.SIGTERM)

    def give(number: int, frame: FrameType | None) -> None:
        _given.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, give)


def watch_in_actor() -> None:
    """`watch_for_notice` in the main thread of the Ray Train worker whose training thread this is."""
    actor = ray.get_runtime_context().current_actor
    ray.get(actor.execute.remote(watch_for_notice))


class Notice:
    """Of a signal to this process, which is known at once, and of a node that Ray drains, which all workers ask for
    together, now and then."""

    def __init__(self) -> None:
        self._next_question_s = 0.0

    def is_due(self) -> bool:
        return time.monotonic() >= self._next_question_s

    def is_given(self) -> bool:
        return _given.is_set()

    def ask(self) -> bool:
        self._next_question_s = time.monotonic() + _ASK_RAY_EVERY_S  # here, so that all workers count from one moment
        return ray.train.get_preemption_info() is not None
