"""Foreign checkpoints become complete Hugging Face folders with the same model in them, or are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.model.checkpoints.conftest import VOCABULARY, llama_config, save_model, write_gguf
from zenray.model.checkpoints.convert import convert
from zenray.model.checkpoints.template import overhead_tokens
from zenray.model.config import MoDEConfig, RouterConfig, uniform_experts
from zenray.model.hf import ZenModeConfig, ZenModeForCausalLM
from zenray.spec.errors import InvalidDocument, InvalidValue, NotFound

TEXT = "the quick fox, 2025 times: don't!"


def logits(folder: Path, text_ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([text_ids])).logits


def assert_same_model(source: Path, made: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(TEXT).input_ids
    again = AutoTokenizer.from_pretrained(made)
    assert again(TEXT).input_ids == ids
    assert again.decode(ids) == TEXT
    assert again.chat_template
    torch.testing.assert_close(logits(made, ids), logits(source, ids), rtol=1e-4, atol=1e-5)


def refused(source: Path, tmp_path: Path, match: str) -> None:
    with pytest.raises(InvalidDocument, match=match):
        convert(source, tmp_path / "made")
    assert not (tmp_path / "made").exists()
    assert not list(tmp_path.glob("made*"))


@pytest.mark.parametrize("which", ["folder", "sharded"])
def test_a_folder_keeps_its_model(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = request.getfixturevalue(which)
    report = convert(source, tmp_path / "made", dtype="float32")
    assert report.model_type == "llama"
    assert report.architecture == "LlamaForCausalLM"
    assert report.template_overhead_tokens == overhead_tokens(tokenizer)
    assert report.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(source).parameters())
    assert report.context_tokens == 128
    assert report.notes == []
    assert_same_model(source, tmp_path / "made", tokenizer)


def test_weights_are_bfloat16_unless_told(folder: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    convert(folder, tmp_path / "made", on_converted=lambda done, total: told.append((done, total)))
    made = load_file(tmp_path / "made" / "model.safetensors")
    original = load_file(folder / "model.safetensors")
    assert made.keys() == original.keys()
    for name, tensor in made.items():
        assert torch.equal(tensor, original[name].to(torch.bfloat16))
    assert json.loads((tmp_path / "made" / "config.json").read_text())["dtype"] == "bfloat16"
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1] > 0


def test_converting_twice_gives_the_same_bytes(sharded: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert(sharded, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert "model.safetensors.index.json" in files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_what_was_converted_converts_to_itself(sharded: Path, tmp_path: Path) -> None:
    convert(sharded, tmp_path / "one")
    convert(tmp_path / "one", tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**SMALL),
        Qwen3Config(**SMALL, head_dim=16),
        Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
        MixtralConfig(**SMALL, num_local_experts=4),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures(config: Qwen2Config, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = save_model(tmp_path / "source", tokenizer, config)
    report = convert(source, tmp_path / "made", dtype="float32")
    assert report.model_type == config.model_type
    assert_same_model(source, tmp_path / "made", tokenizer)
    name = next(name for name in load_file(source / "model.safetensors") if "down_proj" in name or ".w2." in name)
    drop(source, name)
    with pytest.raises(InvalidDocument, match=f"1 of .* missing: {name}"):
        convert(source, tmp_path / "again")


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_what_a_mixtures_routers_have_learnt_is_imported_bit_for_bit(
    max_shard_size: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Thresholds, the count of their steps, and biases are no weights: they keep their types."""
    config = MoDEConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sparse_layers=(0, 1),
        expert_groups=uniform_experts(4, 16),
        expert_choice_layers=(0,),
        router=RouterConfig(selection_bias=True),
    )
    torch.manual_seed(0)
    model = ZenModeForCausalLM(ZenModeConfig.from_mode(config, bos_token_id=1, eos_token_id=2))
    for buffer in model.buffers():
        buffer.copy_(100 * torch.rand(buffer.shape))
    model.save_pretrained(tmp_path / "source", max_shard_size=max_shard_size)
    tokenizer.save_pretrained(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "made")
    assert (report.model_type, report.notes) == ("zen_mode", [])
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert made.dtype == torch.bfloat16
    learnt = dict(made.named_buffers())
    assert {name.rpartition(".")[2] for name in learnt} == {"bias_E", "cutoff_E", "steps"}
    for name, buffer in model.named_buffers():
        assert torch.equal(learnt[name], buffer) and learnt[name].dtype == buffer.dtype, name
    convert(tmp_path / "made", tmp_path / "again")
    for path in (tmp_path / "made").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def drop(source: Path, *names: str) -> None:
    tensors = load_file(source / "model.safetensors")
    for name in names:
        del tensors[name]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def test_missing_tensors_are_named(folder: Path, tmp_path: Path) -> None:
    drop(folder, "model.layers.1.mlp.up_proj.weight", "model.norm.weight")
    refused(folder, tmp_path, "2 of .* missing: model.layers.1.mlp.up_proj.weight, model.norm.weight")


