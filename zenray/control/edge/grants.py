"""How much of a balance a gateway is lent: a pure rule."""

from __future__ import annotations

# Under this, what is free goes to one gateway at a time: halves of a cent would leave nobody enough for a request.
SMALLEST_SPLIT_NANO_USD = 10_000_000  # $0.01


def grant_nano_usd(free_nano_usd: int, wanted_nano_usd: int, active_gateways: int) -> int:
    """What to lend of `free` (balance less everything lent out): at most what is wanted, and never more than is free.

    While other gateways are active one gets at most half of what is free, so that a small balance is split ever more
    finely instead of lying with whoever asked first; the last cent goes whole to whoever asks.
    """
    if free_nano_usd <= 0:
        return 0
    share = free_nano_usd if active_gateways <= 1 else free_nano_usd // 2
    share = max(share, min(free_nano_usd, SMALLEST_SPLIT_NANO_USD))
    return min(wanted_nano_usd, share)
