"""What an engine reports of its load to the autoscaler, beside the requests that Ray Serve counts itself."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass

from zenray.serving.scaling import FIRST_TOKENS_WINDOW_S


@dataclass(frozen=True)
class EngineLoad:
    """One engine at one moment. The names are those of the metrics that the replica reports."""

    computing: float = 0  # sequences in its batch
    waiting: float = 0  # sequences that it holds back
    kv_cache_use: float = 0  # 0…1; data parallel engines of one replica are averaged
    first_tokens: float = 0  # of the last FIRST_TOKENS_WINDOW_S
    late_first_tokens: float = 0  # of these, later than the target; 0 without one

    def as_metrics(self) -> dict[str, float]:
        return {name: float(value) for name, value in asdict(self).items()}


class FirstTokens:
    """Counts first tokens, and those later than `target_s`, over a sliding window, by whole seconds: bounded memory.

    Counts can be added up over replicas, which percentiles cannot: p99 is above the target exactly when more than one
    in a hundred is late.
    """

    def __init__(self, target_s: float | None, window_s: float = FIRST_TOKENS_WINDOW_S) -> None:
        self._target_s = target_s
        self._window_s = window_s
        self._seconds: deque[list[int]] = deque()  # [second, first tokens, late ones]

    def add(self, ttft_s: float, now_s: float) -> None:
        second = int(now_s)
        if not self._seconds or self._seconds[-1][0] != second:
            self._drop(now_s)
            self._seconds.append([second, 0, 0])
        self._seconds[-1][1] += 1
        self._seconds[-1][2] += self._target_s is not None and ttft_s > self._target_s

    def counts(self, now_s: float) -> tuple[int, int]:
        """(all, late) of the window."""
        self._drop(now_s)
        return sum(entry[1] for entry in self._seconds), sum(entry[2] for entry in self._seconds)

    def _drop(self, now_s: float) -> None:
        while self._seconds and self._seconds[0][0] < int(now_s) - self._window_s:
            self._seconds.popleft()
