"""Leases: what is lent and what is spent never pass what was credited, whoever asks in whatever order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.control.cases.ledger import balance, credit, in_parallel
from tests.control.events import OUTPUT_TOKEN_NANO_USD, event
from zenray.control.auth.service import create_org
from zenray.control.billing.audit import check_ledger
from zenray.control.db.engine import Database
from zenray.control.edge.grants import SMALLEST_SPLIT_NANO_USD
from zenray.control.edge.intake import take_usage
from zenray.control.edge.leases import declare_lost, held_nano_usd, lease, list_gateways
from zenray.spec.edge import Lease, LeaseRequest, UsageBatch
from zenray.spec.errors import Conflict, NotFound
from zenray.spec.usage import UsageEvent

USD = 10**9


@pytest.fixture
def acme(database: Database) -> Database:
    with database.write() as session:
        create_org(session, "acme", now=0.0)
    return database


def ask(
    database: Database,
    wanted: int,
    *,
    gateway: str = "g1",
    boot: str = "b1",
    org: str = "acme",
    now: float = 1.0,
    **more: Any,
) -> Lease:
    request = LeaseRequest(gateway_id=gateway, boot_id=boot, org=org, wanted_nano_usd=wanted, **more)
    with database.write() as session:
        return lease(session, request, now=now)


def ship(database: Database, *events: UsageEvent, gateway: str = "g1", boot: str = "b1") -> int:
    """Ships, and returns what no lease covered."""
    batch = UsageBatch(gateway_id=gateway, boot_id=boot, events=events)
    with database.write() as session:
        return take_usage(session, batch, now=1.0).uncovered_nano_usd


def held(database: Database, org: str = "acme") -> int:
    with database.read() as session:
        return held_nano_usd(session, org)


def test_a_lease_is_what_is_wanted_while_there_is_enough(acme: Database) -> None:
    credit(acme, USD, "k")
    assert ask(acme, 30) == Lease(org="acme", granted_nano_usd=30, balance_nano_usd=USD)
    assert ask(acme, 12).granted_nano_usd == 12
    assert held(acme) == 42


def test_an_organisation_without_credit_gets_nothing(acme: Database) -> None:
    assert ask(acme, 30) == Lease(org="acme", granted_nano_usd=0, balance_nano_usd=0)
    ship(acme, event(1))
    assert ask(acme, 30).granted_nano_usd == 0  # below zero


def test_nothing_is_lent_twice(acme: Database) -> None:
    credit(acme, 100, "k")
    assert ask(acme, 80).granted_nano_usd == 80
    assert ask(acme, 80, gateway="g2").granted_nano_usd == 20
    assert ask(acme, 80, gateway="g3").granted_nano_usd == 0


def test_shipped_usage_turns_a_hold_into_spend(acme: Database) -> None:
    credit(acme, USD, "k")
    ask(acme, 100_000)
    assert ship(acme, event(1)) == 0
    assert held(acme) == 100_000 - 10 * OUTPUT_TOKEN_NANO_USD
    assert ship(acme, event(1)) == 0  # sent again: neither charged nor settled again
    assert held(acme) == 100_000 - 10 * OUTPUT_TOKEN_NANO_USD
    assert balance(acme) == USD - 10 * OUTPUT_TOKEN_NANO_USD


def test_what_is_given_back_can_be_lent_again(acme: Database) -> None:
    credit(acme, 100, "k")
    ask(acme, 100)
    assert ask(acme, 0, give_back_nano_usd=40).granted_nano_usd == 0
    assert ask(acme, 100, gateway="g2").granted_nano_usd == 40
    assert ask(acme, 0, give_back_nano_usd=10**15).granted_nano_usd == 0  # never more than it holds
    assert held(acme) == 40


def test_a_numbered_request_sent_again_counts_once(acme: Database) -> None:
    credit(acme, 1000, "k")
    assert ask(acme, 100, sequence=1).granted_nano_usd == 100
    first = ask(acme, 50, give_back_nano_usd=30, sequence=2)
    assert ask(acme, 50, give_back_nano_usd=30, sequence=2) == first
    assert held(acme) == 100 - 30 + 50
    with pytest.raises(Conflict, match="request 1 came after request 2"):
        ask(acme, 100, sequence=1)


def test_the_next_start_of_a_gateway_releases_what_the_last_one_held(acme: Database) -> None:
    credit(acme, USD, "k")
    ask(acme, 600_000)
    # The new start ships the old one's log under its own boot id before it asks.
    assert ship(acme, event(1, boot="b1"), boot="b2") == 0
    assert held(acme) == 600_000 - 20_000
    assert ask(acme, 7, boot="b2").granted_nano_usd == 7
    assert held(acme) == 7
    with pytest.raises(Conflict, match="started anew"):
        ask(acme, 7, boot="b1")


def test_a_late_batch_of_an_older_start_lowers_nobody_elses_hold(acme: Database) -> None:
    credit(acme, USD, "k")
    ask(acme, 600_000, boot="b1")
    ask(acme, 500_000, boot="b2")
    assert ship(acme, event(1, boot="b1"), boot="b1") == 20_000
    assert held(acme) == 500_000
    assert balance(acme) == USD - 20_000


def test_one_gateways_usage_leaves_anothers_hold_alone(acme: Database) -> None:
    credit(acme, USD, "k")
    ask(acme, 600_000, gateway="g1")
    ask(acme, 600_000, gateway="g2")
    ship(acme, event(1, gateway="g1"), gateway="g1")
    with acme.read() as session:
        assert {row.gateway_id: amount for row, amount in list_gateways(session)} == {"g1": 580_000, "g2": 600_000}


def test_a_lost_gateway_frees_what_it_held_and_leases_no_more_until_restarted(acme: Database) -> None:
    credit(acme, 100, "k")
    ask(acme, 100)
    with acme.write() as session:
        assert declare_lost(session, "g1", now=5.0) == 100
    assert ask(acme, 100, gateway="g2").granted_nano_usd == 100
    with pytest.raises(Conflict, match="declared lost"):
        ask(acme, 1)
    ship(acme, event(1))  # its usage is charged all the same
    assert balance(acme) == 100 - 20_000
    assert ask(acme, 1, boot="b2").granted_nano_usd == 0
    with acme.read() as session:
        assert [row.lost_at for row, _ in list_gateways(session)] == [None, None]
    with pytest.raises(NotFound, match="Did you mean 'g1'"), acme.write() as session:
        declare_lost(session, "g11", now=5.0)


def test_the_smallest_rest_goes_whole_to_one_gateway_and_more_is_halved(acme: Database) -> None:
    credit(acme, 4 * SMALLEST_SPLIT_NANO_USD, "k")
    for gateway in ("g1", "g2"):
        ask(acme, 0, gateway=gateway, now=100.0)
    grants = [ask(acme, USD, gateway=gateway, now=101.0).granted_nano_usd for gateway in ("g1", "g2", "g1", "g2")]
    cent = SMALLEST_SPLIT_NANO_USD
    assert grants == [2 * cent, cent, cent, 0]
    credit(acme, 4 * cent, "k2")
    assert ask(acme, USD, gateway="g1", now=500.0).granted_nano_usd == 4 * cent  # g2 has been silent: g1 is the last


def test_an_unknown_organisation_is_refused(acme: Database) -> None:
    with pytest.raises(NotFound, match="Did you mean 'acme'"):
        ask(acme, 1, org="acmee")


def test_parallel_leases_and_shipments_never_overspend(acme: Database) -> None:
    credit(acme, 3_000_000, "k")
    left: list[int] = []

    def live(gateway: str) -> None:
        holds, number = 0, 0
        for _ in range(12):
            holds += ask(acme, 50_000, gateway=gateway).granted_nano_usd
            events = []
            while holds >= 10 * OUTPUT_TOKEN_NANO_USD and len(events) < 2:
                holds -= 10 * OUTPUT_TOKEN_NANO_USD
                number += 1
                events.append(event(number, gateway=gateway))
            assert ship(acme, *events, gateway=gateway) == 0
        left.append(holds)

    in_parallel([lambda n=n: live(f"g{n}") for n in range(8)])  # type: ignore[misc]
    assert held(acme) == sum(left) <= balance(acme) < 3_000_000


class LedgerAndLeases(RuleBasedStateMachine):
    """Drives credits, leases, usage, restarts and losses at random, beside a reference of ten lines."""

    database: Database
    runs = 0

    def __init__(self) -> None:
        super().__init__()
        LedgerAndLeases.runs += 1
        self.org = f"org-{LedgerAndLeases.runs}"
        with self.database.write() as session:
            create_org(session, self.org, now=0.0)
        self.balance = 0
        self.holds: dict[str, int] = {}  # by gateway
        self.boots: dict[str, int] = {}
        self.events: list[UsageEvent] = []
        self.overspent = False  # an operator declared a gateway lost that was not

    gateways = st.sampled_from(["g1", "g2", "g3"])

    def name(self, gateway: str) -> str:
        return f"{self.org}-{gateway}"

    def boot(self, gateway: str) -> str:
        return f"boot{self.boots.setdefault(gateway, 1):04d}"

    @rule(amount=st.integers(1, 10**9), again=st.booleans())
    def credit(self, amount: int, again: bool) -> None:
        key = f"{amount}-{len(self.events)}-{self.balance}"
        assert credit(self.database, amount, key, self.org)
        if again:
            assert not credit(self.database, amount, key, self.org)
        self.balance += amount

    @rule(gateway=gateways, wanted=st.integers(0, 10**9), back=st.integers(0, 10**6))
    def lease(self, gateway: str, wanted: int, back: int) -> None:
        held_before = self.holds.get(gateway, 0)
        back = min(back, held_before)
        free = self.balance - sum(self.holds.values()) + back
        answer = ask(
            self.database,
            wanted,
            gateway=self.name(gateway),
            boot=self.boot(gateway),
            org=self.org,
            give_back_nano_usd=back,
        )
        assert 0 <= answer.granted_nano_usd <= max(0, min(wanted, free))
        assert answer.granted_nano_usd > 0 or wanted == 0 or free <= 0
        assert answer.balance_nano_usd == self.balance
        self.holds[gateway] = held_before - back + answer.granted_nano_usd

    @rule(gateway=gateways, share=st.floats(0, 1), twice=st.booleans())
    def spend(self, gateway: str, share: float, twice: bool) -> None:
        tokens = int(self.holds.get(gateway, 0) * share) // OUTPUT_TOKEN_NANO_USD
        one = event(
            len(self.events),
            org=self.org,
            gateway=self.name(gateway),
            boot=self.boot(gateway),
            output_tokens=tokens,
        )
        self.events.append(one)
        assert ship(self.database, *([one] * (1 + twice)), gateway=self.name(gateway), boot=self.boot(gateway)) == 0
        self.balance -= one.cost_nano_usd()
        if gateway in self.holds:
            self.holds[gateway] -= one.cost_nano_usd()

    @precondition(lambda self: self.events)
    @rule(data=st.data())
    def ship_again(self, data: st.DataObject) -> None:
        old = data.draw(st.lists(st.sampled_from(self.events), min_size=1))
        ship(self.database, *old, gateway=old[0].billing_key.split(":")[0])

    @rule(gateway=gateways)
    def restart(self, gateway: str) -> None:
        self.boot(gateway)
        self.boots[gateway] += 1
        ask(self.database, 0, gateway=self.name(gateway), boot=self.boot(gateway), org=self.org)
        self.holds[gateway] = 0

    @precondition(lambda self: any(self.boots))
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        gateway = data.draw(st.sampled_from(sorted(self.holds) or ["none"]))
        if gateway == "none":
            return
        with self.database.write() as session:
            assert declare_lost(session, self.name(gateway), now=1.0) == self.holds[gateway]
        self.holds[gateway] = 0
        self.boots[gateway] += 1

    @invariant()
    def agrees_with_the_reference(self) -> None:
        assert balance(self.database, self.org) == self.balance
        assert held(self.database, self.org) == sum(self.holds.values()) <= max(0, self.balance)
        with self.database.read() as session:
            assert check_ledger(session) == []


def test_ledger_and_leases_follow_the_reference(database: Database) -> None:
    machine = type("Machine", (LedgerAndLeases,), {"database": database})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=settings.default.max_examples // 3,  # each writes some twenty transactions
            stateful_step_count=20,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
