"""Which exact versions a run starts from, and the name under which it can be resumed."""

from __future__ import annotations

from zenray.spec.jobs import job_id as run_name
from zenray.storage.pinning import pin, pinned

__all__ = ["pin", "pinned", "run_name"]
