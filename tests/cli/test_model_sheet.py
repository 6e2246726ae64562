"""What `zenray models show` prints of a model: every claim, with the digits that it has."""

from __future__ import annotations

import re

import pytest

from zenray.catalog import Catalog
from zenray.cli.model_sheet import show_sheet

CATALOG = Catalog.load()


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]):
    """A function that gives a model's sheet as rows of cells."""

    def rows(name: str) -> list[list[str]]:
        show_sheet(CATALOG.get(name))
        return [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines() if line.strip()]

    return rows


def test_small_numbers_keep_three_digits(printed) -> None:
    rows = printed("zen-pro-mode")
    assert ["FLOPs a token, of a dense 110B", "0.25", "0.254", "+1.7%"] in rows
    assert ["experts", "8", "16", "+100.0%", "differs"] in rows
    assert ["total parameters", "110B", "109.9B", "-0.1%"] in rows
    assert ["experts", "16, 2 for each token"] in rows
    assert ["quality", "of a dense 110B", "99.2%"] in rows


def test_all_that_the_reference_claims_of_a_small_model(printed) -> None:
    rows, source = printed("zen-nano"), "reference-2025-09"
    for row in (
        ["ffn_width", "2,816", "2,560", "-9.1%", "differs"],
        ["trainable by LoRA of rank 8 (%)", "2.1", "0.54", "-74.3%", "differs"],
        ["energy a month (kWh)", "3.6", "3.6", "+0.0%"],
        ["MMLU", "42.3", source],
        ["tokens a second", "Apple M2", "80–100", source],
        ["tokens a second", "H100", "300+", source],
        ["weights in int4", "2-4 GB memory", "0.3 GB", source],
        ["power", "continuous operation", "5 W", source],
        ["CO2", "a month", "0.012 kg", source],
        ["training", "batch of 64, learning rate 5e-05, epochs 3–5", "100B tokens", source],
        ["LoRA", "q,v,o,gate,up,down", "rank 8, alpha 16", source],
        ["that is q_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"],
    ):
        assert row in rows, row


def test_speed_upcycling_and_what_a_token_costs(printed) -> None:
    rows = printed("zen-72b")
    assert ["first token", "A100 80GB, fp16", "52 ms", "hip-39"] in rows
    assert ["tokens a second", "A100 80GB, fp16", "31", "hip-39"] in rows
    assert ["tokens a second", "A100 80GB, fp16, batch of 32", "780", "hip-39"] in rows
    assert ["KV cache", "327,680 bytes a token, 42.95 GB for a whole context"] in rows
    assert ["compute", "34.5 GFLOPs a token, 378 at the end of a whole context"] in rows
    upcycled = "upcycled from a dense 8B, 8% of rows dropped, 2,304 GPU-hours"
    assert ["training", upcycled, "200M tokens", "drop-upcycling-blog"] in printed("zen4-max")


@pytest.mark.parametrize("name", CATALOG.names())
def test_every_sheet_ends_with_all_its_notes(printed, name: str) -> None:
    entry, rows = CATALOG.get(name), printed(name)
    assert [row[0] for row in rows if row[0].isdecimal()] == [str(n + 1) for n in range(len(entry.notes))]
    assert ("KV cache" in {row[0] for row in rows}) == (entry.dimensions is not None)
