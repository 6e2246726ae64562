"""A Ray head that dies while it starts: tried once more, then said with the end of its log."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from zenray.cluster.head import LocalRay
from zenray.cluster.session import SessionRecord
from zenray.spec.errors import ClusterUnavailable
from zenray.spec.platform import RaySettings


class DyingRay(LocalRay):
    """Its command writes a line and ends, by itself or with its first signal."""

    tries = 0
    last_words = "raise SystemExit(3)"

    def _command(self, ports: dict[str, int], temp_dir: Path) -> list[str]:
        self.tries += 1
        return [sys.executable, "-c", f"print('raylet did not answer, try {self.tries}'); {self.last_words}"]


def test_it_is_tried_once_more_and_then_the_end_of_its_log_is_shown(tmp_path: Path) -> None:
    ray = DyingRay(tmp_path, RaySettings(gcs_port=0, dashboard_port=0, serve_port=0))
    with pytest.raises(ClusterUnavailable, match="raylet did not answer, try 2"):
        ray.start()
    assert ray.tries == 2
    assert ray.end_remains() == 0, "nothing is left of it"


def test_a_start_that_cannot_be_written_down_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = DyingRay(tmp_path, RaySettings(gcs_port=0, dashboard_port=0, serve_port=0))
    ray.last_words = "import time; time.sleep(60)"
    seen = []

    def full(record: SessionRecord, path: Path) -> None:
        seen.append(record)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SessionRecord, "write", full)
    with pytest.raises(OSError, match="No space left"):
        ray.start()
    assert seen[0].processes() == []
