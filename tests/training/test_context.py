"""How sequences are cut for workers that share them, and what cannot be cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.training import tiny
from zenray.model.config import ExpertGroup
from zenray.model.network import MoDE
from zenray.spec.errors import InvalidValue
from zenray.spec.platform import StorageSettings
from zenray.spec.versions import VersionRef
from zenray.storage.opening import open_store
from zenray.storage.versions import publish
from zenray.training.context_parallel import own_places, part_of
from zenray.training.data.stream import Batch, pack
from zenray.training.mesh import Mesh
from zenray.training.runner import run
from zenray.training.trainer import Trainer


class Shared(Mesh):
    """A worker's place among those that share a sequence, without a process group."""

    context_size, context_rank = property(lambda self: self.of[0]), property(lambda self: self.of[1])

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        object.__setattr__(self, "of", (size, rank))


def batch(length: int) -> Batch:
    """Two sequences of documents of 5 and 3 tokens in turn."""
    documents = np.cumsum(np.isin(np.arange(length + 1) % 8, (0, 5)))
    return pack([(np.arange(start, start + length + 1), documents) for start in (0, 100)])


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_every_token_is_computed_once_and_all_workers_see_as_much(workers: int) -> None:
    length = 4 * workers
    places = [own_places(length, workers, rank) for rank in range(workers)]
    assert sorted(torch.cat(places).tolist()) == list(range(length))
    assert len({int((one + 1).sum()) for one in places}) == 1  # keys that causal queries see
    assert all((one.diff() > 0).all() for one in places)


@pytest.mark.parametrize("window", [None, 3])
def test_labels_positions_and_masks_are_those_of_the_whole_sequence(window: int | None) -> None:
    whole = batch(16)
    found = [part_of(whole, Shared(4, rank)) for rank in range(4)]
    for name in ("ids_BS", "labels_BS", "positions_BS", "document_BS"):
        put_together = torch.full_like(whole.ids_BS, -1)
        for rank, part in enumerate(found):
            put_together[:, own_places(16, 4, rank)] = getattr(part, name)
        assert torch.equal(put_together, getattr(whole, name))
    for rank, part in enumerate(found):
        assert torch.equal(part.mask(window), whole.mask(window)[:, :, own_places(16, 4, rank)])
        assert torch.equal(part.to(torch.device("cpu")).mask(window), part.mask(window))
    assert sum(part.num_targets for part in found) == whole.num_targets
    assert part_of(whole, Mesh()) is whole


def test_sequences_that_cannot_be_cut_equally_are_refused_with_what_can(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue) as refused:
        part_of(batch(20), Shared(4, 0))
    assert "16 or 24 tokens" in str(refused.value.hint) and "context_parallel of 1, 2, 5, 10" in str(refused.value.hint)
    text = tiny.write_text(tmp_path / "text")
    with pytest.raises(ValidationError, match=r"32 tokens cannot be cut into 6 equal chunks.*30 or 36 tokens"):
        tiny.job(text, workers={"count": 3, "context_parallel": 3}, sequences_per_step=2)


def test_a_job_with_spatial_experts_is_refused_before_anything_starts(tmp_path: Path) -> None:
    groups = (*tiny.CONFIG.expert_groups, ExpertGroup("vision", 1, 16, "spatial"))
    folder = tiny.write_version(tmp_path / "made", replace(tiny.CONFIG, expert_groups=groups))
    storage = StorageSettings(uri=f"file:{tmp_path / 'store'}")
    publish(open_store(storage), VersionRef(model="tiny", version="v0"), folder)
    asked = tiny.job(tiny.write_text(tmp_path / "text"), workers={"count": 2, "context_parallel": 2})
    with pytest.raises(InvalidValue, match="Spatial experts need whole sequences, and 2 workers share each"):
        run(asked, storage, tmp_path / "work")
    assert not (tmp_path / "work" / "runs").exists()


def test_a_job_may_set_how_much_even_loads_count(tmp_path: Path) -> None:
    text, model = tiny.write_text(tmp_path / "text"), MoDE(tiny.CONFIG)
    state = model.state_dict()
    found = []
    for coefficient in (None, 0.0, 1.0):
        model = MoDE(tiny.CONFIG)
        model.load_state_dict(state)
        asked = tiny.job(text, optimisation={"balance_coefficient": coefficient})
        found.append(Trainer(model, asked).step(0, [batch(16)]))
    assert found[0].balance == pytest.approx(0.01 * found[2].balance, rel=1e-4) and found[2].balance > 0.5
    assert found[1].balance == 0
