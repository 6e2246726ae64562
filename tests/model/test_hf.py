"""The Hugging Face classes: loading, saving, generation, caches."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.model.strategies import configs
from zenray.model.config import ExpertGroup, MoDEConfig, RouterConfig
from zenray.model.hf import ZenModeConfig, ZenModeForCausalLM, register
from zenray.model.network import MoDE
from zenray.spec.errors import InvalidValue

register()

CONFIG = MoDEConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sparse_layers=(1, 2),
    expert_groups=(ExpertGroup("general", 3, 16), ExpertGroup("code", 2, 24)),
    sliding_window=4,
    local_layers=(0, 2),
    shared_expert_width=8,
    initializer_range=0.3,
)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs())
def test_save_load_save_is_byte_identical(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    first = ZenModeForCausalLM(ZenModeConfig.from_mode(config))
    for buffer in first.buffers():  # selection biases, thresholds and their steps: they must travel too
        buffer.copy_(torch.rand(buffer.shape) + 1)
    first.save_pretrained(folder / "1")
    second = AutoModelForCausalLM.from_pretrained(folder / "1")
    assert type(second) is ZenModeForCausalLM
    assert second.mode == config
    second.save_pretrained(folder / "2")
    assert hashes(folder / "1") == hashes(folder / "2")
    ids = torch.arange(10)[None] % config.vocab_size
    assert torch.equal(first.eval()(ids).logits, second(ids).logits)


def test_the_readmes_lines_load_a_published_version(tmp_path, monkeypatch):
    folder = tmp_path / ".zenray/store/zen/smollm2-mode/v1/safetensors"
    ZenModeForCausalLM(ZenModeConfig.from_mode(CONFIG)).save_pretrained(folder)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    blocks = [block.split("```")[0] for block in readme.split("```python\n")[1:]]
    lines = next(block for block in blocks if "from_pretrained" in block)
    assert "register()" in lines  # here that has been done
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(lines, found)  # noqa: S102  (our own README)
    assert found["model"].mode == CONFIG


def test_bfloat16_keeps_what_routers_have_learnt_bit_for_bit(tmp_path):
    router = RouterConfig(selection_bias=True)
    config = replace(CONFIG, expert_choice_layers=(2,), router=router)
    model = ZenModeForCausalLM(ZenModeConfig.from_mode(config))
    for buffer in model.buffers():
        buffer.copy_(torch.rand(buffer.shape) + 1)
    learnt = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    for again in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16),
        AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16),
    ):
        found = dict(again.named_buffers())
        assert {name: buffer.dtype for name, buffer in found.items()} == {n: b.dtype for n, b in learnt.items()}
        assert again.lm_head.weight.dtype != torch.float32
    found = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_buffers())
    assert len(found) == 3 and all(torch.equal(found[name], buffer) for name, buffer in learnt.items())


def test_it_is_the_same_network_as_the_plain_one():
    plain = MoDE(CONFIG).eval()
    wrapped = ZenModeForCausalLM(ZenModeConfig.from_mode(CONFIG)).eval()
    wrapped.load_state_dict(plain.state_dict())
    ids = torch.randint(0, 64, (2, 13))
    valid = torch.ones_like(ids)
    valid[1, 9:] = 0
    one, other = plain(ids, valid.bool()).logits, wrapped(ids, attention_mask=valid).logits
    torch.testing.assert_close(one[valid.bool()], other[valid.bool()])


def test_generation_with_a_cache_equals_recomputing_the_whole_prefix():
    torch.manual_seed(0)
    model = ZenModeForCausalLM(ZenModeConfig.from_mode(CONFIG)).eval()
    ids = torch.randint(0, 64, (2, 5))
    cached = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)
    for _ in range(16):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, ids)
    assert len(set(cached[0].tolist())) > 3


def test_left_padding_does_not_change_what_is_generated():
    torch.manual_seed(0)
    model = ZenModeForCausalLM(ZenModeConfig.from_mode(CONFIG)).eval()
    short = torch.randint(1, 64, (1, 4))
    alone = model.generate(short, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 4:]
    long = torch.randint(1, 64, (1, 9))
    batch = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), short], dim=1), long])
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    together = model.generate(batch, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(together[0, 9:], alone)


def test_loss_is_the_language_model_loss_plus_the_routers_share():
    torch.manual_seed(0)
    model = ZenModeForCausalLM(ZenModeConfig.from_mode(CONFIG)).train()
    ids = torch.randint(0, 64, (2, 7))
    output = model(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert output.aux_loss > 0.01  # two layers of at least 0.01 × 1, up to rounding
    torch.testing.assert_close(output.loss, expected + output.aux_loss)
    output.loss.backward()
    assert model.model.layers[1].mlp.gate.weight.grad.abs().sum() > 0


def test_switching_gradient_checkpointing_reaches_the_network():
    model = ZenModeForCausalLM(ZenModeConfig.from_mode(CONFIG))
    assert model.model.gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.model.gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.model.gradient_checkpointing


def test_impossible_config_json_is_refused(tmp_path):
    config = ZenModeConfig.from_mode(CONFIG)
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"num_key_value_heads": 2', '"num_key_value_heads": 3'))
    with pytest.raises(InvalidValue, match="4 attention heads cannot share 3 key/value heads"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("renormalize", [True, False])
def test_a_version_without_a_setting_for_experts_that_choose_is_what_it_was(renormalize: bool) -> None:
    config = replace(CONFIG, router=RouterConfig(renormalize=renormalize))
    saved = ZenModeConfig.from_mode(config).to_dict()
    assert ZenModeConfig(**saved).to_mode().router.expert_choice_renormalize is False
    del saved["router"]["expert_choice_renormalize"]
    assert ZenModeConfig(**saved).to_mode().router.expert_choice_renormalize is renormalize
    assert "expert_choice_renormalize" not in saved["router"]


def test_what_it_cannot_return_is_refused_not_ignored():
    model = ZenModeForCausalLM(ZenModeConfig.from_mode(CONFIG))
    with pytest.raises(InvalidValue, match="hidden states"):
        model(torch.ones(1, 2, dtype=torch.long), output_hidden_states=True)


def test_auto_tokenizer_loads_beside_it(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1, "world": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    ZenModeForCausalLM(ZenModeConfig.from_mode(CONFIG)).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("hello world")["input_ids"] == [1, 2]
