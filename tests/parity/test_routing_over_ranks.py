"""Capacity, expert choice and its thresholds on several ranks: each looks at one worker's pass alone.

So ranks equal one process that takes every rank's part of every pass as a pass of its own. The balance losses, whose
loads are those of the passes so far, have no part in it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.parity.training_ranks import (
    BASE,
    UNCLIPPED,
    Case,
    Found,
    Layout,
    batches_of,
    check_ratio,
    find,
    make_trainer,
    on_ranks,
    whole,
)
from zenray.model.config import RouterConfig
from zenray.training.trainer import Trainer

pytestmark = pytest.mark.parity
RATIO = 1e-5
STEPS, RANKS = 2, 2  # experts choose in the first step; in the second, thresholds do
LAYOUTS = (Layout(1), Layout(2), Layout(2, True))
CASE = Case(
    replace(
        BASE,
        sparse_layers=(0, 1, 2),
        expert_choice_layers=(0,),
        shared_expert_width=8,
        router=RouterConfig(
            balance_coefficient=0.0,
            z_coefficient=1e-2,
            selection_bias=True,
            capacity_factor=1.0,
            threshold_warmup_steps=1,
        ),
    ),
    UNCLIPPED,
)
Learnt = dict[str, torch.Tensor]


def learnt(trainer: Trainer) -> Learnt:
    """What routers learn without gradients."""
    return {name: buffer.clone() for name, buffer in trainer.model.named_buffers() if ".gate." in name}


def on_this_rank() -> dict[Layout, tuple[Found, Learnt]]:
    found = {}
    for layout in LAYOUTS:
        trainer = make_trainer(CASE, layout.mesh())
        steps = [batches_of(dist.get_rank(), RANKS, step) for step in range(STEPS)]
        found[layout] = find(trainer, steps), learnt(trainer)
    return found


def test_ranks_are_one_process_with_their_passes(tmp_path: Path) -> None:
    trainer = make_trainer(CASE)
    passes = [[batch for rank in range(RANKS) for batch in batches_of(rank, RANKS, step)] for step in range(STEPS)]
    alone, kept = find(trainer, passes), learnt(trainer)
    assert alone.report.dropped_choices[1] > 0 and alone.report.dropped_choices[0] == 0
    assert int(kept["model.layers.0.mlp.gate.steps"]) == STEPS and kept["model.layers.0.mlp.gate.cutoff_E"].all()

    for layout, ranks in on_ranks(on_this_rank, RANKS, tmp_path / "ranks").items():
        for name, gradient in alone.gradients.items():
            check_ratio(f"{layout} {name}", whole([one for one, _ in ranks], "gradients", name), gradient.values, RATIO)
        for one, routers in ranks:
            assert one.report.loss == pytest.approx(alone.report.loss, rel=RATIO), layout
            for value in ("dropped_choices", "fallback_tokens", "loads"):
                assert getattr(one.report, value) == getattr(alone.report, value), (layout, value)
            for name, buffer in kept.items():
                torch.testing.assert_close(routers[name], buffer, rtol=1e-5, atol=1e-6)
