"""The packaged dimensions are what their claims come to; the documents' own numbers are refused where notes say so."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from zenray.catalog import Catalog, ModelEntry
from zenray.catalog.accounting import count_parameters
from zenray.catalog.fit import fit_widths
from zenray.spec.dimensions import ModelDimensions
from zenray.spec.errors import InvalidValue

CATALOG = Catalog.load()
MIXTURES = [e for e in CATALOG if e.variant_of is None and e.dimensions and e.dimensions.moe]


def text_total(entry: ModelEntry) -> int:
    encoders = sum(e.parameters or 0 for e in entry.encoders) if entry.encoders_in_total else 0
    if encoders:  # zen-omni: the document gives its text backbone apart
        return 28_000_000_000
    return entry.parameters.total


def with_moe(dimensions: ModelDimensions, **changes: Any) -> ModelDimensions:
    assert dimensions.moe is not None
    return dimensions.model_copy(update={"moe": dimensions.moe.model_copy(update=changes)})


@pytest.mark.parametrize("entry", MIXTURES, ids=lambda entry: entry.name)
def test_packaged_mixtures_have_the_widths_that_fit(entry: ModelEntry) -> None:
    assert entry.dimensions is not None
    assert entry.dimensions.moe is not None
    fitted = fit_widths(entry.dimensions, text_total(entry), entry.parameters.active).moe
    assert fitted is not None
    packaged = entry.dimensions.moe
    assert fitted.shared_width == packaged.shared_width
    # Diverse experts have other widths one by one, and the same in all within half a percent.
    assert sum(packaged.widths) == pytest.approx(sum(fitted.widths), rel=0.006)
    if packaged.expert_widths is None:
        assert fitted.expert_width == packaged.expert_width


@pytest.mark.parametrize("name", ["zen4-max", "zen-omni", "zen-coder"])
def test_the_documents_top_k_is_refused_and_the_packaged_one_is_the_largest(name: str) -> None:
    entry = CATALOG.get(name)
    dimensions, claimed_k = entry.dimensions, entry.claims.shape.top_k
    assert dimensions is not None
    assert dimensions.moe is not None
    assert claimed_k is not None
    for top_k in range(dimensions.moe.top_k + 1, claimed_k + 1):
        with pytest.raises(InvalidValue, match=rf"{top_k} of {dimensions.moe.experts} experts cannot both be true"):
            fit_widths(with_moe(dimensions, top_k=top_k), text_total(entry), entry.parameters.active)


@pytest.mark.parametrize("name", ["zen-base-mode", "zen-pro-mode", "zen-max-mode"])
def test_the_zips_two_of_eight_is_refused(name: str) -> None:
    entry = CATALOG.get(name)
    assert entry.dimensions is not None
    eight = with_moe(entry.dimensions, experts=8, expert_widths=None, expert_width=64)
    with pytest.raises(InvalidValue, match="2 of 8 experts cannot both be true"):
        fit_widths(eight, entry.parameters.total, entry.parameters.active)


@pytest.mark.parametrize(("name", "top_k"), [("zen-14b", 4), ("zen-14b", 8), ("zen-32b", 8)])
def test_a_larger_top_k_than_the_packaged_is_refused_for_hip_39s_small_mixtures(name: str, top_k: int) -> None:
    entry = CATALOG.get(name)
    assert entry.dimensions is not None
    with pytest.raises(InvalidValue, match="cannot both be true"):
        fit_widths(with_moe(entry.dimensions, top_k=top_k), entry.parameters.total, entry.parameters.active)


def test_the_error_shows_the_sum() -> None:
    entry = CATALOG.get("zen4-max")
    assert entry.dimensions is not None
    with pytest.raises(InvalidValue, match=r"\(30 − 3\) / \(1 − 2/16\) = 30\.9B, which leaves -0\.9B for the rest"):
        fit_widths(with_moe(entry.dimensions, top_k=2), 30 * 10**9, 3 * 10**9)


def test_all_experts_on_cannot_be_sparse() -> None:
    entry = CATALOG.get("zen-14b")
    assert entry.dimensions is not None
    with pytest.raises(InvalidValue, match="All 16 experts see every token"):
        fit_widths(with_moe(entry.dimensions, top_k=16), 14 * 10**9, 3 * 10**9)


def test_a_dense_model() -> None:
    entry = CATALOG.get("zen-7b")
    assert entry.dimensions is not None
    wrong = entry.dimensions.model_copy(update={"ffn_width": 64})
    assert abs(fit_widths(wrong, 7 * 10**9, 7 * 10**9).ffn_width - entry.dimensions.ffn_width) <= 64
    with pytest.raises(InvalidValue, match="dense FFN"):
        fit_widths(wrong, 10**9, 10**9)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(4, 64),  # hidden / 64
    st.integers(2, 80),
    st.sampled_from([8, 16, 64, 128]),
    st.integers(1, 8),
    st.integers(1, 40),  # expert width / 64
    st.integers(0, 80),  # shared width / 64
)
def test_what_was_counted_is_found_again(
    hidden: int, layers: int, experts: int, top_k: int, expert_width: int, shared_width: int
) -> None:
    assume(top_k < experts)
    dimensions = ModelDimensions.model_validate(
        {
            "vocab_size": 32000,
            "hidden_size": 64 * hidden,
            "layers": layers,
            "heads": 8,
            "kv_heads": 8,
            "head_dim": 64,
            "moe": {
                "experts": experts,
                "top_k": top_k,
                "expert_width": 64 * expert_width,
                "shared_width": 64 * shared_width,
            },
        }
    )
    count = count_parameters(dimensions)
    unknown = with_moe(dimensions, expert_width=64, shared_width=0)
    assert fit_widths(unknown, count.total, count.active) == dimensions
