"""The seam to whatever runs Ray: one document of Serve applications goes in, their state comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from zenray.spec.serving import ServeApplication, ServeStatus


class ClusterBackend(Protocol):
    """A cluster that can run Serve applications. All methods block for at most 30 s and are idempotent.

    Raises ClusterUnavailable when the cluster cannot be reached; a broken application is a state, not an error.
    """

    def serve_status(self) -> ServeStatus:
        """What Ray Serve runs now. Empty before anything was ever applied."""

    def apply(self, applications: Sequence[ServeApplication]) -> None:
        """Make these applications, and no others, the wish. Returns before they run; poll `serve_status`."""
