"""Whether a Hugging Face folder holds every tensor that its config asks for, in the right shape. Reads headers only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from zenray.model.checkpoints.source import INDEX_NAME, SINGLE_NAME, read_json
from zenray.model.weights import DTYPE_CODES
from zenray.spec.errors import InvalidDocument

_PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_COMPUTED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")  # buffers that old checkpoints saved
_MOST_NAMED = 5


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file's header describes it; `dtype` in safetensors' words (F32, BF16 …).

    `is_buffer`: not a weight but what the model learnt beside them (biases of a router, counts), which is never cast.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    is_buffer: bool = False


@dataclass(frozen=True)
class Expected:
    """The tensors that a checkpoint of some config has, on the meta device. `tied`: name → the name it equals."""

    tensors: dict[str, torch.Tensor]
    buffers: frozenset[str]
    tied: dict[str, str]

    def allows(self, name: str, dtype: str) -> bool:
        """Whether a tensor may be stored so: as plain floating-point numbers, or as the model itself keeps it."""
        return dtype in _PLAIN_DTYPES or (name in self.buffers and dtype == DTYPE_CODES.get(self.tensors[name].dtype))


def load_config(folder: Path, *, quantized: bool = False) -> PretrainedConfig:
    """The folder's config. InvalidDocument for kinds that transformers does not know, and for quantized models unless
    one is wanted."""
    raw = read_json(folder / "config.json")
    if raw.get("quantization_config") and not quantized:
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise InvalidDocument(
            f"{folder / 'config.json'}: the weights are quantized ({method}).",
            hint="Name their format (--format awq-int4 or gptq-int8), or import the original weights or a GGUF file.",
        )
    if raw.get("model_type") == "zen_mode":
        from zenray.model import hf

        hf.register()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises what it likes for a config that it cannot read
        raise InvalidDocument(f"{folder / 'config.json'} describes no model that can be loaded: {error}") from None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InvalidDocument(
            f"{folder / 'config.json'}: model_type {config.model_type!r} is not a causal language model."
        )
    return config


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the folder by name, from the headers of its files.

    Raises InvalidDocument for a file that is missing, cut short or broken, and where the index and the files differ.
    """
    index_path = folder / INDEX_NAME
    if not index_path.is_file():
        return _read_header(folder / _only_file(folder))
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidDocument(f"{index_path} has no weight_map.")
    files = sorted({str(name) for name in weight_map.values()})
    for name in files:
        if Path(name).name != name:
            raise InvalidDocument(f"{index_path} names {name!r}, which is not a file beside it.")
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise InvalidDocument(f"{folder} is incomplete: {named(absent)} of {len(files)} files missing.")
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        tensors |= _read_header(folder / name)
    misplaced = sorted(name for name, file in weight_map.items() if name not in tensors or tensors[name].file != file)
    if misplaced:
        raise InvalidDocument(f"{folder} is incomplete: not in the file that the index names: {named(misplaced)}.")
    unnamed = sorted(set(tensors) - set(weight_map))
    if unnamed:
        raise InvalidDocument(f"{index_path} does not name tensors that its files hold: {named(unnamed)}.")
    return tensors


def _only_file(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if SINGLE_NAME in names:
        return SINGLE_NAME
    if len(names) != 1:
        raise InvalidDocument(f"{folder} has {len(names)} .safetensors files and no {INDEX_NAME}.")
    return names[0]


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="pt") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118  (not a dict)
                view = file.get_slice(name)
                found[name] = StoredTensor(path.name, str(view.get_dtype()), tuple(view.get_shape()))
            return found
    except (SafetensorError, OSError) as error:
        raise InvalidDocument(f"{path} is broken or cut short: {error}.") from None


def check(folder: Path) -> dict[str, StoredTensor]:
    """The folder's tensors that its model needs. InvalidDocument saying what is missing, wrong or too much."""
    config = load_config(folder)
    stored = read_weights(folder)
    expected = expected_tensors(config)
    quantized = sorted(name for name, tensor in stored.items() if not expected.allows(name, tensor.dtype))
    if quantized:
        raise InvalidDocument(
            f"{folder} holds quantized weights: {named([f'{n} ({stored[n].dtype})' for n in quantized])}.",
            hint="Import the model's original bf16, fp16 or fp32 weights, or a GGUF file.",
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.tensors.items()}
    compare(folder, config.model_type, shapes, stored, expected.tied)
    return {name: replace(tensor, is_buffer=name in expected.buffers) for name, tensor in stored.items()}


def read_weights(folder: Path) -> dict[str, StoredTensor]:
    """`read_tensors` without what a model computes by itself."""
    return {name: tensor for name, tensor in read_tensors(folder).items() if not name.endswith(_COMPUTED_SUFFIXES)}


def compare(
    folder: Path,
    model_type: str,
    shapes: dict[str, tuple[int, ...]],
    stored: dict[str, StoredTensor],
    tied: dict[str, str],
) -> None:
    """InvalidDocument unless exactly the tensors of `shapes` are stored, but for tied ones, which may be left out."""
    reasons = []
    missing = sorted(name for name in shapes if name not in stored and not _covered(name, tied, stored))
    if missing:
        reasons.append(f"{len(missing)} of {len(shapes)} tensors are missing: {named(missing)}")
    wrong = [
        f"{name} is {list(stored[name].shape)}, its config says {list(shape)}"
        for name, shape in sorted(shapes.items())
        if name in stored and stored[name].shape != shape
    ]
    if wrong:
        reasons.append(f"{len(wrong)} tensors have another shape: {named(wrong)}")
    surplus = sorted(set(stored) - set(shapes))
    if surplus:
        reasons.append(f"{len(surplus)} tensors are not of this model: {named(surplus)}")
    if reasons:
        raise InvalidDocument(f"{folder} is not a complete {model_type} model: {'; '.join(reasons)}.")


def expected_tensors(config: PretrainedConfig) -> Expected:
    """What a checkpoint of this config has.

    The model is built on the meta device, which takes no memory; its own names are turned back into those of
    checkpoints, which differ for some models (experts are fused when loaded).
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    tensors = revert_weight_conversion(model, model.state_dict())
    buffers = frozenset(name for name, _ in model.named_buffers() if name in tensors)
    return Expected(tensors, buffers, dict(model.all_tied_weights_keys))


def _covered(name: str, tied: dict[str, str], stored: dict[str, StoredTensor]) -> bool:
    """Whether a tensor that is not stored equals one that is."""
    twins = {tied.get(name), *(other for other, target in tied.items() if target == name)}
    return any(twin in stored for twin in twins)


def named(names: list[str]) -> str:
    """The first few of them, and how many more there are."""
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
