"""The ledger: usage and credits once, exact sums, whatever the order and however often."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
from sqlalchemy import func, select

from tests.control.events import OUTPUT_TOKEN_NANO_USD, PRICE, event
from zenray.control.auth.service import create_org
from zenray.control.billing.audit import LedgerAudit, check_ledger
from zenray.control.billing.report import usage_report
from zenray.control.billing.service import (
    MAX_CREDIT_NANO_USD,
    add_credit,
    balance_nano_usd,
    record_usage,
)
from zenray.control.billing.tables import Account, LedgerEntry, UsageRecord
from zenray.control.db.engine import Database
from zenray.control.edge.intake import take_usage
from zenray.spec.clock import FakeClock
from zenray.spec.edge import UsageBatch
from zenray.spec.errors import Conflict, InvalidValue
from zenray.spec.usage import UsageEvent


def record(database: Database, events: list[UsageEvent]) -> int:
    with database.write() as session:
        return len(record_usage(session, events).charged)


def credit(database: Database, amount: int, key: str, org: str = "acme") -> bool:
    with database.write() as session:
        return add_credit(session, org, amount, idempotency_key=key, note=None, now=1.0)[1]


def balance(database: Database, org: str = "acme") -> int:
    with database.read() as session:
        assert check_ledger(session) == []
        return balance_nano_usd(session, org)


def in_parallel(tasks: list[Callable[[], object]]) -> None:
    """Runs all at once, each in a thread; raises what any raised."""
    failures: list[BaseException] = []
    barrier = threading.Barrier(len(tasks))

    def guarded(task: Callable[[], object]) -> None:
        try:
            barrier.wait()
            task()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_an_event_is_stored_and_charged_by_the_price_it_carries(database: Database) -> None:
    one = event(1, input_tokens=1000, cached_input_tokens=400, output_tokens=500)
    assert record(database, [one]) == 1
    cost = one.cost_nano_usd()
    assert cost == 600 * 1_000 + 400 * 100 + 500 * 2_000
    assert balance(database) == -cost
    with database.read() as session:
        entry = session.scalars(select(LedgerEntry)).one()
        assert (entry.org, entry.amount_nano_usd, entry.kind, entry.source, entry.source_id, entry.at) == (
            "acme",
            -cost,
            "usage",
            "usage",
            one.billing_key,
            one.at,
        )
        row = session.scalars(select(UsageRecord)).one()
        assert (row.input_tokens, row.cached_input_tokens, row.output_tokens, row.cost_nano_usd, row.day) == (
            1000,
            400,
            500,
            cost,
            "2023-11-14",
        )
        assert row.price == PRICE.model_dump_json() and row.outcome == "completed"


def test_a_batch_counts_only_what_is_new(database: Database) -> None:
    first = [event(n) for n in range(10)]
    assert record(database, first) == 10
    assert record(database, first) == 0
    assert record(database, [*first[5:], *[event(n) for n in range(10, 15)]]) == 5
    assert balance(database) == -15 * 10 * OUTPUT_TOKEN_NANO_USD
    assert record(database, []) == 0


def test_one_key_twice_in_a_batch_counts_once_as_it_came_first(database: Database) -> None:
    assert record(database, [event(1, output_tokens=1), event(1, output_tokens=99)]) == 1
    assert balance(database) == -OUTPUT_TOKEN_NANO_USD


def test_a_key_sent_again_with_other_numbers_changes_nothing(database: Database) -> None:
    record(database, [event(1, output_tokens=1)])
    assert record(database, [event(1, output_tokens=99)]) == 0
    assert balance(database) == -OUTPUT_TOKEN_NANO_USD


def test_a_large_batch_is_one_transaction(database: Database) -> None:
    events = [event(n, org=f"org-{n % 7}") for n in range(5_000)]
    assert record(database, events) == 5_000
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(LedgerEntry)) == 5_000
    assert sum(balance(database, f"org-{n}") for n in range(7)) == -5_000 * 10 * OUTPUT_TOKEN_NANO_USD


def test_usage_of_an_organisation_that_is_not_known_is_kept(database: Database) -> None:
    """A gateway may ship what it logged before the database was replaced; it must be able to empty its log."""
    assert record(database, [event(1, org="forgotten")]) == 1
    assert balance(database, "forgotten") < 0


def test_doubled_and_reordered_batches_from_many_connections_bill_once(database: Database) -> None:
    events = [event(n, org=f"org-{n % 3}", output_tokens=n % 17) for n in range(400)]
    rng = random.Random(7)
    charged: list[int] = []

    def ship(seed: int) -> None:
        mine = events * 2
        random.Random(seed).shuffle(mine)
        for start in range(0, len(mine), 50):
            batch = UsageBatch(gateway_id=f"g{seed}", boot_id="b1", events=tuple(mine[start : start + 50]))
            with database.write() as session:
                new = take_usage(session, batch, now=1.0).ack.new
            charged.append(new)

    in_parallel([lambda seed=seed: ship(seed) for seed in rng.sample(range(100), 6)])  # type: ignore[misc]
    assert sum(charged) == 400
    total = sum(balance(database, f"org-{n}") for n in range(3))
    assert total == -sum(each.cost_nano_usd() for each in events)
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(UsageRecord)) == 400


def test_a_credit_with_the_same_key_is_given_once(database: Database) -> None:
    assert credit(database, 5, "k")
    assert not credit(database, 5, "k")
    assert credit(database, 5, "k", org="other")  # keys belong to their organisation
    assert balance(database) == 5
    with pytest.raises(Conflict, match=r"not \$0\.000000006"):
        credit(database, 6, "k")


def test_a_credit_sent_by_many_at_once_is_given_once(database: Database) -> None:
    in_parallel([lambda: credit(database, 1_000, "same") for _ in range(8)])
    in_parallel([lambda n=n: credit(database, 1, f"key-{n}") for n in range(8)])  # type: ignore[misc]
    assert balance(database) == 1_008


@pytest.mark.parametrize("amount", [0, -1, MAX_CREDIT_NANO_USD + 1])
def test_impossible_credits_are_refused(database: Database, amount: int) -> None:
    with pytest.raises(InvalidValue):
        credit(database, amount, "k")
    assert balance(database) == 0


def test_a_balance_that_is_not_the_sum_of_its_entries_is_found(database: Database) -> None:
    credit(database, 100, "k")
    with database.write() as session:
        session.get_one(Account, "acme").balance_nano_usd = 99
    with database.read() as session:
        (difference,) = check_ledger(session)
    assert (difference.org, difference.entries_nano_usd, difference.account_nano_usd) == ("acme", 100, 99)


class SlowClock(FakeClock):
    """Every look at it takes a second."""

    def monotonic(self) -> float:
        self.advance(1.0)
        return super().monotonic()


def test_the_audit_takes_at_most_a_hundredth_of_the_time(database: Database) -> None:
    credit(database, 100, "k")
    clock = SlowClock()
    audit = LedgerAudit(clock)

    def differences() -> int:
        with database.read() as session:
            return len(audit.newest(session).differences)

    assert differences() == 0
    with database.write() as session:
        session.get_one(Account, "acme").balance_nano_usd = 99
    assert differences() == 0, "a check that took a second was repeated at once"
    clock.advance(100)
    assert differences() == 1


def test_reports_add_up_by_day_model_and_key(database: Database) -> None:
    day = 86_400.0
    record(
        database,
        [
            event(1, at=0.0, model="a", key_id="k1", input_tokens=3, cached_input_tokens=1, output_tokens=2),
            event(2, at=day - 0.001, model="b", key_id="k1", output_tokens=5),
            event(3, at=day, model="b", key_id="k2", output_tokens=7),
            event(4, at=day, model="b", key_id="k9", output_tokens=7, org="other"),
        ],
    )
    with database.write() as session:
        create_org(session, "acme", now=1.0)
    with database.read() as session:
        days = usage_report(session, group_by="day", org="acme")
        assert [(line.group, line.requests, line.output_tokens) for line in days] == [
            ("1970-01-01", 2, 7),
            ("1970-01-02", 1, 7),
        ]
        assert (days[0].input_tokens, days[0].cached_input_tokens) == (3, 1)
        models = usage_report(session, group_by="model")
        assert [(line.group, line.requests) for line in models] == [("a", 1), ("b", 3)]
        keys = usage_report(session, group_by="key", org="acme", since=0.5, until=day)
        assert [(line.group, line.requests, line.cost_nano_usd) for line in keys] == [
            ("k1", 1, 5 * OUTPUT_TOKEN_NANO_USD)
        ]
        assert -sum(line.cost_nano_usd for line in days) == balance_nano_usd(session, "acme")
