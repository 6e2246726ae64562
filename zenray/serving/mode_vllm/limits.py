"""What vLLM cannot serve of MoDE, refused before any process of the engine starts."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from zenray.model.config import MoDEConfig
from zenray.spec.errors import InvalidValue


class RefuseWhatCannotBeServed(VerifyAndUpdateConfig):
    """vLLM calls it with its model configuration, in the process that asked for the engine."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Raises InvalidValue with the reason."""
        check_servable(model_config.hf_config.to_mode())


def check_servable(config: MoDEConfig) -> None:
    """Raises InvalidValue for experts that are not feed-forward: vLLM's expert layer has no place for others."""
    blocks = [group for group in config.expert_groups if group.kind != "feed_forward"]
    if blocks:
        found = ", ".join(f"{group.name!r} ({group.num_experts} {group.kind})" for group in blocks)
        raise InvalidValue(
            f"vLLM cannot serve this model: {config.num_blocks} of its {config.num_experts} experts are not "
            f"feed-forward: {found}.",
            hint="Use it through transformers, or serve a version that has feed-forward experts only.",
            param="expert_groups",
        )
