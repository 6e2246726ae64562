"""Which replica is asked: the one with the least work of ours, or one that has the prompt's beginning in its cache.

An engine keeps the keys and values of a prompt's beginning and reuses them for the next prompt that begins the same.
So requests with one system prompt should meet at one replica, as long as it is not much busier than the others. What
replicas hold is guessed from what they were sent: the prompt's first 4,096 tokens or so are cut into blocks of bytes,
each named by a hash of all before it, and for every block it is remembered which replicas saw it last. (The same idea:
Ray Serve's prefix-aware router, SGLang's cache-aware one.) Replicas come only from the newest route, so that one which
has vanished is never chosen, whatever is remembered of it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import orjson

from zenray.gateway.homes import Homes
from zenray.spec.edge import Endpoint as Replica

BLOCK_BYTES = 256  # about 64 tokens
MAX_PREFIX_BYTES = 4 * 4096  # about 4,096 tokens (HIP-39)
MAX_BLOCKS = 1 << 16  # remembered in all, about 10 MB
_REPLICAS_PER_BLOCK = 4
_LEAST_SHARE = 0.1  # of the prompt's blocks: less in common does not decide
_NEAR = 1  # requests: where a prompt goes whose home is too busy may be so much busier than the least busy one
_HOME_BLOCKS = 16  # another replica must know so much more of a prompt than its home to be preferred
_BLOCKS_PER_PATIENCE = 2
_MOST_PATIENCE = 8  # requests
_SPREAD_DEPTH = 4  # blocks: what requests that share a system prompt have in common, and most others have not


def prompt_prefix(body: Mapping[str, Any]) -> bytes:
    """The first bytes of a checked body's prompt, in the order in which templates render it."""
    prompt = body.get("prompt")
    if prompt is not None:
        text = prompt.encode() if type(prompt) is str else orjson.dumps(prompt)
        return text[:MAX_PREFIX_BYTES]
    parts = [orjson.dumps(body["tools"])] if body.get("tools") else []
    size_bytes = sum(map(len, parts))
    for message in body["messages"]:
        if size_bytes >= MAX_PREFIX_BYTES:
            break
        content = message.get("content")
        text = content[:MAX_PREFIX_BYTES].encode() if type(content) is str else orjson.dumps(content)
        parts += (message["role"].encode(), text)
        size_bytes += len(text)
    return b"\0".join(parts)[:MAX_PREFIX_BYTES]


def name_blocks(root: str, prefix: bytes) -> list[int]:
    """A name for each whole block, which says what all before it was too. `root`: what shares no cache with others."""
    names = []
    name = int.from_bytes(hashlib.blake2b(root.encode(), digest_size=8).digest())
    for end in range(BLOCK_BYTES, len(prefix) + 1, BLOCK_BYTES):
        block = b"%x:%b" % (name, prefix[end - BLOCK_BYTES : end])
        name = int.from_bytes(hashlib.blake2b(block, digest_size=8).digest())
        names.append(name)
    return names