def test_a_wrong_shape_is_named_with_both(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(63)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, tmp_path, r"model.norm.weight is \[63\], its config says \[64\]")


def test_layers_that_the_config_does_not_have_are_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    refused(folder, tmp_path, "9 tensors are not of this model: model.layers.2")


def test_buffers_that_old_checkpoints_saved_are_left_out(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    convert(folder, tmp_path / "made", dtype="float32")
    assert_same_model(folder, tmp_path / "made", tokenizer)
    with safe_open(tmp_path / "made" / "model.safetensors", "pt") as file:
        assert not any("inv_freq" in name for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("kept_bytes", [0, 4, 100, -1])
def test_a_file_cut_short_is_named(folder: Path, tmp_path: Path, kept_bytes: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    refused(folder, tmp_path, r"model\.safetensors is broken or cut short")


def test_a_missing_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    refused(sharded, tmp_path, f"incomplete: {victim.name} of")


def test_shards_that_do_not_hold_what_the_index_says(sharded: Path, tmp_path: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == files[0])
    wrong = index | {"weight_map": index["weight_map"] | {name: files[1]}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(wrong))
    refused(sharded, tmp_path, f"not in the file that the index names: {name}")
    del index["weight_map"][name]
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(sharded, tmp_path, f"does not name tensors that its files hold: {name}")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    refused(sharded, tmp_path, "not a file beside it")
    (sharded / "model.safetensors.index.json").unlink()
    refused(sharded, tmp_path, "and no model.safetensors.index.json")


def test_pickles_are_refused_without_being_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n(S'touch /tmp/owned'\ntR.")
    refused(source, tmp_path, r"pytorch_model\.bin is a pickle")
    refused(source / "pytorch_model.bin", tmp_path, r"pytorch_model\.bin is a pickle")


def test_things_that_are_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        convert(tmp_path / "absent", tmp_path / "made")
    with pytest.raises(InvalidValue, match="exists already"):
        convert(folder, folder)
    with pytest.raises(InvalidValue, match="Known: bfloat16, float16, float32"):
        convert(folder, tmp_path / "made", dtype="int3")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, tmp_path, "has no weights")
    refused(folder / "model.safetensors", tmp_path, "Name its folder")
    refused(folder / "config.json", tmp_path, "neither a folder nor a .gguf file")
    (empty / "x.gguf").write_bytes(b"not a gguf file")
    refused(empty, tmp_path, "does not begin as a GGUF file does")
    (folder / "config.json").unlink()
    refused(folder, tmp_path, "no config.json")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, tmp_path, "is an adapter, not a model")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, r"quantized \(awq\)"),
        ({"model_type": "no_such_model"}, "describes no model that can be loaded"),
        ({"model_type": "bert"}, "missing|not a causal"),
        ({"hidden_size": "many"}, "describes no model that can be loaded"),
    ],
)
def test_configs_that_cannot_be_used(folder: Path, tmp_path: Path, change: dict, match: str) -> None:  # type: ignore[type-arg]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    refused(folder, tmp_path, match)


def test_quantized_tensors_are_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, tmp_path, r"quantized weights: model\.norm\.weight \(F8_E4M3\)")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_broken_json_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).write_text('{"a": ')
    refused(folder, tmp_path, name.replace(".", r"\."))


