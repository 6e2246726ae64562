"""Tiny checkpoints, made as real ones are: by transformers and by the gguf library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

TEXTS = ["the quick brown fox jumps over the lazy dog", "12 and 30 make 42", "don't you think so?"] * 20
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 300


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that splits digits one by one, as SmolLM's does."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bare.decoder = decoders.ByteLevel()
    bare.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def llama_config(**changes: Any) -> LlamaConfig:
    settings = {
        "vocab_size": VOCABULARY + 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**settings | changes)


def save_model(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    config: PreTrainedConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or llama_config()).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    return save_model(tmp_path / "source", tokenizer)


@pytest.fixture
def sharded(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    path = save_model(tmp_path / "sharded", tokenizer, max_shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) >= 3
    return path


def write_gguf(
    path: Path,
    source: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    leave_out: str = "",
    pre: str = "smollm",
    extra: dict[str, Any] | None = None,
    extra_tensor: str = "",
) -> Path:
    """The Llama of `source` as llama.cpp's converter writes it: names mapped, query and key rows interleaved."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for key, value in (extra or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_bool)(key, value)
    _write_tokenizer(writer, tokenizer, config.vocab_size, pre)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        mapped = names.get_name(name, try_suffixes=(".weight",))
        if name == "lm_head.weight" or (leave_out and leave_out in mapped):
            continue
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(mapped, tensor.numpy())
    if extra_tensor:
        writer.add_tensor(extra_tensor, torch.ones(8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerFast, size: int, pre: str) -> None:
    data = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    by_id = {index: token for token, index in data["vocab"].items()}
    tokens = [by_id.get(index, f"<unused{index}>") for index in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in data["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
