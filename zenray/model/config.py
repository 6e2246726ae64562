"""The network's dimensions and choices, as frozen dataclasses that refuse what cannot be built.

Where Hugging Face has a usual name for a field, that is the name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import groupby
from typing import Any, Literal, TypeVar, cast, get_args

from zenray.spec.dimensions import BlockDimensions, ModelDimensions, MoeDimensions
from zenray.spec.errors import InvalidValue, suggest

RopeType = Literal["default", "linear", "yarn", "llama3"]
BalanceLoss = Literal["switch", "cv2", "none"]
BlockKind = Literal["feed_forward", "deep", "vocabulary", "spatial"]
ExpertChoiceTraining = Literal["threshold", "expert_choice"]


def _require(condition: bool, message: str, *, param: str, hint: str | None = None) -> None:
    if not condition:
        raise InvalidValue(message, param=param, hint=hint)


def _require_one_of(value: str, kind: Any, what: str, *, param: str) -> None:
    _require(value in get_args(kind), f"{what} {value!r} is unknown.", param=param, hint=suggest(value, get_args(kind)))


def _require_whole(value: object, least: int, what: str, *, param: str) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
    _require(is_whole, f"{what} is {value}: it must be a whole number, at least {least}.", param=param)


def _require_number(
    value: object, what: str, *, param: str, above: float | None = None, least: float | None = None
) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    _require(is_number, f"{what} is {value}: it must be a number.", param=param)
    number = cast(float, value)
    _require(above is None or number > above, f"{what} is {value}: it must be above {above}.", param=param)
    _require(least is None or number >= least, f"{what} is {value}: it must be at least {least}.", param=param)


P = TypeVar("P")


def _read(kind: type[P], values: Mapping[str, Any], what: str) -> P:
    """A dataclass from its fields; unknown and missing ones are refused by name."""
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for name in values:
        _require(name in known, f"There is no field {name!r} in {what}.", param=name, hint=suggest(name, known))
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]  # type: ignore[arg-type]
    for name in needed:
        _require(name in values, f"The field {name!r} is missing in {what}.", param=name)
    return kind(**values)


@dataclass(frozen=True)
class RopeParameters:
    """Rotary positions (arXiv 2104.09864) and how they stretch beyond the context of pre-training.

    `yarn` (arXiv 2309.00071) and `llama3` scale each frequency by its wavelength, `linear` scales all alike.
    `attention_factor=None` is YaRN's own 0.1·ln(factor) + 1.
    """

    rope_type: RopeType = "default"
    rope_theta: float = 10_000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        param = "rope_parameters"
        _require_one_of(self.rope_type, RopeType, "rope_type", param=param)
        # YaRN divides by the logarithm of theta, which is 0 at 1.
        _require_number(self.rope_theta, "rope_theta", above=1 if self.rope_type == "yarn" else 0, param=param)
        _require_number(self.factor, "factor", least=1, param=param)
        if self.attention_factor is not None:
            _require_number(self.attention_factor, "attention_factor", above=0, param=param)
        for name in ("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
            _require_number(getattr(self, name), name, above=0, param=param)
        original = self.original_max_position_embeddings
        _require(
            original is not None or self.rope_type not in ("yarn", "llama3"),
            f"rope_type {self.rope_type!r} needs original_max_position_embeddings, the context of pre-training.",
            param=param,
        )
        if original is not None:
            _require_whole(original, 1, "original_max_position_embeddings", param=param)
        _require(
            self.rope_type != "yarn" or self.beta_fast > self.beta_slow,
            f"beta_fast {self.beta_fast} must be above beta_slow {self.beta_slow}.",
            param=param,
        )
        _require(
            self.rope_type != "llama3" or self.high_freq_factor > self.low_freq_factor,
            f"high_freq_factor {self.high_freq_factor} must be above low_freq_factor {self.low_freq_factor}.",
            param=param,
        )


@dataclass(frozen=True)
class ExpertGroup:
    """A named, contiguous range of experts of one domain (HIP-39's table), all of one width.

    Groups of different widths in one layer are ZIP-0414's diverse experts, and so are its other kinds
    (zenray.model.blocks). `width` is what the expert is wide in: its FFN; its queries (deep, spatial); its
    embedding (vocabulary). `radius`: how many rows and columns a spatial expert sees around a token.
    """

    name: str
    num_experts: int
    width: int
    kind: BlockKind = "feed_forward"
    radius: int = 1

    def __post_init__(self) -> None:
        of, param = f"of expert group {self.name!r}", "expert_groups"
        _require_whole(self.num_experts, 1, f"num_experts {of}", param=param)
        _require_whole(self.width, 1, f"width {of}", param=param)
        _require_one_of(self.kind, BlockKind, f"kind {of}", param=param)
        _require_whole(self.radius, 0, f"radius {of}", param=param)


@dataclass(frozen=True)
class RouterConfig:
    """How tokens find experts, and how the load is kept even.

    Gate weights are softmax(logits / temperature) over all experts, kept for the chosen `experts_per_token`, and
    with `renormalize` made to sum to 1 (Mixtral, Qwen3-MoE); without it they are the plain probabilities (blog, OLMoE).

    Where experts choose, they are the plain probabilities (arXiv 2202.09368) unless `expert_choice_renormalize`. Made
    to sum to 1, a token that one expert alone takes has weight 1 whatever its probability, and teaches the router
    nothing; but copies of a dense FFN are then the dense FFN for every token that is taken at all.
    """

    experts_per_token: int = 2
    renormalize: bool = True
    temperature: float = 1.0
    balance_loss: BalanceLoss = "switch"
    balance_coefficient: float = 0.01
    z_coefficient: float = 0.0
    selection_bias: bool = False  # loss-free balancing (arXiv 2408.15664)
    capacity_factor: float | None = None  # in training, an expert takes at most ceil(factor · T · k / E) rows
    expert_choice_training: ExpertChoiceTraining = "threshold"  # in the layers where experts choose
    expert_choice_renormalize: bool = False
    threshold_warmup_steps: int = 100  # of expert choice, before thresholds are used in training
    threshold_decay: float = 0.99  # of the moving average of each expert's cut-off, per step

    def __post_init__(self) -> None:
        _require_whole(self.experts_per_token, 1, "experts_per_token", param="router")
        _require_number(self.temperature, "temperature", above=0, param="router")
        _require_one_of(self.balance_loss, BalanceLoss, "balance_loss", param="router")
        _require_number(self.balance_coefficient, "balance_coefficient", least=0, param="router")
        _require_number(self.z_coefficient, "z_coefficient", least=0, param="router")
        if self.capacity_factor is not None:
            _require_number(self.capacity_factor, "capacity_factor", above=0, param="router")
        _require_one_of(self.expert_choice_training, ExpertChoiceTraining, "expert_choice_training", param="router")
        _require_whole(self.threshold_warmup_steps, 1, "threshold_warmup_steps", param="router")
        _require_number(self.threshold_decay, "threshold_decay", least=0, param="router")
        _require(
            self.threshold_decay < 1,
            f"threshold_decay is {self.threshold_decay}: at 1 a threshold never moves.",
            param="router",
        )


@dataclass(frozen=True)
class MoDEConfig:
    """Everything that fixes the network's shape and arithmetic. Layers are numbered from 0.

    Layers in `sparse_layers` have routed experts; the others a dense SwiGLU of `intermediate_size`. Layers in
    `local_layers` attend to the last `sliding_window` positions only. `shared_expert_width` > 0 adds an expert that
    every token of a sparse layer passes, scaled by a sigmoid gate when `shared_expert_gate` (Qwen2-MoE).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    sparse_layers: tuple[int, ...] = ()
    expert_groups: tuple[ExpertGroup, ...] = ()
    router: RouterConfig = field(default_factory=RouterConfig)
    expert_choice_layers: tuple[int, ...] = ()  # of the sparse layers, those where experts choose (blog: the first two)
    shared_expert_width: int = 0
    shared_expert_gate: bool = False
    max_position_embeddings: int = 4096
    rope_parameters: RopeParameters = field(default_factory=RopeParameters)
    sliding_window: int | None = None
    local_layers: tuple[int, ...] = ()
    qk_norm: bool = False
    attention_bias: bool = False  # on the query, key and value projections (Qwen2)
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    @property
    def num_experts(self) -> int:
        """Routed experts in each sparse layer, of all kinds."""
        return sum(group.num_experts for group in self.expert_groups)

    @property
    def num_blocks(self) -> int:
        """Those of them that are not feed-forward; they come last."""
        return sum(group.num_experts for group in self.expert_groups if group.kind != "feed_forward")

    @property
    def expert_widths(self) -> tuple[int, ...]:
        """The width of every feed-forward expert, in the order of the router's rows."""
        feed_forward = (group for group in self.expert_groups if group.kind == "feed_forward")
        return tuple(group.width for group in feed_forward for _ in range(group.num_experts))

    def group_range(self, name: str) -> range:
        """The expert indices of group `name`. Raises InvalidValue for an unknown one."""
        start = 0
        for group in self.expert_groups:
            if group.name == name:
                return range(start, start + group.num_experts)
            start += group.num_experts
        hint = suggest(name, (group.name for group in self.expert_groups))
        raise InvalidValue(f"There is no expert group {name!r}.", hint=hint, param="expert_groups")

    def dimensions(self) -> ModelDimensions:
        """The shape as plain numbers, for the catalog's arithmetic."""
        dense = [layer for layer in range(self.num_hidden_layers) if layer not in self.sparse_layers]
        moe = None
        if self.sparse_layers:
            widths = self.expert_widths
            moe = MoeDimensions(
                experts=self.num_experts,
                top_k=self.router.experts_per_token,
                expert_width=widths[0] if len(set(widths)) == 1 else None,
                expert_widths=widths if len(set(widths)) > 1 else None,
                blocks=tuple(
                    BlockDimensions(kind=group.kind, experts=group.num_experts, width=group.width)
                    for group in self.expert_groups
                    if group.kind != "feed_forward"
                ),
                shared_width=self.shared_expert_width,
                shared_gate=self.shared_expert_gate,
            )
        return ModelDimensions(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            layers=self.num_hidden_layers,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            ffn_width=self.intermediate_size if dense else 0,
            moe=moe,
            dense_layers=tuple(dense) if moe else (),
            tied_embeddings=self.tie_word_embeddings,
            qk_norm=self.qk_norm,
            qkv_bias=self.attention_bias,
            local_window_tokens=self.sliding_window,
            local_layers=self.local_layers,
        )

    @classmethod
    def from_dimensions(cls, dimensions: ModelDimensions) -> MoDEConfig:
        """The network of a shape, such as a catalog entry's: the inverse of `dimensions`.

        What a shape does not say (positions, routing rules, norms) has its default; use `dataclasses.replace`. Each run
        of equal expert widths becomes a group, and so does each of `blocks`. InvalidValue for an output projection with
        a bias.
        """
        _require(
            not dimensions.o_bias,
            "o_bias is set: the attention's output projection has no bias in this network.",
            param="o_bias",
        )
        moe = dimensions.moe
        groups: list[tuple[int, int, BlockKind]] = [
            (len(list(run)), width, "feed_forward") for width, run in groupby(moe.widths if moe else ())
        ]
        groups += [(block.experts, block.width, block.kind) for block in (moe.blocks if moe else ())]
        return cls(
            vocab_size=dimensions.vocab_size,
            hidden_size=dimensions.hidden_size,
            intermediate_size=dimensions.ffn_width or max(moe.widths if moe else (1,)),
            num_hidden_layers=dimensions.layers,
            num_attention_heads=dimensions.heads,
            num_key_value_heads=dimensions.kv_heads,
            head_dim=dimensions.head_dim,
            sparse_layers=dimensions.sparse_layers,
            expert_groups=tuple(
                ExpertGroup("general" if len(groups) == 1 else f"group-{index}", *group)
                for index, group in enumerate(groups)
            ),
            router=RouterConfig(experts_per_token=moe.top_k) if moe else RouterConfig(),
            shared_expert_width=moe.shared_width if moe else 0,
            shared_expert_gate=moe.shared_gate if moe else False,
            sliding_window=dimensions.local_window_tokens,
            local_layers=dimensions.local_layers,
            qk_norm=dimensions.qk_norm,
            attention_bias=dimensions.qkv_bias,
            tie_word_embeddings=dimensions.tied_embeddings,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MoDEConfig:
        """The inverse of `to_dict`; lists may stand for tuples. Unknown keys are refused."""
        values = dict(data)
        for name in ("sparse_layers", "local_layers", "expert_choice_layers"):
            values[name] = tuple(values.get(name, ()))
        values["expert_groups"] = tuple(
            _read(ExpertGroup, group, "an expert group") if isinstance(group, Mapping) else group
            for group in values.get("expert_groups", ())
        )
        for name, kind in (("router", RouterConfig), ("rope_parameters", RopeParameters)):
            if isinstance(values.get(name), Mapping):
                values[name] = _read(kind, values[name], name)
        return _read(cls, values, "the model's configuration")

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            _require_whole(getattr(self, name), 1, name, param=name)
        _require_whole(self.shared_expert_width, 0, "shared_expert_width", param="shared_expert_width")
        _require_number(self.rms_norm_eps, "rms_norm_eps", above=0, param="rms_norm_eps")
        _require_number(self.initializer_range, "initializer_range", least=0, param="initializer_range")
        self._check_attention()
        self._check_experts()

    def _check_attention(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        _require(
            heads % kv_heads == 0,
            f"{heads} attention heads cannot share {kv_heads} key/value heads: {heads} / {kv_heads} is not whole.",
            param="num_key_value_heads",
            hint=f"Use a divisor of {heads}: {', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}.",
        )
        _require(
            self.head_dim % 2 == 0,
            f"head_dim is {self.head_dim}: rotary positions turn pairs of values, so it must be even.",
            param="head_dim",
        )
        self._check_layers("local_layers", self.local_layers)
        if self.sliding_window is not None:
            _require_whole(self.sliding_window, 1, "sliding_window", param="sliding_window")
        _require(
            not self.local_layers or self.sliding_window is not None,
            f"Layers {list(self.local_layers)} are local, but sliding_window is {self.sliding_window}.",
            param="sliding_window",
            hint="Give sliding_window in tokens, or leave local_layers empty.",
        )
        _require(
            self.sliding_window is None or bool(self.local_layers),
            f"sliding_window is {self.sliding_window}, but no layer is local: it would do nothing.",
            param="local_layers",
        )

    def _check_experts(self) -> None:
        self._check_layers("sparse_layers", self.sparse_layers)
        self._check_layers("expert_choice_layers", self.expert_choice_layers)
        dense = sorted(set(self.expert_choice_layers) - set(self.sparse_layers))
        _require(
            not dense,
            f"Experts are to choose in layers {dense}, which are dense.",
            param="expert_choice_layers",
            hint=f"Sparse layers: {list(self.sparse_layers)}.",
        )
        if not self.sparse_layers:
            _require(
                not self.expert_groups and not self.shared_expert_width,
                f"There are {self.num_experts} experts and a shared width of {self.shared_expert_width}, "
                "but sparse_layers is empty.",
                param="sparse_layers",
                hint=f"Name the sparse layers, 0 to {self.num_hidden_layers - 1}.",
            )
            return
        names = [group.name for group in self.expert_groups]
        _require(
            len(set(names)) == len(names), f"Expert group names repeat: {', '.join(names)}.", param="expert_groups"
        )
        self._check_blocks()
        experts, k = self.num_experts, self.router.experts_per_token
        _require(
            experts >= 1,
            f"{len(self.sparse_layers)} layers are sparse, but there are no experts.",
            param="expert_groups",
        )
        _require(
            k <= experts,
            f"Each token takes {k} experts, but a layer has only {experts}.",
            param="router",
            hint=f"Use experts_per_token of at most {experts}.",
        )
        _require(
            self.router.capacity_factor is None or self.shared_expert_width > 0,
            f"capacity_factor is {self.router.capacity_factor}, but there is no expert to fall back to.",
            param="shared_expert_width",
            hint="Give a shared_expert_width: tokens that an expert has no room for use the shared expert.",
        )
        idle = [name for name in ("capacity_factor", "selection_bias") if getattr(self.router, name)]
        _require(
            not idle or self.expert_choice_layers != self.sparse_layers,
            f"{' and '.join(idle)} would do nothing: experts choose in all {len(self.sparse_layers)} sparse layers.",
            param="router",
            hint="Their load is even by construction.",
        )
        _require(
            not self.shared_expert_gate or self.shared_expert_width > 0,
            "shared_expert_gate is on, but shared_expert_width is 0: there is nothing to gate.",
            param="shared_expert_gate",
        )

    def _check_blocks(self) -> None:
        kinds = [group.kind for group in self.expert_groups]
        blocks = [kind for kind in kinds if kind != "feed_forward"]
        _require(
            kinds == ["feed_forward"] * (len(kinds) - len(blocks)) + blocks and len(blocks) < max(1, len(kinds)),
            f"Expert groups are {', '.join(kinds)}: at least one feed_forward group comes first, other kinds last.",
            param="expert_groups",
        )
        unit = self.head_dim * self.num_key_value_heads
        for group in self.expert_groups:
            _require(
                group.kind not in ("deep", "spatial") or group.width % unit == 0,
                f"Expert group {group.name!r} has queries of width {group.width}, which is not a multiple of {unit} "
                f"({self.num_key_value_heads} key/value heads of {self.head_dim}).",
                param="expert_groups",
            )
        local = sorted(set(self.local_layers) & set(self.sparse_layers))
        _require(
            "spatial" not in kinds or not local,
            f"Spatial experts need all of a layer's keys, but layers {local} are sparse and local.",
            param="local_layers",
        )

    def _check_layers(self, name: str, layers: tuple[int, ...]) -> None:
        last = self.num_hidden_layers - 1
        outside = [layer for layer in layers if layer not in range(self.num_hidden_layers)]
        _require(not outside, f"{name} has {outside}, but layers go from 0 to {last}.", param=name)
        _require(
            list(layers) == sorted(set(layers)),
            f"{name} is {list(layers)}: list each layer once, in ascending order.",
            param=name,
        )


def uniform_experts(num_experts: int, width: int, *, name: str = "general") -> tuple[ExpertGroup, ...]:
    """One group: the usual layer of equal experts."""
    return (ExpertGroup(name=name, num_experts=num_experts, width=width),)
