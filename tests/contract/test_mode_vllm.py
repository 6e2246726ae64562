"""Our vLLM model, and our exports, in a real engine: log-probabilities and greedy answers as zenray.model has them."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from zenray.model.config import ExpertGroup, MoDEConfig, RopeParameters, RouterConfig
from zenray.model.hf import ZenModeConfig, ZenModeForCausalLM
from zenray.model.hf.export import export
from zenray.model.router import ExpertChoiceRouter, TokenChoiceRouter

pytestmark = pytest.mark.contract

PLAIN = MoDEConfig(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    sparse_layers=(1, 2),
    expert_groups=(ExpertGroup("general", 4, 64),),
    initializer_range=0.15,
    max_position_embeddings=256,
)
CASES = {
    "plain token choice, tied": replace(PLAIN, tie_word_embeddings=True),
    "thresholds, widths, shared expert, windows, YaRN, QK-norm": replace(
        PLAIN,
        sparse_layers=(0, 2, 3),
        expert_choice_layers=(0, 3),
        expert_groups=(ExpertGroup("general", 2, 32), ExpertGroup("code", 3, 64), ExpertGroup("math", 1, 40)),
        router=RouterConfig(experts_per_token=3, renormalize=False, temperature=1.7),
        shared_expert_width=48,
        shared_expert_gate=True,
        qk_norm=True,
        rope_parameters=RopeParameters("yarn", 1e4, factor=4.0, original_max_position_embeddings=32),
        sliding_window=9,
        local_layers=(1, 2),
    ),
    "selection bias, no thresholds yet, attention bias, fallback": replace(
        PLAIN,
        sparse_layers=(0, 1, 2, 3),
        expert_choice_layers=(1,),
        router=RouterConfig(selection_bias=True, capacity_factor=1.0, expert_choice_renormalize=True),
        shared_expert_width=40,
        attention_bias=True,
        rope_parameters=RopeParameters("linear", 1e4, factor=2.0),
    ),
    "no experts, all layers local": replace(
        PLAIN,
        sparse_layers=(),
        expert_groups=(),
        sliding_window=12,
        local_layers=(0, 1, 2, 3),
        rope_parameters=RopeParameters("llama3", 1e4, factor=8.0, original_max_position_embeddings=64),
    ),
}


PROMPTS = [
    torch.randint(0, 160, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (2, 17, 60)
]

# What `zenray run` publishes for stock vLLM: the class, and the model that it is made of.
EXPORTED = {
    "Qwen3-MoE: three groups, two widths, a dense layer, plain probabilities, YaRN": (
        "Qwen3MoeForCausalLM",
        replace(
            PLAIN,
            expert_groups=(ExpertGroup("general", 2, 32), ExpertGroup("code", 3, 64), ExpertGroup("math", 1, 32)),
            router=RouterConfig(experts_per_token=3, renormalize=False),
            qk_norm=True,
            rope_parameters=RopeParameters("yarn", 1e4, factor=4.0, original_max_position_embeddings=32),
        ),
    ),
    "Mixtral: two widths, two dense layers as equal experts": (
        "MixtralForCausalLM",
        replace(PLAIN, expert_groups=(ExpertGroup("general", 2, 64), ExpertGroup("code", 2, 96))),
    ),
}


def make_checkpoint(config: MoDEConfig, folder: Path) -> ZenModeForCausalLM:
    """Random weights, biases and norms; routers that have learnt something. Saved as every zen_mode checkpoint is."""
    torch.manual_seed(0)
    model = ZenModeForCausalLM(ZenModeConfig.from_mode(config, eos_token_id=0)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, TokenChoiceRouter) and module.bias_E is not None:
                module.bias_E.copy_(0.2 * torch.randn_like(module.bias_E))
            if isinstance(module, ExpertChoiceRouter) and module.cutoff_E.numel() == 6:
                module.cutoff_E.copy_(torch.tensor([0.05, 0.3, 0.2, 0.12, 0.45, 0.25]))
                module.steps.fill_(7)
    model.save_pretrained(folder)
    return model


def ask_vllm(folders: list[Path], prompts: list[list[int]], tmp_path: Path, **engine: Any) -> dict[str, list[Any]]:
    """What `tests.contract.vllm_answers` prints of each folder: "answers" and "routers"."""
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    command = [sys.executable, "-m", "tests.contract.vllm_answers", str(tmp_path / "prompts.json"), json.dumps(engine)]
    ran = subprocess.run([*command, *map(str, folders)], capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stderr[-4000:]
    told: dict[str, list[Any]] = {"answers": [], "routers": []}
    for line in ran.stdout.splitlines():
        what, _, found = line.partition(": ")
        if what in told:
            told[what].append(json.loads(found))
    return told


@torch.no_grad()
def check_answer(model: ZenModeForCausalLM, prompt: list[int], answer: dict[str, Any]) -> None:
    """Every token's log-probability, and that each answered token is our likeliest one."""
    ids = torch.tensor([prompt + answer["tokens"]])
    logprobs = model(ids).logits[0, :-1].log_softmax(dim=-1)
    ours = logprobs.gather(1, ids[0, 1:, None])[:, 0]
    theirs = torch.tensor(answer["prompt_logprobs"] + answer["logprobs"])
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert logprobs[len(prompt) - 1 :].argmax(dim=-1).tolist() == answer["tokens"]


