"""vLLM in a process of its own: greedy answers to given tokens, with log-probabilities, as one line of JSON a folder.

python -m tests.contract.vllm_answers PROMPTS.json ENGINE FOLDER...

ENGINE: more of the engine's arguments, as JSON, such as {"tensor_parallel_size": 2}; without any, a second line says
what the loaded routers hold beside their weights. Models run in the dtype of their config.json; only float32 answers.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

NEW_TOKENS = 16


def answers(folder: str, prompts: list[list[int]], **engine: Any) -> list[dict[str, Any]]:
    """For each prompt: `prompt_logprobs` of its tokens but the first, `tokens` of the answer and their `logprobs`."""
    from vllm import LLM, SamplingParams

    dtype = json.loads(Path(folder, "config.json").read_text())["dtype"]
    asked = prompts if dtype == "float32" else []
    llm = LLM(
        folder,
        dtype=dtype,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=8,
        kv_cache_memory_bytes=1 << 26,
        **engine,
    )
    greedy = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, logprobs=0, prompt_logprobs=0, ignore_eos=True, detokenize=False
    )
    found = []
    for output in llm.generate([{"prompt_token_ids": prompt} for prompt in asked], greedy, use_tqdm=False):
        given, answer = output.prompt_token_ids, output.outputs[0]
        found.append(
            {
                "prompt_logprobs": [
                    chosen[token].logprob for token, chosen in zip(given[1:], output.prompt_logprobs[1:], strict=True)
                ],
                "tokens": list(answer.token_ids),
                "logprobs": [
                    chosen[token].logprob for token, chosen in zip(answer.token_ids, answer.logprobs, strict=True)
                ],
            }
        )
    if not engine:  # other processes would have to be sent the function
        print(f"routers: {json.dumps(llm.apply_model(learnt_by_routers)[0])}", flush=True)
    del llm
    return found


def learnt_by_routers(model: Any) -> dict[str, Any]:
    """Thresholds, their steps and biases, by the names that checkpoints use."""
    ours = (".bias_E", ".cutoff_E", ".steps")
    return {name: value.tolist() for name, value in model.named_parameters() if name.endswith(ours)}


def main() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    from zenray.serving.engine.vllm import environment

    os.environ.update(environment(1, 0) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    prompts, engine = json.loads(Path(sys.argv[1]).read_text()), json.loads(sys.argv[2])
    for folder in sys.argv[3:]:
        print(f"answers: {json.dumps(answers(folder, prompts, **engine))}", flush=True)
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
