"""MoDE as a model of vLLM's own kind: paged attention, tensor, pipeline and expert parallel, its fused expert layer.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). After that a zen_mode checkpoint
loads like any other, without remote code; nothing else of this package is imported until one does.
"""

from __future__ import annotations

ARCHITECTURE = "ZenModeForCausalLM"


def register() -> None:
    """Make vLLM and transformers know zen_mode. Idempotent."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from zenray.model import hf
    from zenray.serving.mode_vllm.limits import RefuseWhatCannotBeServed

    hf.register()
    # By name: vLLM looks at the class in a process of its own and keeps what it saw, as it does for its own models.
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.network:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = RefuseWhatCannotBeServed
