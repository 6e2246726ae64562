"""Credit: the book against a ten-line reference, with control's half simulated, under any interleaving."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zenray.gateway.metering import LeaseBook
from zenray.spec.clock import FakeClock

ORG = "acme"
GATEWAYS = st.integers(0, 2)
AMOUNTS = st.one_of(st.integers(0, 200), st.integers(0, 10**9))


class Reference:
    """What one gateway may still promise."""

    def __init__(self) -> None:
        self.credit = 0
        self.reserves: list[int] = []

    def reserve(self, amount: int) -> bool:
        if amount > self.credit:
            return False
        self.credit -= amount
        self.reserves.append(amount)
        return True

    def settle(self, which: int, spent: int) -> int:
        amount = self.reserves.pop(which)
        self.credit += amount - spent
        return amount


class Leases(RuleBasedStateMachine):
    """Three gateways lean on one balance. `held` is control's view: granted less given back less settled usage."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.books = [LeaseBook(self.clock, first_wish_nano_usd=100) for _ in range(3)]
        self.references = [Reference() for _ in range(3)]
        self.held = [0, 0, 0]
        self.unshipped = [0, 0, 0]
        self.balance = 0

    @rule(amount=AMOUNTS)
    def credit(self, amount: int) -> None:
        self.balance += amount

    @rule(seconds=st.floats(0, 60))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(gateway=GATEWAYS, amount=AMOUNTS)
    def reserve(self, gateway: int, amount: int) -> None:
        was_covered = self.references[gateway].reserve(amount)
        assert self.books[gateway].reserve(ORG, amount) == was_covered
        if not was_covered:
            assert self.books[gateway].wanted(ORG) >= amount - self.references[gateway].credit

    @rule(gateway=GATEWAYS, which=st.integers(0, 20), share=st.floats(0, 1))
    def settle(self, gateway: int, which: int, share: float) -> None:
        reference = self.references[gateway]
        if not reference.reserves:
            return
        which %= len(reference.reserves)
        spent = int(share * reference.reserves[which])
        self.books[gateway].settle(ORG, reference.settle(which, spent), spent)
        self.unshipped[gateway] += spent

    @rule(gateway=GATEWAYS)
    def ask(self, gateway: int) -> None:
        granted = min(self.books[gateway].wanted(ORG), self.balance - sum(self.held))
        self.held[gateway] += granted
        self.books[gateway].granted(ORG, granted, self.balance)
        self.references[gateway].credit += granted

    @rule(gateway=GATEWAYS)
    def ask_and_lose_the_answer(self, gateway: int) -> None:
        self.held[gateway] += min(self.books[gateway].wanted(ORG), self.balance - sum(self.held))

    @rule(gateway=GATEWAYS)
    def give_back(self, gateway: int) -> None:
        idle = self.books[gateway].give_back(ORG)
        assert idle in (0, self.references[gateway].credit)
        assert idle == 0 or not self.references[gateway].reserves
        self.references[gateway].credit -= idle
        self.held[gateway] -= idle

    @rule(gateway=GATEWAYS)
    def ship(self, gateway: int) -> None:
        self.balance -= self.unshipped[gateway]
        self.held[gateway] -= self.unshipped[gateway]
        self.unshipped[gateway] = 0

    @rule(gateway=GATEWAYS, share=st.floats(0, 1))
    def restart(self, gateway: int, share: float) -> None:
        """Killed: what was open is billed by its slots. The next boot ships all, then control releases the hold."""
        self.unshipped[gateway] += sum(int(share * amount) for amount in self.references[gateway].reserves)
        self.ship(gateway)
        self.held[gateway] = 0
        self.books[gateway], self.references[gateway] = (
            LeaseBook(self.clock, first_wish_nano_usd=100),
            Reference(),
        )

    @precondition(lambda self: all(not reference.reserves for reference in self.references))
    @rule()
    def everything_comes_back(self) -> None:
        for gateway in range(3):
            self.restart(gateway, 0.0)
        assert sum(self.held) == 0

    @invariant()
    def the_book_is_the_reference(self) -> None:
        for book, reference in zip(self.books, self.references, strict=True):
            assert book.available(ORG) == reference.credit >= 0

    @invariant()
    def the_balance_covers_all_that_was_promised(self) -> None:
        assert self.balance >= sum(self.held) >= 0
        for held, unshipped, reference in zip(self.held, self.unshipped, self.references, strict=True):
            assert held >= unshipped + sum(reference.reserves) + reference.credit


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_an_organisation_without_credit_is_not_covered(clock: FakeClock) -> None:
    book = LeaseBook(clock)
    assert not book.reserve(ORG, 1)
    assert book.reserve(ORG, 0)
    assert book.available("never heard of") == 0
    assert book.orgs() == [ORG]


