"""Where rows go between ranks, without any rank; the exchange itself is in tests/parity/test_training_parallel.py."""

from __future__ import annotations

import torch

from zenray.training.expert_parallel import _transpose_blocks


def test_blocks_change_places_without_a_look_at_their_sizes() -> None:
    """Also on the meta device, which has no values: on a GPU a look would be a second wait in every layer."""
    rows_nF = torch.tensor([[2, 0, 1], [1, 3, 0]])
    there, back = _transpose_blocks(rows_nF, 7)
    came = ["r0e0", "r0e0", "r0e2", "r1e0", "r1e1", "r1e1", "r1e1"]
    by_expert = [came[place] for place in there]
    assert by_expert == ["r0e0", "r0e0", "r1e0", "r1e1", "r1e1", "r1e1", "r0e2"]
    assert [by_expert[place] for place in back] == came
    nowhere, _ = _transpose_blocks(rows_nF.to("meta"), 7)
    assert nowhere.shape == (7,)
