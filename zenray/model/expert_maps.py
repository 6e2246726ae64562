"""The documents' maps of experts to domains: named, contiguous groups for `MoDEConfig.expert_groups`."""

from __future__ import annotations

from zenray.model.config import ExpertGroup
from zenray.spec.errors import InvalidValue, suggest

# name → (group, experts) in the router's order
MAPS: dict[str, tuple[tuple[str, int], ...]] = {
    # HIP-39, "Why Distillation"
    "hip-39": (("general", 16), ("code", 16), ("reasoning", 16), ("creative", 16)),
    # ZIP-0414's figure: N = 8
    "zip-0414": (("code", 2), ("math", 2), ("language", 2), ("reasoning", 2)),
    # Architecture reference, September 2025
    "zen-coder": (
        ("python-data-science", 8),
        ("javascript-typescript-web", 8),
        ("systems", 8),
        ("enterprise", 8),
        ("mobile", 8),
        ("devops-infrastructure", 8),
        ("databases-sql", 8),
        ("general", 8),
    ),
    "zen-omni": (("vision", 8), ("audio", 8), ("text", 8), ("cross-modal", 8)),
    "zen-next": (
        ("mathematics", 16),
        ("science", 16),
        ("programming", 16),
        ("natural-languages", 16),
        ("creative", 16),
        ("analysis", 16),
        ("tool-use", 16),
        ("safety-alignment", 16),
    ),
}


def expert_map(name: str, width: int, widths: dict[str, int] | None = None) -> tuple[ExpertGroup, ...]:
    """The groups of a map, all of `width` but for those in `widths` (ZIP-0414: code experts are wider)."""
    if name not in MAPS:
        raise InvalidValue(f"There is no expert map {name!r}.", hint=suggest(name, MAPS), param="expert_groups")
    widths = widths or {}
    groups = [group for group, _ in MAPS[name]]
    for group in widths:
        if group not in groups:
            raise InvalidValue(f"Map {name!r} has no group {group!r}.", hint=suggest(group, groups), param="widths")
    return tuple(ExpertGroup(group, experts, widths.get(group, width)) for group, experts in MAPS[name])
