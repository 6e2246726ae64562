"""What the gateway knows: keys, organisations and routes, ready to be looked up; in memory and on disk.

On disk it is a journal: the last full snapshot, then the updates since, one JSON document a line. An update costs one
append; a line torn by a kill is the last one, and control sends it again, because it is asked for what came after the
last whole line. The file's time of change says when control last confirmed that nothing is missing.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import translate
from pathlib import Path

from pydantic import ValidationError

from zenray.spec.clock import Clock
from zenray.spec.edge import KeyEntry, OrgEntry, RouteEntry, Snapshot
from zenray.spec.errors import Unavailable
from zenray.spec.money import NANO_USD_PER_USD, TOKENS_PER_PRICED_UNIT, Price

log = logging.getLogger(__name__)

_UNIT = 10**6  # prices per token are kept in whole 10⁻⁶ nano-dollars, rounded up


class Key:
    """A key's entry with its scopes compiled, and what they allowed before."""

    __slots__ = ("_allowed", "_scopes", "entry")

    def __init__(self, entry: KeyEntry) -> None:
        self.entry = entry
        self._scopes = re.compile("|".join(translate(scope) for scope in entry.scopes) or r"(?!)")
        self._allowed: dict[str, bool] = {}

    def allows(self, model: str) -> bool:
        """Whether a scope matches `model`. Ask only for models that exist: answers are remembered."""
        known = self._allowed.get(model)
        if known is None:
            known = self._allowed[model] = self._scopes.match(model) is not None
        return known


