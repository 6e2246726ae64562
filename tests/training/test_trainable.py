"""What of a network learns: groups of experts, whatever they are made of, routers or the rest alone, and their clip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.whole_gradients import expert_gradients
from tests.training.tiny import CONFIG, job
from zenray.model.config import ExpertGroup
from zenray.model.gradients import expert_squares
from zenray.model.network import MoDE
from zenray.spec.errors import InvalidValue
from zenray.training.data.stream import Batch, pack
from zenray.training.trainer import Trainer

GROUPS = (
    ExpertGroup("general", 2, 16),
    ExpertGroup("code", 2, 16),
    ExpertGroup("math", 1, 24),  # a bank of its own
    ExpertGroup("reason", 2, 16, "deep"),
    ExpertGroup("language", 1, 6, "vocabulary"),
)
DIVERSE = replace(CONFIG, expert_groups=GROUPS)


@pytest.fixture
def batch() -> Batch:
    tokens = torch.randint(0, 256, (4, 33), generator=torch.Generator().manual_seed(0)).numpy()
    return pack([(row, row * 0) for row in tokens])


def make(text: dict[str, Path], teacher: MoDE | None = None, **changes: Any) -> Trainer:
    torch.manual_seed(0)
    wanted = job(text, "distill" if teacher else "pretrain", **changes)
    return Trainer(MoDE(DIVERSE), wanted, teachers=[(teacher, (1.0, 1.0))] if teacher else ())


def changed_by_a_step(trainer: Trainer, batch: Batch) -> set[str]:
    """Names of parameters, and of single experts of banks, that a step changes."""
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.step(0, [batch])
    found = set()
    for name, parameter in trainer.model.named_parameters():
        if "experts.banks" in name:
            first = 4 * ("banks.1" in name)
            same = [torch.equal(*pair) for pair in zip(parameter, before[name], strict=True)]
            found |= {f"expert {first + number}" for number, is_same in enumerate(same) if not is_same}
        elif not torch.equal(parameter, before[name]):
            found.add(name.removeprefix("model.layers.1.mlp."))
    return found


def block(number: int) -> set[str]:
    parts = ("embed_tokens", "adapter") if number == 2 else ("q_proj", "o_proj")
    return {f"blocks.{number}.{part}.weight" for part in parts}


BANKS, BLOCKS = {f"expert {number}" for number in range(5)}, block(0) | block(1) | block(2)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (("experts/code",), {"expert 2", "expert 3"}),
        (("experts/general", "experts/math"), {"expert 0", "expert 1", "expert 4"}),
        (("experts/reason",), block(0) | block(1)),
        (("experts/language", "experts/math"), {"expert 4"} | block(2)),
        (("experts",), BANKS | BLOCKS),
        (("routers",), {"gate.weight"}),
    ],
)
def test_a_group_is_trained_alone_and_all_else_stays_bit_for_bit(text, batch, train, expected) -> None:
    assert changed_by_a_step(make(text, train=train), batch) == expected


def test_domain_blocks_are_not_dense(text, batch) -> None:
    changed = changed_by_a_step(make(text, train=("dense",)), batch)
    assert "model.norm.weight" in changed and not changed & (BANKS | BLOCKS | {"gate.weight"})


def test_an_unknown_group_is_refused_with_the_nearest(text) -> None:
    with pytest.raises(InvalidValue, match="Did you mean 'reason'"):
        make(text, train=("experts/reson",))


def test_a_network_of_diverse_experts_learns_from_one(text, batch) -> None:
    """Vocabulary experts need the tokens, which training and evaluation, of students and teachers, must hand on."""
    torch.manual_seed(1)
    trainer = make(text, MoDE(DIVERSE), optimisation={"learning_rate": 1e-2, "warmup_steps": 0}, steps=20)
    before = trainer.evaluate([batch])
    first, *_, last = [trainer.step(step, [batch]) for step in range(10)]
    assert first.kl > 0.01 and last.loss < first.loss - 0.1
    assert trainer.evaluate([batch]) < before - 0.1
    assert trainer.evaluate([batch], trainer.teachers[0][0]) > 0


def test_every_expert_is_clipped_by_itself_domain_blocks_too(text, batch) -> None:
    free = make(text, optimisation={"clip_norm": 1e9})
    free.step(0, [batch])
    squares = expert_squares(expert_gradients(free.model))
    norms = torch.cat(list(squares.values())).sqrt()
    assert len(norms) == 8 and bool((norms > 0).all())
    limit = float(norms.median())
    clipped = make(text, optimisation={"clip_norm": 1e9, "expert_clip_norm": limit})
    report = clipped.step(0, [batch])
    found = torch.cat(list(expert_squares(expert_gradients(clipped.model)).values())).sqrt()
    torch.testing.assert_close(found, norms.clamp(max=limit), rtol=1e-5, atol=0)
    assert report.gradient_norms["expert"] == pytest.approx(float(found.norm()), rel=1e-5)
