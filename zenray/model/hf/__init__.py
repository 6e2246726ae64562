"""The network as Hugging Face classes: `model_type: zen_mode`, loaded by AutoConfig and AutoModelForCausalLM.

Call `register()` once in a process before `from_pretrained`.
"""

from zenray.model.hf.configuration import ZenModeConfig
from zenray.model.hf.modeling import ZenModeForCausalLM, ZenModeOutput


def register() -> None:
    """Make transformers' Auto classes know `zen_mode`. Idempotent."""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoConfig.register(ZenModeConfig.model_type, ZenModeConfig, exist_ok=True)
    AutoModelForCausalLM.register(ZenModeConfig, ZenModeForCausalLM, exist_ok=True)


__all__ = ["ZenModeConfig", "ZenModeForCausalLM", "ZenModeOutput", "register"]
