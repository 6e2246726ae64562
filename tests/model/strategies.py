"""Hypothesis strategies for model configurations: legal ones, small enough to run."""

from dataclasses import replace

from hypothesis import strategies as st

from zenray.model.config import ExpertGroup, MoDEConfig, RopeParameters, RouterConfig

_ROPES = (
    RopeParameters(),
    RopeParameters(rope_type="linear", factor=2.0),
    RopeParameters(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    RopeParameters(rope_type="llama3", factor=8.0, original_max_position_embeddings=16),
)


@st.composite
def routers(draw: st.DrawFn, num_experts: int) -> RouterConfig:
    return RouterConfig(
        experts_per_token=draw(st.integers(1, num_experts)),
        renormalize=draw(st.booleans()),
        temperature=draw(st.sampled_from([0.5, 1.0, 2.0])),
        balance_loss=draw(st.sampled_from(["switch", "cv2", "none"])),
        z_coefficient=draw(st.sampled_from([0.0, 1e-3])),
        selection_bias=draw(st.booleans()),
        expert_choice_training=draw(st.sampled_from(["threshold", "expert_choice"])),
        expert_choice_renormalize=draw(st.booleans()),
    )


@st.composite
def configs(draw: st.DrawFn) -> MoDEConfig:
    layers = draw(st.integers(1, 3))
    kv_heads = draw(st.sampled_from([1, 2]))
    subset = st.lists(st.integers(0, layers - 1), unique=True).map(lambda found: tuple(sorted(found)))
    sparse, local = draw(subset), draw(subset)
    head_dim = draw(st.sampled_from([4, 8]))
    experts: dict = {}
    if sparse:
        shapes = st.tuples(st.integers(1, 3), st.sampled_from([8, 12, 16]))
        groups = draw(st.lists(shapes, min_size=1, max_size=3))
        experts["expert_groups"] = tuple(ExpertGroup(f"g{i}", *shape) for i, shape in enumerate(groups))
        if draw(st.booleans()):
            unit = kv_heads * head_dim
            blocks = [ExpertGroup("reason", 1, unit, "deep"), ExpertGroup("language", 1, 6, "vocabulary")]
            if not set(local) & set(sparse):
                blocks.append(ExpertGroup("vision", 1, 2 * unit, "spatial"))
            experts["expert_groups"] += tuple(blocks)
        router = draw(routers(sum(group.num_experts for group in experts["expert_groups"])))
        experts["shared_expert_width"] = draw(st.sampled_from([0, 8]))
        if experts["shared_expert_width"]:
            router = replace(router, capacity_factor=draw(st.sampled_from([None, 0.5, 1.25])))
        experts["expert_choice_layers"] = tuple(layer for layer in sparse if draw(st.booleans()))
        if experts["expert_choice_layers"] == sparse:
            router = replace(router, selection_bias=False, capacity_factor=None)
        experts["router"] = router
        experts["shared_expert_gate"] = bool(experts["shared_expert_width"]) and draw(st.booleans())
    return MoDEConfig(
        vocab_size=draw(st.integers(16, 40)),
        hidden_size=draw(st.sampled_from([8, 20, 32])),
        intermediate_size=draw(st.sampled_from([8, 24])),
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * draw(st.sampled_from([1, 2, 3])),
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        sparse_layers=sparse,
        **experts,
        rope_parameters=draw(st.sampled_from(_ROPES)),
        sliding_window=draw(st.integers(1, 6)) if local else None,
        local_layers=local,
        qk_norm=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )
