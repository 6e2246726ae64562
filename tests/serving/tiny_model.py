"""A model small enough to be made anew in a second: random weights, a byte-level tokenizer, a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


def make_tiny_model(folder: Path, *, hidden: int = 64, layers: int = 2) -> None:
    """Write a Llama of random weights (seed 0, float32) with its tokenizer to `folder`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_SPECIAL[0],
        pad_token=_SPECIAL[0],
        extra_special_tokens=list(_SPECIAL[1:]),
        model_max_length=512,
    )
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def quantize(folder: Path, target: Path, format: str, *, group: int = 64, rounded: Path | None = None) -> None:
    """Write the model in `folder` with its linear layers rounded to nearest and packed: awq-int4 or gptq-int8.

    `rounded`: the same once more, with the numbers that the packed ones stand for.
    """
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    bits = 4 if format == "awq-int4" else 8
    packed, plain = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "_proj." not in name:
            packed[name] = plain[name] = weight.half()
            continue
        layer = name.removesuffix("weight")
        parts, plain[name] = _pack_awq(weight, group) if bits == 4 else _pack_gptq(weight, group)
        packed |= {layer + end: tensor for end, tensor in parts.items()}
    if rounded is not None:
        shutil.copytree(folder, rounded)
        save_file(plain, rounded / "model.safetensors", metadata={"format": "pt"})
    save_file(packed, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float16"}
    config["quantization_config"] = (
        {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
        if bits == 4
        else {"quant_method": "gptq", "bits": 8, "group_size": group, "sym": True, "desc_act": False}
    )
    (target / "config.json").write_text(json.dumps(config))


def _pack_awq(weight: Any, group: int) -> tuple[dict[str, Any], Any]:
    """[out, in] → 4 bits with a zero point, eight columns to a word in AWQ's order."""
    import torch

    columns = weight.t().reshape(-1, group, weight.shape[0])  # groups, group, out
    low, high = columns.amin(1, keepdim=True).clamp(max=0), columns.amax(1, keepdim=True).clamp(min=0)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(0, 15)
    values = (columns / scales + zeros).round().clamp(0, 15).reshape(weight.shape[1], -1)

    def words(numbers: Any) -> Any:
        eights = numbers.to(torch.int64).reshape(numbers.shape[0], -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return _as_int32((eights << (4 * torch.arange(8))).sum(-1))

    rounded = ((values.reshape(columns.shape) - zeros) * scales).reshape(values.shape).t().contiguous()
    return {"qweight": words(values), "qzeros": words(zeros[:, 0]), "scales": scales[:, 0].half()}, rounded


def _pack_gptq(weight: Any, group: int) -> tuple[dict[str, Any], Any]:
    """[out, in] → 8 bits around 128, four rows to a word; GPTQ stores the zero point less one."""
    import torch

    in_size, out_size = weight.shape[1], weight.shape[0]
    columns = weight.t().reshape(-1, group, out_size)
    scales = (columns.abs().amax(1, keepdim=True) / 127).half().float()
    steps = (columns / scales).round().clamp(-127, 127)
    values = (steps + 128).to(torch.int64).reshape(-1, 4, out_size)
    zeros = torch.full((in_size // group, out_size // 4), 127 * 0x01010101)
    parts = {
        "qweight": _as_int32((values << (8 * torch.arange(4)).reshape(1, 4, 1)).sum(1)),
        "qzeros": _as_int32(zeros),
        "scales": scales[:, 0].half(),
        "g_idx": (torch.arange(in_size) // group).to(torch.int32),
    }
    return parts, (steps * scales).reshape(in_size, out_size).t().contiguous()


def _as_int32(words: Any) -> Any:
    import torch

    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()
