"""One meter, one process: what is opened, counted and closed is what is shipped, before and after a restart."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.gateway.metering.conftest import MakeMeter, die, open_charge, price
from zenray.gateway.metering import Meter, MeterFull, replay
from zenray.spec.clock import FakeClock
from zenray.spec.errors import Conflict, Unavailable
from zenray.spec.usage import Outcome, Usage, UsageEvent

FINAL = Usage(input_tokens=10, cached_input_tokens=4, output_tokens=5)


@dataclass
class Ledger:
    """Control in ten lines: each billing key is charged once."""

    events: dict[str, UsageEvent] = field(default_factory=dict)

    def take(self, meter: Meter, limit: int = 7) -> None:
        while events := meter.pending(limit):
            for event in events:
                self.events.setdefault(event.billing_key, event)
            meter.acknowledge(event.billing_key for event in events)


def test_an_event_says_all_about_its_request(make_meter: MakeMeter, clock: FakeClock) -> None:
    meter = make_meter()
    charge = open_charge(meter, user_id="u", adapter="ft", attempt=2, model_answered="zen-3b")
    opened_s = clock.now()
    clock.advance(0.25)
    charge.first_token()
    clock.advance(0.5)
    charge.first_token()
    event = charge.close(Outcome.COMPLETED, FINAL, "stop")
    assert event == UsageEvent(
        billing_key=f"gw-1:{meter.boot_id}:1", request_id="chatcmpl-1", attempt=2, org="acme", user_id="u",
        key_id="key-1", model_asked="zen-7b", model_answered="zen-3b", adapter="ft", quantization="awq-int4",
        usage=FINAL, price=price(), latency_ms=750, ttft_ms=250, finish_reason="stop",
        outcome=Outcome.COMPLETED, at=opened_s,
    )  # fmt: skip
    assert charge.cost_nano_usd == event.cost_nano_usd() == meter.unshipped_nano_usd("acme") > 0
    assert meter.pending(10) == [event]


def test_what_is_read_back_is_what_was_closed(make_meter: MakeMeter, tmp_path: Path) -> None:
    meter = make_meter()
    odd = open_charge(meter, request_id='quote " and \\ and é\n', org="café", user_id="", key_id="{}")
    events = [odd.close(Outcome.UPSTREAM_FAILED), open_charge(meter).close(Outcome.COMPLETED, FINAL, "x" * 100)]
    assert replay(tmp_path / "wal") == events == meter.pending(10)
    assert events[1].finish_reason == "x" * 64
    die(meter)
    again = make_meter()
    assert again.pending(10) == events
    assert again.unshipped_nano_usd("acme") == events[1].cost_nano_usd()


def test_the_price_is_that_of_the_opening(make_meter: MakeMeter) -> None:
    meter = make_meter()
    old = open_charge(meter, price=price("p1"))
    new = open_charge(meter, price=price("p2", output="0.0012"))
    assert old.close(Outcome.COMPLETED, FINAL).price == price("p1")
    assert new.close(Outcome.COMPLETED, FINAL).price == price("p2", output="0.0012")


def test_a_cut_stream_is_billed_by_its_slots(make_meter: MakeMeter) -> None:
    charge = open_charge(make_meter(), choices=4, prompts=2)
    charge.count(0, 10, 1)
    charge.count(1, 10, 5)
    charge.count(3, 20, 2)
    charge.count(0, 10, 3)
    assert charge.close(Outcome.CLIENT_GONE).usage == Usage(input_tokens=30, output_tokens=10)


def test_counts_never_go_down(make_meter: MakeMeter) -> None:
    charge = open_charge(make_meter())
    charge.count(0, 10, 7)
    charge.count(0, 10, 3)
    charge.count(0, 0, 8)
    charge.count(0, 11, 2)
    assert charge.counted() == Usage(input_tokens=11, output_tokens=8)


@pytest.mark.parametrize("counts", [(0, -1, 1), (0, 1, -1), (0, 1 << 32, 1), (0, 1, 1 << 32), (1, 1, 1), (-1, 1, 1)])
def test_impossible_counts_are_refused_and_change_nothing(make_meter: MakeMeter, counts: tuple[int, int, int]) -> None:
    charge = open_charge(make_meter())
    charge.count(0, 10, 7)
    with pytest.raises(ValueError):
        charge.count(*counts)
    assert charge.counted() == Usage(input_tokens=10, output_tokens=7)


def test_after_the_close_nothing_more_is_counted_or_closed(make_meter: MakeMeter) -> None:
    meter = make_meter()
    charge = open_charge(meter)
    charge.close(Outcome.COMPLETED, FINAL)
    for late in (lambda: charge.close(Outcome.COMPLETED, FINAL), lambda: charge.count(0, 1, 1), charge.counted):
        with pytest.raises(ValueError):
            late()
    assert len(meter.pending(10)) == 1


def test_an_impossible_final_usage_leaves_the_request_open(make_meter: MakeMeter) -> None:
    meter = make_meter()
    charge = open_charge(meter)
    charge.count(0, 10, 7)
    with pytest.raises(ValueError, match="impossible usage"):
        charge.close(Outcome.COMPLETED, Usage(input_tokens=1, cached_input_tokens=2))
    assert meter.open_streams == 1
    assert charge.close(Outcome.COMPLETED).usage.output_tokens == 7


def test_a_request_that_cannot_be_encoded_takes_no_slot(make_meter: MakeMeter) -> None:
    meter = make_meter(max_streams=1)
    for _ in range(3):
        with pytest.raises(TypeError):
            open_charge(meter, model_asked="\ud800")
    open_charge(meter).close(Outcome.COMPLETED, FINAL)


def test_a_killed_gateway_bills_the_open_by_their_slots(make_meter: MakeMeter) -> None:
    meter = make_meter()
    closed = open_charge(meter).close(Outcome.COMPLETED, FINAL)
    cut, untouched = open_charge(meter, org="b"), open_charge(meter, org="c")
    cut.count(0, 12, 3)
    die(meter)
    again = make_meter()
    events = {event.billing_key: event for event in again.pending(10)}
    assert events.pop(closed.billing_key) == closed
    assert events[cut.billing_key].usage == Usage(input_tokens=12, output_tokens=3)
    assert events[untouched.billing_key].usage == Usage()
    assert {event.outcome for event in events.values()} == {Outcome.INTERRUPTED}
    assert again.unshipped_nano_usd("b") == events[cut.billing_key].cost_nano_usd()
    assert again.inherited_events == 3


def test_killed_again_and_again_nothing_changes(make_meter: MakeMeter) -> None:
    meter = make_meter()
    open_charge(meter).close(Outcome.COMPLETED, FINAL)
    open_charge(meter).count(0, 12, 3)
    die(meter)
    meter = make_meter()
    events = meter.pending(10)
    for _ in range(3):
        die(meter)
        meter = make_meter()
        assert meter.pending(10) == events
        assert len(events) == 2


def test_a_reused_slot_never_bills_its_former_request(make_meter: MakeMeter) -> None:
    meter = make_meter(max_streams=1)
    for number in range(20):
        charge = open_charge(meter)
        charge.count(0, 100, number)
        charge.close(Outcome.CLIENT_GONE)
    open_charge(meter)
    die(meter)
    last = make_meter().pending(100)[-1]
    assert (last.outcome, last.usage) == (Outcome.INTERRUPTED, Usage())


def test_streams_are_bounded_and_come_free_again(make_meter: MakeMeter) -> None:
    meter = make_meter(max_streams=4)
    charges = [open_charge(meter, choices=2), open_charge(meter), open_charge(meter)]
    with pytest.raises(MeterFull, match="4 of at most 4") as refused:
        open_charge(meter)
    assert isinstance(refused.value, Unavailable)
    assert refused.value.status == 503
    for charge in charges:
        charge.close(Outcome.COMPLETED, FINAL)
    for _ in range(50):
        open_charge(meter, choices=4).close(Outcome.COMPLETED, FINAL)
    assert meter.open_streams == 0


def test_acknowledged_events_are_forgotten_once(make_meter: MakeMeter) -> None:
    meter = make_meter()
    first, second = (open_charge(meter).close(Outcome.COMPLETED, FINAL) for _ in range(2))
    meter.acknowledge([first.billing_key, first.billing_key, "unknown"])
    meter.acknowledge([first.billing_key])
    assert meter.pending(10) == [second]
    assert meter.unshipped_nano_usd("acme") == second.cost_nano_usd()


def test_the_callback_tells_of_every_close(tmp_path: Path, make_meter: MakeMeter) -> None:
    closed: list[int] = []
    meter = make_meter(on_closed=lambda: closed.append(meter.unshipped_events))
    open_charge(meter).close(Outcome.COMPLETED, FINAL)
    open_charge(meter).close(Outcome.CLIENT_GONE)
    assert closed == [1, 2]


def test_a_folder_has_one_owner(make_meter: MakeMeter) -> None:
    meter = make_meter()
    with pytest.raises(Conflict, match="belongs to the running process"):
        make_meter()
    meter.close()
    with pytest.raises(Conflict, match="the gateway 'gw-1', not to 'gw-2'"):
        make_meter(gateway_id="gw-2")
    make_meter()


def test_a_closed_meter_leaves_open_requests_to_the_next_boot(make_meter: MakeMeter) -> None:
    meter = make_meter()
    charge = open_charge(meter)
    charge.count(0, 12, 3)
    meter.close()
    meter.close()
    with pytest.raises(MeterFull, match="closed"):
        open_charge(meter)
    with pytest.raises(ValueError):
        charge.count(0, 12, 4)
    with pytest.raises(ValueError):
        charge.close(Outcome.COMPLETED, FINAL)
    assert [event.usage for event in make_meter().pending(10)] == [Usage(input_tokens=12, output_tokens=3)]


def test_any_number_of_boots_and_partial_shipping_end_in_one_ledger(make_meter: MakeMeter) -> None:
    ledger, expected = Ledger(), {}
    for boot in range(6):
        meter = make_meter(max_wal_bytes=1 << 16)
        for number in range(25):
            charge = open_charge(meter, request_id=f"{boot}-{number}")
            charge.count(0, 10 + boot, number)
            if number % 5 == 0:
                expected[charge.billing_key] = (Outcome.INTERRUPTED, 10 + boot, number)
            else:
                event = charge.close(Outcome.CLIENT_GONE)
                expected[event.billing_key] = (Outcome.CLIENT_GONE, 10 + boot, number)
            if number == 12:
                ledger.take(meter)
                meter.commit()
        die(meter)
    meter = make_meter()
    ledger.take(meter)
    found = {k: (e.outcome, e.usage.input_tokens, e.usage.output_tokens) for k, e in ledger.events.items()}
    assert found == expected
    assert meter.unshipped_events == meter.inherited_events == meter.unshipped_nano_usd("acme") == 0