def test_vllm_answers_as_our_own_network_does(tmp_path: Path) -> None:
    """Our vLLM model, and vLLM's own with what our export makes: one process, one engine after the other.

    In bfloat16, whose rounding moves answers, what routers have learnt must still be there bit for bit.
    """
    models, folders = {}, []
    for case, config in CASES.items():
        folders.append(tmp_path / str(len(folders)))
        models[case] = make_checkpoint(config, folders[-1])
    for case, (stock_class, config) in EXPORTED.items():
        folders.append(tmp_path / str(len(folders)))
        models[case] = make_checkpoint(config, tmp_path / "ours")
        export(tmp_path / "ours", folders[-1], replicate_dense=True)
        assert json.loads((folders[-1] / "config.json").read_text())["architectures"] == [stock_class]
    learnt = {
        case: {name: buffer.tolist() for name, buffer in models[case].named_buffers() if ".gate." in name}
        for case in CASES
    }
    halves = {case: tmp_path / f"half-{index}" for index, case in enumerate(CASES) if learnt[case]}
    assert len(halves) == 2, "thresholds, and biases"
    for case, folder in halves.items():
        deepcopy(models[case]).to(torch.bfloat16).save_pretrained(folder)
    told = ask_vllm([*folders, *halves.values()], PROMPTS, tmp_path)
    for case, routers in zip(halves, told["routers"][len(folders) :], strict=True):
        assert routers == learnt[case], case
    check_answers(models, PROMPTS, told["answers"][: len(folders)])


@pytest.mark.nightly
@pytest.mark.parametrize(
    "engine",
    [
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 4},  # more ranks than key/value heads
    ],
    ids=json.dumps,
)
def test_ranks_that_share_a_model_answer_as_one(engine: dict[str, Any], tmp_path: Path) -> None:
    """Processes with a part of the weights each, that speak over gloo; all that can be sharded is in these two.

    Not expert parallel: vLLM's CPU kernel ignores which experts a rank has, and dies (docs/gpu-checklist.md).
    """
    cases = {case: config for case, config in CASES.items() if case.startswith(("thresholds", "selection bias"))}
    cases = {case: replace(config, tie_word_embeddings=config.attention_bias) for case, config in cases.items()}
    folders = [tmp_path / str(index) for index in range(len(cases))]
    models = {case: make_checkpoint(*pair) for case, *pair in zip(cases, cases.values(), folders, strict=True)}
    check_answers(models, PROMPTS, ask_vllm(folders, PROMPTS, tmp_path, **engine)["answers"])


def check_answers(models: dict[str, ZenModeForCausalLM], prompts: list[list[int]], found: list[Any]) -> None:
    for (case, model), answers in zip(models.items(), found, strict=True):
        for prompt, answer in zip(prompts, answers, strict=True):
            try:
                check_answer(model, prompt, answer)
            except AssertionError as error:
                raise AssertionError(f"{case}, prompt of {len(prompt)} tokens: {error}") from error


def test_what_vllm_cannot_serve_is_refused_before_an_engine_starts(tmp_path: Path) -> None:
    """In the process that asks for the engine, where the reason reaches the person who deploys."""
    groups = (ExpertGroup("general", 3, 64), ExpertGroup("deep", 1, 128, kind="deep"))
    make_checkpoint(replace(PLAIN, expert_groups=groups), tmp_path)
    program = "import sys; from vllm.engine.arg_utils import EngineArgs\nEngineArgs(sys.argv[1]).create_model_config()"
    ran = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert ran.returncode != 0
    assert "InvalidValue: vLLM cannot serve this model: 1 of its 4 experts are not feed-forward" in ran.stderr
    assert "'deep' (1 deep)" in ran.stderr