def test_tokenizers_that_do_not_fit(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    small = save_model(tmp_path / "small", tokenizer, llama_config(vocab_size=VOCABULARY - 10))
    refused(small, tmp_path, f"its tokenizer has token {VOCABULARY - 1}, its model only {VOCABULARY - 10} rows")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    refused(folder, tmp_path, "has no tokenizer")


def test_a_missing_chat_template_is_noted_and_a_generation_config_made(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "generation_config.json").unlink()
    report = convert(folder, tmp_path / "made")
    assert report.notes == ["There is no chat template: the model answers completions, not chats."]
    generation = json.loads((tmp_path / "made" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)


def test_a_models_own_code_is_neither_run_nor_copied(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.EvilConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_evil.py").write_text("raise SystemExit('owned')")
    convert(folder, tmp_path / "made")
    assert not (tmp_path / "made" / "modeling_evil.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "made" / "config.json").read_text())


def test_gguf_gives_the_same_model(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = write_gguf(tmp_path / "model.gguf", folder, tokenizer)
    report = convert(file, tmp_path / "made", dtype="float32")
    assert report.architecture == "LlamaForCausalLM"
    assert report.notes == []
    assert_same_model(folder, tmp_path / "made", tokenizer)
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["rms_norm_eps"] == 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "made").model_max_length == 128
    splitter = json.loads((tmp_path / "made" / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"]
    assert splitter[0] == {"type": "Digits", "individual_digits": True}


def test_gguf_begins_texts_as_its_file_says(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for wanted in (True, False):
        file = write_gguf(
            tmp_path / f"{wanted}.gguf", folder, tokenizer, extra={"tokenizer.ggml.add_bos_token": wanted}
        )
        convert(file, tmp_path / f"made-{wanted}")
        ids = AutoTokenizer.from_pretrained(tmp_path / f"made-{wanted}")("the fox").input_ids
        assert (ids[0] == 1) is wanted


def test_gguf_without_a_tensor_is_refused(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = write_gguf(tmp_path / "model.gguf", folder, tokenizer, leave_out="blk.1.ffn_up")
    refused(file, tmp_path, r"missing keys model\.layers\.1\.mlp\.up_proj\.weight")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_gguf_cut_short_is_refused(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kept: float
) -> None:
    file = write_gguf(tmp_path / "model.gguf", folder, tokenizer)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
    refused(file, tmp_path, r"model\.gguf (is cut short|has no GGUF header)")


def test_gguf_that_would_be_another_model_is_refused(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    unknown = write_gguf(tmp_path / "a.gguf", folder, tokenizer, pre="no-such-split")
    refused(unknown, tmp_path, "how its tokenizer splits text .'no-such-split'. is not known")
    scaled = write_gguf(tmp_path / "b.gguf", folder, tokenizer, extra={"llama.rope.scaling.type": "yarn"})
    refused(scaled, tmp_path, "its positions are scaled")
    factors = write_gguf(tmp_path / "c.gguf", folder, tokenizer, extra_tensor="rope_freqs.weight")
    refused(factors, tmp_path, "rope_freqs.weight")


@pytest.mark.parametrize(
    ("template", "added"),
    [
        ("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}", 2),
        ("{% if messages[0]['role'] != 'system' %}<|im_start|>12<|im_end|>{% endif %}", 4),  # a default system prompt
        ("{% if messages|length > 1 %}{{ raise_exception('one only') }}{% endif %}<|im_start|>", 1),
        ("<|im_start|>{% if tools %}" + "1" * 200 + "{% endif %}", None),  # a preamble for tools
    ],
)
def test_what_a_template_adds_is_measured(tokenizer: PreTrainedTokenizerFast, template: str, added: int | None) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    found = overhead_tokens(own)
    assert found is not None and (found == added if added is not None else 1 < found <= 201)


def test_without_a_template_there_is_nothing_to_measure(tokenizer: PreTrainedTokenizerFast) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = None
    assert overhead_tokens(own) is None
