"""Claims held against arithmetic: what agrees, and every one that does not."""

from __future__ import annotations

import pytest

from zenray.catalog import Catalog
from zenray.catalog.comparison import compare

CATALOG = Catalog.load()
# Everything in the founding documents that is more than 2 % off what dimensions of the claimed totals come to. The
# entries' notes say why.
FALSE_CLAIMS = {
    "zen-nano": {"ffn_width", "trainable by LoRA of rank 8"},
    "zen-eco": {"ffn_width", "trainable by LoRA of rank 16"},
    "zen-omni": {"top_k", "trainable by LoRA of rank 16"},
    "zen-next": {"expert_width", "trainable by LoRA of rank 64"},
    "zen-coder": {"top_k", "expert_width", "shared_width", "trainable by LoRA of rank 32"},
    "zen-32b": {"context beside the weights in fp16"},
    "zen-72b": {"expert_width", "context beside the weights in fp16"},
    "zen-480b": {"context beside the weights in fp16"},
    "zen4-max": {"top_k"},
    "zen-base-mode": {"experts"},
    "zen-pro-mode": {"experts"},
    "zen-max-mode": {"experts"},
}


@pytest.mark.parametrize("name", [e.name for e in CATALOG if e.variant_of is None])
def test_the_claims_that_arithmetic_refuses_are_these(name: str) -> None:
    rows = compare(CATALOG.get(name))
    # More context than claimed is no contradiction.
    off = {r.what for r in rows if abs(r.deviation) > 0.02 and not (r.unit == "tokens" and r.deviation > 0)}
    assert off == FALSE_CLAIMS.get(name, set())


def test_rows_by_hand() -> None:
    rows = {row.what: row for row in compare(CATALOG.get("zen-nano"))}
    assert (rows["ffn_width"].claimed, rows["ffn_width"].computed) == (2816, 2560)
    assert rows["energy a month"].computed == 5 * 720 / 1000
    assert rows["weights in fp32"].computed == pytest.approx(2.4024, rel=1e-3)
    assert rows["layers"].deviation == 0


def test_a_model_without_dimensions_has_nothing_to_compare() -> None:
    entry = CATALOG.get("zen-7b").model_copy(update={"dimensions": None})
    assert compare(entry) == ()
