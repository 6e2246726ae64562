"""A GGUF file into a Hugging Face folder: weights dequantized, tokenizer rebuilt from the file's metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata

from zenray.model.checkpoints.folder import DTYPES, OnConverted, write_config, write_generation_config
from zenray.model.checkpoints.source import read_json
from zenray.spec.errors import InvalidDocument, suggest

_MOST_BYTES_PER_FILE = "4GB"
# llama.cpp's names for splitting digits one by one, then as GPT-2 does; transformers has no entry for them.
_DIGITS_THEN_GPT2 = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})
_GPT2 = frozenset({"gpt-2", "default", "mpt", "olmo", "jais", "trillion"})


def convert_gguf(file: Path, target: Path, dtype: str, on_converted: OnConverted) -> None:
    """Write the model of `file` to `target`, an empty folder. Memory: the whole model in `dtype`.

    Raises InvalidDocument for a file that is cut short, lacks tensors, or is of a kind that cannot be converted.
    """
    size_bytes = file.stat().st_size
    on_converted(0, size_bytes)
    metadata, names = _read_metadata(file)
    _convert_weights(file, target, dtype)
    _check_position_scaling(file, target, metadata, names)
    tokenizer = _convert_tokenizer(file, metadata)
    tokenizer.save_pretrained(target)
    on_converted(size_bytes, size_bytes)


def _read_metadata(file: Path) -> tuple[dict[str, Any], set[str]]:
    """The file's metadata and its tensors' names."""
    try:
        header = GgufHeader.from_file(str(file))
        metadata, names = read_gguf_metadata(str(file))
    except Exception as error:  # a cut or foreign header fails in any of a dozen ways
        raise InvalidDocument(f"{file} has no GGUF header that can be read: {error}") from None
    end_bytes = max((header.data_start + tensor.offset + tensor.nbytes for tensor in header.tensors), default=0)
    if end_bytes > file.stat().st_size:
        raise InvalidDocument(f"{file} is cut short: it has {file.stat().st_size} bytes of {end_bytes}.")
    if metadata.get("split.count", 0) > 1:
        raise InvalidDocument(
            f"{file} is one of {metadata['split.count']} parts.", hint="Merge them with llama-gguf-split --merge."
        )
    return metadata, set(names)


def _check_position_scaling(file: Path, target: Path, metadata: dict[str, Any], names: set[str]) -> None:
    """transformers reads no scaled rotary positions (Llama 3.1, YaRN, LongRoPE) out of a GGUF file: refuse those."""
    kind = metadata.get(f"{metadata['general.architecture']}.rope.scaling.type", "none")
    factors = sorted(name for name in names if name.startswith(("rope_freqs", "rope_factors")))
    if kind in ("none", "") and not factors:
        return
    rope = read_json(target / "config.json").get("rope_parameters") or {}
    if rope.get("rope_type", "default") == "default":
        raise InvalidDocument(
            f"{file}: its positions are scaled ({', '.join(factors) or kind}), which cannot be carried over from GGUF.",
            hint="Import the model's safetensors folder.",
        )


def _convert_weights(file: Path, target: Path, dtype: str) -> None:
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=DTYPES[dtype],
            output_loading_info=True,
            trust_remote_code=False,
        )
    except Exception as error:  # an architecture that transformers cannot map, a tensor that does not fit
        raise InvalidDocument(f"{file} cannot be converted: {error}") from None
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(str(name) for name in loaded[what])
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise InvalidDocument(f"{file} is not complete: {what.replace('_', ' ')} {', '.join(names[:5])}{more}.")
    if loaded.get("error_msgs"):
        raise InvalidDocument(f"{file} cannot be converted: {loaded['error_msgs']}")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target, max_shard_size=_MOST_BYTES_PER_FILE)
    raw = read_json(target / "config.json")
    # GGUF keeps this as a 32-bit number: 1e-05 came back as 9.999999747378752e-06.
    raw |= {key: float(f"{raw[key]:.7g}") for key in ("rms_norm_eps", "layer_norm_eps") if key in raw}
    write_config(raw, target, dtype)
    write_generation_config(target)


def _convert_tokenizer(file: Path, metadata: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    except Exception as error:
        raise InvalidDocument(f"{file}: its tokenizer cannot be converted: {error}") from None
    kind = metadata.get("tokenizer.ggml.model")
    split = metadata.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2":
        if split in _DIGITS_THEN_GPT2:
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
                ]
            )
        elif split not in GGUF_PRE_TOKENIZER_SPLITS and split not in _GPT2:
            known = {*GGUF_PRE_TOKENIZER_SPLITS, *_DIGITS_THEN_GPT2, *_GPT2}
            raise InvalidDocument(
                f"{file}: how its tokenizer splits text ({split!r}) is not known here; it would read other tokens "
                "than the model was trained on.",
                hint=suggest(str(split), known) + " Import the model's safetensors folder.",
            )
    _set_begin_token(tokenizer, bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")))
    context_tokens = metadata.get(f"{metadata['general.architecture']}.context_length")
    if context_tokens:
        tokenizer.model_max_length = int(context_tokens)
    return tokenizer


def _set_begin_token(tokenizer: PreTrainedTokenizerBase, wanted: bool) -> None:
    """Make the tokenizer begin a text with its begin token, or not, as the file says; transformers does not read it."""
    begin, begin_id = tokenizer.bos_token, tokenizer.bos_token_id
    if begin_id is None or (tokenizer("a").input_ids[:1] == [begin_id]) == wanted:
        return
    single, pair = (f"{begin} $A", f"{begin} $A {begin} $B") if wanted else ("$A", "$A $B")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(begin, begin_id)]
    )
