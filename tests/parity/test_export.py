"""Export: a stock class with the exported weights gives our logits; what no class can say is refused with reasons."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralForCausalLM, Qwen3MoeForCausalLM

from zenray.model.config import ExpertGroup, MoDEConfig, RopeParameters, RouterConfig
from zenray.model.hf import ZenModeConfig, ZenModeForCausalLM, register
from zenray.model.hf.export import choose_target, export
from zenray.model.upcycling.recipe import GroupRecipe, UpcyclingRecipe
from zenray.model.upcycling.upcycle import upcycle
from zenray.spec.errors import InvalidValue
from zenray.spec.versions import VersionRef
from zenray.storage.local import LocalStore
from zenray.storage.versions import publish

pytestmark = pytest.mark.parity
register()

CONFIG = MoDEConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sparse_layers=(0, 2),
    expert_groups=(ExpertGroup("general", 2, 16), ExpertGroup("code", 3, 24), ExpertGroup("math", 1, 16)),
    router=RouterConfig(experts_per_token=3),
    rope_parameters=RopeParameters("yarn", 1e6, factor=4.0, original_max_position_embeddings=16),
    initializer_range=0.2,
)
CASES = {
    "qwen3-moe, three widths, a dense layer": (replace(CONFIG, qk_norm=True), Qwen3MoeForCausalLM),
    "qwen3-moe, plain probabilities, tied": (
        replace(CONFIG, qk_norm=True, tie_word_embeddings=True, router=RouterConfig(renormalize=False)),
        Qwen3MoeForCausalLM,
    ),
    "mixtral, three widths": (replace(CONFIG, sparse_layers=(0, 1, 2)), MixtralForCausalLM),
    "mixtral, a dense layer as equal experts": (CONFIG, MixtralForCausalLM),
}


@pytest.mark.parametrize("case", CASES)
def test_the_stock_class_gives_our_logits(case, tmp_path):
    config, stock_class = CASES[case]
    torch.manual_seed(0)
    ours = ZenModeForCausalLM(ZenModeConfig.from_mode(config)).eval()
    ours.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "stock", replicate_dense=True, shard_bytes=20_000)
    stock, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert type(stock) is stock_class
    assert not any(loading.values()), loading
    ids = torch.randint(0, 61, (2, 40))
    torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=1e-5, atol=1e-5)


def test_an_upcycled_llama_goes_out_as_mixtral_with_its_companions(llama_folder, tmp_path):
    (llama_folder / "chat_template.jinja").write_text("{{ messages }}")
    made = UpcyclingRecipe(groups=(GroupRecipe("general", (0.0, 0.5)),), layers=(2, 3))
    upcycle(llama_folder, made, tmp_path / "mode")
    assert export(tmp_path / "mode", tmp_path / "stock", replicate_dense=True) == "mixtral"
    assert (tmp_path / "stock" / "chat_template.jinja").read_text() == "{{ messages }}"
    ours, stock = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("mode", "stock")
    )
    ids = torch.randint(0, 97, (2, 20))
    torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, r"mixtral: 1 dense layers"),
        ({"qk_norm": True, "shared_expert_width": 8}, "a shared expert of width 8"),
        ({"qk_norm": True, "sliding_window": 4, "local_layers": (0, 1)}, "2 layers of local attention"),
        ({"attention_bias": True}, "attention biases"),
        ({"expert_choice_layers": (0,)}, "1 layers where experts choose"),
        ({"router": RouterConfig(selection_bias=True)}, "selection bias"),
        ({"router": RouterConfig(temperature=2.0)}, r"temperature of 2\.0"),
        ({"sparse_layers": (0, 1, 2), "router": RouterConfig(renormalize=False)}, "not renormalised"),
        ({"sparse_layers": (), "expert_groups": ()}, "there are no experts"),
    ],
)
def test_what_no_class_says_is_refused_with_the_reason(change, reason):
    with pytest.raises(InvalidValue, match=reason):
        choose_target(replace(CONFIG, **change))


def test_only_our_own_checkpoints_are_exported(llama_folder, tmp_path):
    with pytest.raises(InvalidValue, match="model_type 'llama', not 'zen_mode'"):
        export(llama_folder, tmp_path / "stock")


def test_a_fresh_process_upcycles_and_exports(llama_folder, tmp_path):
    """As `zenray run` does it: nothing has been registered or imported before."""
    publish(LocalStore(tmp_path / "store"), VersionRef(model="dense", version="v0"), llama_folder)
    (tmp_path / "job.yaml").write_text(
        "kind: upcycle\nname: tiny\nbase: {model: dense}\ninto: {model: mode, version: v1}\n"
        "groups: [{name: general, experts: 2}]\nlayers: last 2\nstock_format: replicate\n"
    )
    command = [sys.executable, "-m", "zenray.training", str(tmp_path / "job.yaml")]
    command += ["--store", f"file:{tmp_path}/store", "--work-dir", str(tmp_path / "work")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert [line.split()[1] for line in ran.stdout.splitlines() if line.startswith("published")] == [
        "mode@v1/safetensors",
        "mode@v1/mixtral",
    ]