class Route:
    """A route's entry, with its prices as integers that are never too low."""

    __slots__ = ("_input_price", "_output_price", "entry")

    def __init__(self, entry: RouteEntry) -> None:
        self.entry = entry
        self._input_price = _price_per_token(entry.price, "input")
        self._output_price = _price_per_token(entry.price, "output")

    def bound_nano_usd(self, choices: int, input_tokens: int, output_tokens: int) -> int:
        """At least what `choices` answers can cost, each with so many tokens in and out."""
        exact = choices * (input_tokens * self._input_price + output_tokens * self._output_price)
        return -(-exact // _UNIT) + 2  # the ledger rounds each leg to the nearest

    def output_tokens_for(self, nano_usd: int, choices: int, input_tokens: int) -> int | None:
        """The most output tokens per choice whose bound is within `nano_usd`, negative if there is none; None: any."""
        left = (nano_usd - 2) * _UNIT - choices * input_tokens * self._input_price
        if left < 0:
            return -1
        return left // (choices * self._output_price) if self._output_price else None


def _price_per_token(price: Price, leg: str) -> int:
    usd = max(price.input_usd_per_1k, price.cached_input_usd_per_1k) if leg == "input" else price.output_usd_per_1k
    scaled = usd * NANO_USD_PER_USD * _UNIT / TOKENS_PER_PRICED_UNIT
    return int(scaled.to_integral_value(rounding="ROUND_CEILING"))


class Directory:
    """The newest snapshot, applied. Looked up by every request, changed by the poll of control."""

    def __init__(self, journal: Path, clock: Clock, *, max_age_s: float) -> None:
        """`journal`: the file on disk, created with its first snapshot. Call `load` to start from it."""
        self.version = 0
        self.keys: dict[str, Key] = {}
        self.orgs: dict[str, OrgEntry] = {}
        self.routes: dict[str, Route] = {}
        self.in_touch = False  # with control: what it knows, we are told
        self._journal = journal
        self._clock = clock
        self._max_age_s = max_age_s
        self._confirmed_at: float | None = None
        self._updates = 0
        self._saved_at = 0.0  # what the journal's time of change says
        self._to_rewrite = False  # it must not be continued
        self._failing = False

    def load(self) -> bool:
        """Start from the journal, if there is one. False when there is none, or none that can be read."""
        try:
            lines = self._journal.read_bytes().split(b"\n")
            confirmed_at = self._journal.stat().st_mtime
        except FileNotFoundError:
            return False
        except OSError as error:
            log.error("snapshot_not_read", extra={"reason": str(error)})
            return False
        for line in lines[:-1]:
            try:
                update = Snapshot.model_validate_json(line)
            except ValidationError:
                break  # what follows a damaged line cannot be trusted; control fills in from there
            self._take(update)
            self._updates += 1
        self._confirmed_at = confirmed_at if self.version else None
        self._saved_at = confirmed_at
        # Whatever was torn must not be continued: the journal is written anew from what was whole.
        self._to_rewrite = True
        self._save()
        return self.version > 0

    def apply(self, raw: bytes) -> Snapshot:
        """Take over one answer of control, in memory and on disk. Raises ValidationError when it is malformed."""
        update = Snapshot.model_validate_json(raw)
        line = b""
        if update.full or update.version != self.version:
            self._take(update)
            self._updates += 1
            self._to_rewrite |= update.full or self._updates > 1000
            line = raw.replace(b"\n", b" ") + b"\n"
        self._heard(line)
        return update

    def confirm(self) -> None:
        """Control answered, and there is nothing newer."""
        self._heard()

    def lose_touch(self) -> None:
        """Control did not answer: what it says from now on is missing until it does."""
        self.in_touch = False

    def why_unusable(self) -> str | None:
        """Why requests must be refused: no snapshot, or one that is too old. None: all is well."""
        if self._confirmed_at is None:
            return "This gateway has not heard from control yet."
        age_s = self._clock.now() - self._confirmed_at
        if age_s > self._max_age_s:
            return (
                f"This gateway has been cut off from control for {age_s:.0f} s; it answers for {self._max_age_s:.0f} s."
            )
        return None

    def check_usable(self) -> None:
        """Raises Unavailable (503) when `why_unusable` has a reason."""
        reason = self.why_unusable()
        if reason:
            raise Unavailable(reason, hint="Retry later.", retry_after_s=5)

    def visible_to(self, key: Key) -> Iterator[Route]:
        """The routes that a key may name, by name."""
        return (self.routes[name] for name in sorted(self.routes) if key.allows(name))

    def _take(self, update: Snapshot) -> None:
        if update.full:
            self.keys, self.orgs, self.routes = {}, {}, {}
        for digest, key in update.keys.items():
            if key is None:
                self.keys.pop(digest, None)
            else:
                self.keys[digest] = Key(key)
        for name, org in update.orgs.items():
            if org is None:
                self.orgs.pop(name, None)
            else:
                self.orgs[name] = org
        for model, route in update.routes.items():
            if route is None:
                self.routes.pop(model, None)
            else:
                self.routes[model] = Route(route)
        self.version = update.version

    def _heard(self, line: bytes = b"") -> None:
        self.in_touch = True
        self._confirmed_at = self._clock.now()
        self._save(line)

    def _save(self, line: bytes = b"") -> None:
        """Bring the journal up to date and confirm it. Requests are answered from memory, so a failing disk stops none.

        A journal that lacks something is never confirmed: its age tells a restart how far it can be trusted. It is
        written anew when control speaks next.
        """
        if self._confirmed_at is None or not self.version:
            return
        try:
            if self._to_rewrite:
                self._rewrite()
            elif line:
                with self._journal.open("ab") as file:
                    file.write(line)
            os.utime(self._journal, (self._confirmed_at, self._confirmed_at))
        except OSError as error:
            self._to_rewrite = True
            if not self._failing:
                log.error("snapshot_not_saved", extra={"reason": str(error)})
            self._failing = True
            with suppress(OSError):  # a line that was cut short has changed it
                os.utime(self._journal, (self._saved_at, self._saved_at))
            return
        self._saved_at = self._confirmed_at
        self._to_rewrite = False
        if self._failing:
            log.info("snapshot_saved", extra={"version": self.version})
        self._failing = False

    def _rewrite(self) -> None:
        whole = Snapshot(
            version=self.version,
            full=True,
            issued_at=self._clock.now(),
            keys={digest: key.entry for digest, key in self.keys.items()},
            orgs=dict(self.orgs),
            routes={model: route.entry for model, route in self.routes.items()},
        )
        self._journal.parent.mkdir(parents=True, exist_ok=True)
        draft = self._journal.with_suffix(".draft")
        # The file holds the engines' keys and the organisations' salts.
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(whole.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, self._journal)
        self._updates = 1
