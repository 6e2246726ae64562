"""How a dense model becomes a MoDE: which layers, how many experts, and how each is made."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from zenray.model.config import ExpertGroup, MoDEConfig, RouterConfig
from zenray.model.upcycling.drop import DropMode
from zenray.model.upcycling.partition import check_divisible
from zenray.spec.errors import InvalidValue, suggest

PartitionMode = Literal["kmeans", "random"]
PARTITIONS = get_args(PartitionMode)
RouterInit = Literal["normal", "uniform", "centroid", "zero"]
ROWS_LOWEST, ROWS_HIGHEST = 0.05, 0.30  # the blog: below, experts stay correlated; above, the copy is worth nothing


@dataclass(frozen=True)
class GroupRecipe:
    """Experts of one domain. `drop_rates`: one for each, so that intact and heavily dropped experts can stand side by
    side (the blog's implicit signal for specialisation). `width`: of each, if wider than the dense FFN (ZIP-0414)."""

    name: str
    drop_rates: tuple[float, ...]
    width: int | None = None

    def __post_init__(self) -> None:
        if not self.drop_rates:
            raise InvalidValue(f"Group {self.name!r} has no experts.", param="groups")
        for rate in self.drop_rates:
            if not 0 <= rate <= 1:
                raise InvalidValue(f"A drop rate of {rate} is not a share: use 0 to 1.", param="drop_rate")


@dataclass(frozen=True)
class UpcyclingRecipe:
    """Everything that fixes the result, given the dense checkpoint.

    `granularity` G > 1 makes fine-grained experts (arXiv 2410.07524): each expert is cut into G of a G-th of the width,
    the router's rows are repeated, `down` is multiplied by G, and each token takes G times as many as `router` says.
    Partition modes divide the dense FFN among all experts instead of copying it. `expert_choice_layers` are some of
    `layers`. A shared expert has neurons of the dense FFN whose output is zero at first.
    """

    groups: tuple[GroupRecipe, ...]
    layers: tuple[int, ...]
    mode: DropMode | PartitionMode = "joint"
    granularity: int = 1
    router: RouterConfig = field(default_factory=RouterConfig)
    expert_choice_layers: tuple[int, ...] = ()
    shared_expert_width: int = 0
    shared_expert_gate: bool = False
    router_init: RouterInit = "normal"
    router_std: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        for value, known, name in (
            (self.mode, (*get_args(DropMode), *PARTITIONS), "mode"),
            (self.router_init, get_args(RouterInit), "router_init"),
        ):
            if value not in known:
                raise InvalidValue(f"{name} {value!r} is unknown.", hint=suggest(value, known), param=name)
        if not self.layers:
            raise InvalidValue("No layer was selected: nothing would be upcycled.", param="layers")
        rates = [rate for group in self.groups for rate in group.drop_rates]
        if self.mode in ("copy", *PARTITIONS) and any(rates):
            raise InvalidValue(
                f"Mode {self.mode!r} draws nothing anew, but drop rates are {rates}.", hint="Use 0, or mode 'joint'."
            )
        if self.granularity < 1:
            raise InvalidValue(f"granularity is {self.granularity}: it must be at least 1.", param="granularity")
        if self.granularity > 1 and (self.mode in PARTITIONS or not self.router.renormalize):
            raise InvalidValue(
                f"A granularity of {self.granularity} is for copied or dropped experts with renormalised gate weights; "
                f"mode is {self.mode!r}, renormalize is {self.router.renormalize}.",
                param="granularity",
            )
        if self.router_init == "centroid" and self.mode not in PARTITIONS:
            raise InvalidValue(
                f"Mode {self.mode!r} has no centroids for the router.", hint="Use 'normal'.", param="router_init"
            )
        wide = [group.name for group in self.groups if group.width is not None]
        if wide and (self.mode in PARTITIONS or self.granularity > 1):
            raise InvalidValue(
                f"Groups {', '.join(wide)} have widths of their own, but the FFN is cut into equal parts.",
                hint="Leave `width` out, or use mode 'joint' without granularity.",
                param="groups",
            )
        outside = sorted({rate for rate in rates if not ROWS_LOWEST <= rate <= ROWS_HIGHEST})
        if self.mode == "rows" and outside:
            warnings.warn(
                f"Drop rates {outside} are outside {ROWS_LOWEST:.0%} to {ROWS_HIGHEST:.0%}: the blog's experts stay "
                "correlated below, and lose what the copy gave them above.",
                stacklevel=3,
            )

    @property
    def drop_rates(self) -> tuple[float, ...]:
        """One rate for every expert, in the router's order."""
        return tuple(rate for group in self.groups for rate in group.drop_rates)

    def config(self, dense: MoDEConfig) -> MoDEConfig:
        """The network that this recipe makes of `dense`. InvalidValue for what cannot be."""
        parts = len(self.drop_rates) if self.mode in PARTITIONS else self.granularity
        check_divisible(dense.intermediate_size, parts)
        part = dense.intermediate_size // parts
        narrow = [group.name for group in self.groups if group.width is not None and group.width < part]
        if narrow or self.shared_expert_width > dense.intermediate_size:
            raise InvalidValue(
                f"The dense FFN has {dense.intermediate_size} neurons: "
                + (f"experts of {', '.join(narrow)} would have fewer." if narrow else "the shared expert wants more."),
                hint="Experts are copies of the FFN, and may be wider; the shared expert has some of its neurons.",
                param="groups" if narrow else "shared_expert_width",
            )
        return replace(
            dense,
            sparse_layers=self.layers,
            expert_choice_layers=self.expert_choice_layers,
            expert_groups=tuple(
                ExpertGroup(group.name, len(group.drop_rates) * self.granularity, group.width or part)
                for group in self.groups
            ),
            router=replace(self.router, experts_per_token=self.router.experts_per_token * self.granularity),
            shared_expert_width=self.shared_expert_width,
            shared_expert_gate=self.shared_expert_gate,
        )


def select_layers(selection: str | list[int] | tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """Layers by number, or by words: "all", "last 6", "first 4", "every 2" (the last of each two)."""
    if not isinstance(selection, str):
        return tuple(selection)
    words = selection.split()
    if words == ["all"]:
        return tuple(range(num_layers))
    if len(words) == 2 and words[0] in ("last", "first", "every") and words[1].isdigit():
        count = int(words[1])
        if 1 <= count <= num_layers:
            if words[0] == "last":
                return tuple(range(num_layers - count, num_layers))
            if words[0] == "first":
                return tuple(range(count))
            return tuple(range(count - 1, num_layers, count))
        raise InvalidValue(f"{selection!r} of {num_layers} layers: use 1 to {num_layers}.", param="layers")
    raise InvalidValue(
        f"{selection!r} selects no layers.",
        hint='Write "all", "last 6", "first 4", "every 2", or a list.',
        param="layers",
    )