class PrefixMemory:
    """Which replicas saw which blocks last; at most `max_blocks`, those unused for longest are forgotten."""

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self._seen: OrderedDict[int, tuple[str, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def note(self, blocks: Sequence[int], replica_id: str) -> None:
        """`replica_id` is being sent a prompt of these blocks."""
        seen = self._seen
        for block in reversed(blocks):  # beginnings last: they serve more prompts, and must outlive their ends
            known = seen.get(block)
            if known is None:
                seen[block] = (replica_id,)
            else:
                if known[0] != replica_id:
                    others = [one for one in known if one != replica_id]
                    seen[block] = (replica_id, *others[: _REPLICAS_PER_BLOCK - 1])
                seen.move_to_end(block)
        while len(seen) > self._max_blocks:
            seen.popitem(last=False)

    def matched(self, blocks: Sequence[int]) -> dict[str, int]:
        """How many blocks from the start each replica that is remembered has seen."""
        found: dict[str, int] = {}
        for depth, block in enumerate(blocks):
            known = self._seen.get(block)
            if known is None:
                break
            for replica_id in known:
                if found.get(replica_id, 0) == depth:
                    found[replica_id] = depth + 1
        return found


def home_key(blocks: Sequence[int]) -> int:
    """What names a prompt's home: its beginning, as far as requests that share a system prompt have it in common."""
    return blocks[min(len(blocks), _SPREAD_DEPTH) - 1]


def choose(
    replicas: Sequence[Replica],
    outstanding: Mapping[str, int],
    suspect_until: Mapping[str, float],
    tried: Collection[str],
    now: float,
    turn: int,
    *,
    blocks: Sequence[int] = (),
    matched: Mapping[str, int] | None = None,
    home: str | None = None,
    held: Callable[[str], int] = lambda _: 0,
) -> Replica | None:
    """The replica to ask, of those not tried yet; None when there is none.

    Of the replicas that are not much busier than the least busy one, that which knows most of the prompt; the prompt's
    `home` is preferred to others that know little more, so that a request which was sent elsewhere in a rush does not
    draw the next ones after it, and a home that only another process has asked is believed to know what others know.
    If none knows enough: of those that are not busier than a home may be, since the prompt stays there, that which
    is home to the fewest prompts (`held`); among equals one about as busy as the least busy one, and of those the one
    that every gateway would name for this prompt. If its home is too busy: only of those about as busy as the least
    busy one. Prompts too short to matter take turns. `outstanding` counts what is asked for and not answered. A replica
    that could not be reached within the last seconds (`suspect_until`) comes last: it may be the only one.
    """
    left = [replica for replica in replicas if replica.replica_id not in tried]
    if len(left) < 2:
        return left[0] if left else None
    sound = [replica for replica in left if suspect_until.get(replica.replica_id, 0.0) <= now] or left
    work = [outstanding.get(replica.replica_id, 0) for replica in sound]
    least = min(work)
    if blocks:
        best = _most_known(sound, work, least, blocks, matched or {}, home)
        if best is not None:
            return best
        most = least + (slack(least, min(len(blocks), _SPREAD_DEPTH)) if home is None else _NEAR)
        key = home_key(blocks)
        _, _, _, best = max(
            (-held(replica.replica_id), busy <= least + _NEAR, _weight(key, replica.replica_id), replica)
            for replica, busy in zip(sound, work, strict=True)
            if busy <= most
        )
        return best
    # By turns over all, so that one which drops out does not shift the others' turns.
    count = len(replicas)
    names = {replica.replica_id for replica, busy in zip(sound, work, strict=True) if busy == least}
    return next(one for one in (replicas[(turn + step) % count] for step in range(count)) if one.replica_id in names)


def slack(least: int, known: int = 0) -> int:
    """How much busier than the least busy replica one may be and still be preferred for the `known` blocks it has.

    A request may wait behind one more for each 128 tokens that need not be computed, up to a bound.
    """
    return max(2, least // 2) + min(_MOST_PATIENCE, known // _BLOCKS_PER_PATIENCE)


def _most_known(
    replicas: Sequence[Replica],
    work: Sequence[int],
    least: int,
    blocks: Sequence[int],
    matched: Mapping[str, int],
    home: str | None,
) -> Replica | None:
    enough = max(1, _LEAST_SHARE * len(blocks))
    best: Replica | None = None
    best_rank = (0, 0)
    depth = min(_SPREAD_DEPTH, len(blocks))
    for replica, busy in zip(replicas, work, strict=True):
        known = matched.get(replica.replica_id, 0)
        at_home = replica.replica_id == home
        if at_home and known < depth:  # another process has sent it there, or will
            known = max(depth, *matched.values()) if matched else depth
        if known < enough or busy > least + slack(least, known):
            continue
        rank = (known + _HOME_BLOCKS if at_home else known, -busy)
        if best is None or rank > best_rank:
            best, best_rank = replica, rank
    return best


def _weight(key: int, replica_id: str) -> bytes:
    """Rendezvous hashing: every gateway gives a prompt the same order of replicas."""
    return hashlib.blake2b(b"%x:%b" % (key, replica_id.encode()), digest_size=8).digest()


class Chooser:
    """Chooses for one gateway process, and remembers what it has chosen."""

    def __init__(self, homes: Homes) -> None:
        """`homes`: shared with the gateway's other processes."""
        self._homes = homes
        self._seen = PrefixMemory()
        self._turn = 0

    def choose(
        self,
        replicas: Sequence[Replica],
        outstanding: Mapping[str, int],
        suspect_until: Mapping[str, float],
        tried: Collection[str],
        now_s: float,
        blocks: Sequence[int],
    ) -> tuple[Replica | None, str]:
        """The replica to ask for a prompt of these blocks (see `choose`), and why it: a label for the metrics."""
        self._turn += 1
        if not blocks:
            return choose(replicas, outstanding, suspect_until, tried, now_s, self._turn), "short"

        def held(replica_id: str) -> int:
            return self._homes.held(replica_id, now_s)

        key = home_key(blocks)
        home = self._homes.find(key, replicas)
        matched = self._seen.matched(blocks)
        chosen = choose(
            replicas,
            outstanding,
            suspect_until,
            tried,
            now_s,
            self._turn,
            blocks=blocks,
            matched=matched,
            home=home,
            held=held,
        )
        if chosen is None:
            return None, "none"
        self._seen.note(blocks, chosen.replica_id)
        self._homes.settle(key, home or chosen.replica_id, now_s)
        if chosen.replica_id == home or chosen.replica_id in matched:
            return chosen, "known"
        return chosen, "moved" if home is not None or matched else "new"