def test_a_refused_reserve_is_asked_for_whole(clock: FakeClock) -> None:
    book = LeaseBook(clock, first_wish_nano_usd=10)
    book.granted(ORG, 300, balance_nano_usd=2000)
    assert not book.reserve(ORG, 1000)
    assert book.wanted(ORG) >= 700
    book.granted(ORG, book.wanted(ORG), balance_nano_usd=2000)
    assert book.reserve(ORG, 1000)


def test_a_refusal_that_control_could_not_help_is_forgotten(clock: FakeClock) -> None:
    book = LeaseBook(clock, first_wish_nano_usd=10)
    assert not book.reserve(ORG, 10**12)
    book.granted(ORG, 0, balance_nano_usd=0)
    assert book.wanted(ORG) == 0


def test_the_wish_follows_the_rate_of_spending(clock: FakeClock) -> None:
    book = LeaseBook(clock, horizon_s=5, first_wish_nano_usd=1)
    book.granted(ORG, 10**12, balance_nano_usd=10**15)
    for _ in range(300):  # 30 s at 10,000 a second
        clock.advance(0.1)
        assert book.reserve(ORG, 5000)
        book.settle(ORG, 5000, 1000)
    assert book.wanted(ORG) == 0
    assert book.reserve(ORG, book.available(ORG))
    assert book.wanted(ORG) == pytest.approx(5 * 10_000, rel=0.05)
    clock.advance(60)
    assert book.wanted(ORG) <= 1


def test_a_small_balance_is_taken_in_small_pieces(clock: FakeClock) -> None:
    book = LeaseBook(clock, first_wish_nano_usd=10_000)
    book.granted(ORG, 0, balance_nano_usd=8_000)
    assert book.wanted(ORG) == 1000
    assert not book.reserve(ORG, 7_000)
    assert book.wanted(ORG) == 7_000


def test_only_idle_credit_is_given_back_and_only_once(clock: FakeClock) -> None:
    book = LeaseBook(clock, idle_s=30)
    book.granted(ORG, 500)
    assert book.reserve(ORG, 100)
    clock.advance(31)
    assert book.give_back(ORG) == 0  # a request is open
    book.settle(ORG, 100, 40)
    assert book.give_back(ORG) == 0  # it has just ended
    clock.advance(31)
    assert book.give_back(ORG) == 460
    assert book.orgs() == []
    assert book.give_back(ORG) == 0
    assert not book.reserve(ORG, 1)


def test_spending_more_than_was_reserved_is_owed_and_asked_for(clock: FakeClock) -> None:
    book = LeaseBook(clock, first_wish_nano_usd=1)
    book.granted(ORG, 100)
    assert book.reserve(ORG, 100)
    book.settle(ORG, 100, 130)
    assert book.available(ORG) == -30
    assert not book.reserve(ORG, 0)
    assert book.wanted(ORG) >= 30
    assert book.give_back(ORG) == 0


@pytest.mark.parametrize(("reserved", "spent"), [(11, 0), (-1, 0), (5, -1)])
def test_a_settlement_that_cannot_be_is_an_error(clock: FakeClock, reserved: int, spent: int) -> None:
    book = LeaseBook(clock)
    book.granted(ORG, 100)
    assert book.reserve(ORG, 10)
    with pytest.raises(ValueError):
        book.settle(ORG, reserved, spent)
    assert book.available(ORG) == 90
