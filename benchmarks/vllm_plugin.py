"""Our vLLM model against vLLM's own Qwen3MoeForCausalLM: the same weights, exported, in two engines of one process.

    python -m benchmarks.vllm_plugin [--quick]

One thread, CPU time of this process, the two in turn, the best of several rounds: on a shared machine wall time says
little. Both must answer with the same tokens, or the program fails. The ratio is our tokens per second by theirs.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import print_report

SEQUENCES, PROMPT_TOKENS, NEW_TOKENS = 16, 32, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    # Before torch and vLLM are imported, which read them then; the engine runs in this process, whose time is counted.
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoints(Path(folder))
        engines = {name: open_engine(Path(folder) / name) for name in ("ours", "qwen3_moe")}
        best_s = measure(engines, rounds=4 if options.quick else 12)
    tokens = SEQUENCES * NEW_TOKENS
    rates = {name: tokens / seconds for name, seconds in best_s.items()}
    print_report(
        "vLLM models, one thread, CPU time",
        ["model", "s", "tokens/s"],
        [[name, best_s[name], rates[name]] for name in best_s],
        {"ratio": round(rates["ours"] / rates["qwen3_moe"], 3)},
        notes=[f"{SEQUENCES} sequences at once, {PROMPT_TOKENS} tokens given and {NEW_TOKENS} answered, float32."],
    )


def make_checkpoints(folder: Path) -> None:
    """`ours` and `qwen3_moe`: one network in both forms."""
    import torch

    from zenray.model.config import MoDEConfig, RouterConfig, uniform_experts
    from zenray.model.hf import ZenModeConfig, ZenModeForCausalLM
    from zenray.model.hf.export import export

    torch.manual_seed(0)
    config = MoDEConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        sparse_layers=(1, 2, 3, 4, 5),
        expert_groups=uniform_experts(8, 256),
        router=RouterConfig(experts_per_token=2),
        qk_norm=True,
        initializer_range=0.08,
    )
    ZenModeForCausalLM(ZenModeConfig.from_mode(config, eos_token_id=0)).save_pretrained(folder / "ours")
    target = export(folder / "ours", folder / "qwen3_moe")
    assert target == "qwen3_moe", target


def open_engine(folder: Path) -> Any:
    from vllm import LLM

    return LLM(
        str(folder),
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,  # as deployments do unless asked otherwise
        enable_prefix_caching=False,  # each round computes its prompts
        max_model_len=256,
        max_num_seqs=SEQUENCES,
        kv_cache_memory_bytes=1 << 26,
    )


def measure(engines: dict[str, Any], rounds: int) -> dict[str, float]:
    """The least CPU seconds of a round of each, in turn after one to warm up. AssertionError if answers differ."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    prompts = [
        {"prompt_token_ids": [(17 * s + 29 * t) % 4095 + 1 for t in range(PROMPT_TOKENS)]} for s in range(SEQUENCES)
    ]
    best_s = dict.fromkeys(engines, float("inf"))
    for turn in range(rounds + 1):
        answers = []
        for name, engine in engines.items():
            start = time.process_time()
            outputs = engine.generate(prompts, greedy, use_tqdm=False)
            if turn:
                best_s[name] = min(best_s[name], time.process_time() - start)
            answers.append([output.outputs[0].token_ids for output in outputs])
        assert answers[0] == answers[1], "the two models answer with different tokens"
    return best_s


if __name__ == "__main__":
    main()
