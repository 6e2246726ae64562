"""Usage events, and what crosses between control and gateways: an older reader, a newer writer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from zenray.spec.edge import Endpoint, KeyEntry, LeaseRequest, RouteEntry, RouteState, Snapshot, UsageBatch
from zenray.spec.money import Price
from zenray.spec.usage import Outcome, Usage, UsageEvent

PRICE = Price.model_validate(
    {"version": "p", "input_usd_per_1k": "0.0003", "cached_input_usd_per_1k": "0.00015", "output_usd_per_1k": "0.0006"}
)


def event(usage: Usage, outcome: Outcome = Outcome.COMPLETED) -> UsageEvent:
    return UsageEvent(
        billing_key="gw-1.boot.7",
        request_id="req",
        org="acme",
        key_id="key",
        model_asked="zen-auto",
        model_answered="zen-7b",
        usage=usage,
        price=PRICE,
        outcome=outcome,
        at=1.0,
    )


counts = st.integers(min_value=0, max_value=2**32 - 1)


@given(counts, counts, counts, st.sampled_from(Outcome))
def test_an_event_costs_the_same_after_the_wire(uncached: int, cached: int, output: int, outcome: Outcome) -> None:
    one = event(Usage(input_tokens=uncached + cached, cached_input_tokens=cached, output_tokens=output), outcome)
    batch = UsageBatch(gateway_id="gw", boot_id="boot", events=(one,))
    again = UsageBatch.model_validate_json(batch.model_dump_json()).events[0]
    assert again == one
    assert again.cost_nano_usd() == PRICE.cost_nano_usd(uncached + cached, cached, output)


def test_whatever_the_end_the_tokens_are_billed() -> None:
    usage = Usage(input_tokens=1000, output_tokens=10)
    assert {event(usage, outcome).cost_nano_usd() for outcome in Outcome} == {306_000}


@pytest.mark.parametrize("bad", [{"input_tokens": -1}, {"output_tokens": 1.5}, {"reasoning_tokens": 1}])
def test_usage_that_cannot_be(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Usage.model_validate(bad)


def route() -> RouteEntry:
    return RouteEntry(
        model="zen-7b",
        created_at=1.0,
        state=RouteState.READY,
        revision="zen-7b--1--abc",
        upstream_model="zen-7b",
        endpoints=(Endpoint(replica_id="r", url="http://127.0.0.1:30001/a"),),
        price=PRICE,
        context_tokens=32768,
        default_max_tokens=2048,
    )


def test_a_snapshot_survives_the_wire_with_its_removals() -> None:
    snapshot = Snapshot(
        version=3,
        full=False,
        issued_at=1.0,
        keys={"a" * 64: KeyEntry(key_id="k", org="acme", scopes=("zen-*",)), "b" * 64: None},
        routes={"zen-7b": route(), "gone": None},
    )
    again = Snapshot.model_validate_json(snapshot.model_dump_json())
    assert again == snapshot
    assert again.keys["b" * 64] is None
    assert again.routes["gone"] is None


def test_a_newer_peers_fields_are_ignored() -> None:
    wire = route().model_dump(mode="json") | {"invented_later": {"deep": 1}}
    assert RouteEntry.model_validate(wire) == route()
    assert Snapshot.model_validate({"version": 1, "full": True, "issued_at": 0, "more": 1}).keys == {}


def test_a_lease_cannot_ask_for_less_than_nothing() -> None:
    with pytest.raises(ValidationError):
        LeaseRequest(gateway_id="g", boot_id="b", org="o", wanted_nano_usd=-1)
