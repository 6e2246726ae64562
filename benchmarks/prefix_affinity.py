"""How much of the prompts two replicas find in their caches: through the gateway, and asked by turns.

    python -m benchmarks.prefix_affinity [--quick]

Two vLLM servers (two layers of random weights, prefix caching on), each with a KV cache that holds about half of what
eight system prompts of 2,048 tokens take. Eight clients, each asking one thing after the other: one of the eight
prompts, drawn anew each time, and a question that nobody has asked. Once through the gateway (two processes, metering
on), once straight to the servers by turns. Every round has system prompts of its own, the same for both ways, whose
caches are separate (the gateway adds a salt). What is compared is the share of prompt tokens that vLLM reports as
cached, of all rounds together; what the gateway bills must be the same, at the lower price.

What can be reached: a cache that holds c of n prompts which are asked for at random finds c/n of them (LRU), so by
turns 4/8 are found. Two replicas with half of the prompts each find all of theirs but the first time: 1.95 times as
much, of which questions that push out the ends of prompts take some. With a cache for fewer prompts the ratio stays
1.9, with one for more it falls (simulated: five 1.7, six 1.4, seven 1.3, all eight 1.07): both ways find nearly all. So
the sizes are those at which it matters who asks whom: more prompts in use than one replica holds, as many as all do.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from benchmarks.report import print_report
from benchmarks.stand_in import KEY, MODEL, Standing, billed, gateway_up, wait_for
from benchmarks.vllm_server import vllm_server
from zenray.serving.engine.vllm import environment

REPLICAS = 2
PROMPTS = 8
CLIENTS = 8
PROMPT_TOKENS = 2048  # a byte each
BLOCK_TOKENS = 32
CACHED_PROMPTS = 4.25  # what one replica's cache holds: half of them, and some questions
ENGINE_KEY = "engine-key"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
WORDS = ("alder", "birch", "cedar", "dogwood", "elm", "fir", "ginkgo", "hazel", "ironwood", "juniper", "larch", "yew")


@dataclass(frozen=True)
class Seen:
    """What vLLM reported of one round's requests."""

    input_tokens: int
    cached_tokens: int
    took_s: float

    @property
    def share(self) -> float:
        return self.cached_tokens / self.input_tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prefix_affinity", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="four rounds instead of nine")
    rounds, requests = 4 if parser.parse_args().quick else 9, 640
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_model(folder / "model")
        urls = stack.enter_context(replicas_up(folder))
        gateway, control, _ = stack.enter_context(gateway_up(folder / "gateway", Standing(urls)))
        ways = {"gateway": [gateway], "by turns": urls}
        seen: dict[str, list[Seen]] = {name: [] for name in ways}
        for number in range(rounds):
            for name in list(ways) if number % 2 else list(ways)[::-1]:
                key, model = (KEY, MODEL) if name == "gateway" else (ENGINE_KEY, "up")
                seen[name].append(asyncio.run(ask(ways[name], key, model, requests, seed=number)))
            print(f"round {number + 1}: " + ", ".join(f"{name} {runs[-1].share:.3f}" for name, runs in seen.items()))
        check_bill(billed(control, rounds * requests), seen["gateway"], rounds * requests)
    report(seen, rounds, requests)


def make_model(folder: Path) -> None:
    """Two layers of random weights, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<end>", *alphabet])}
    bare = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@contextmanager
def replicas_up(folder: Path) -> Iterator[list[str]]:
    """vLLM's own servers, started at the same time."""
    blocks = round(CACHED_PROMPTS * PROMPT_TOKENS / BLOCK_TOKENS)
    arguments = {
        "model": str(folder / "model"),
        "served_model_name": "up",
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 4096,
        "max_num_seqs": 16,
        "block_size": BLOCK_TOKENS,
        "num_gpu_blocks_override": blocks,
        "enable_prefix_caching": True,
        "enable_prompt_tokens_details": True,
    }
    variables = environment(1, 0) | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with ExitStack() as stack:
        servers = [
            stack.enter_context(vllm_server(arguments, variables, folder / f"vllm-{number}.log", key=ENGINE_KEY))
            for number in range(REPLICAS)
        ]
        for server in servers:
            wait_for(f"{server.url}/health", server.process, server.log, timeout_s=420)
        yield [server.url for server in servers]


async def ask(urls: list[str], key: str, model: str, requests: int, seed: int) -> Seen:
    """`requests` by CLIENTS clients, to `urls` by turns. RuntimeError when one is refused."""
    chance = random.Random(seed)
    systems = [_text(chance, PROMPT_TOKENS) for _ in range(PROMPTS)]
    bodies = [
        {
            "model": model,
            "messages": [
                {"role": "system", "content": chance.choice(systems)},
                {"role": "user", "content": _text(chance, 48)},
            ],
            "max_tokens": 8,
        }
        for _ in range(requests)
    ]
    left = iter(enumerate(bodies))
    input_tokens = cached_tokens = 0
    began_s = time.perf_counter()
    async with aiohttp.ClientSession(headers={"authorization": f"Bearer {key}"}) as session:

        async def client() -> None:
            nonlocal input_tokens, cached_tokens
            for number, body in left:
                url = urls[number % len(urls)] + "/v1/chat/completions"
                async with session.post(url, json=body, timeout=aiohttp.ClientTimeout(total=300)) as answer:
                    if answer.status != 200:
                        raise RuntimeError(f"{url}: {answer.status} {(await answer.text())[:300]}")
                    usage = (await answer.json())["usage"]
                input_tokens += usage["prompt_tokens"]
                cached_tokens += (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return Seen(input_tokens, cached_tokens, time.perf_counter() - began_s)


def _text(chance: random.Random, size_bytes: int) -> str:
    return " ".join(chance.choices(WORDS, k=size_bytes))[:size_bytes]


def check_bill(found: dict[str, int], seen: list[Seen], requests: int) -> None:
    """RuntimeError unless what was billed is what vLLM reported, at the two prices of input."""
    told = {"events": requests, "input_tokens": sum(one.input_tokens for one in seen)}
    told |= {"cached_input_tokens": sum(one.cached_tokens for one in seen)}
    if told != {name: found[name] for name in told}:
        raise RuntimeError(f"vLLM reported {told}, and billed was {found}")
    uncached = told["input_tokens"] - told["cached_input_tokens"]
    cost_nano_usd = 1000 * uncached + 500 * told["cached_input_tokens"] + 2000 * found["output_tokens"]
    if found["cost_nano_usd"] != cost_nano_usd:  # the stand-in's prices are whole nano-dollars a token
        raise RuntimeError(f"{found['cost_nano_usd']} nano-dollars were billed instead of {cost_nano_usd}")


def report(seen: dict[str, list[Seen]], rounds: int, requests: int) -> None:
    """By turns about half of the requests hit, so a round of 640 is only good for 4 %; all together for 2 or less."""
    shares = {
        name: sum(one.cached_tokens for one in runs) / sum(one.input_tokens for one in runs)
        for name, runs in seen.items()
    }
    ratios = [ours.share / theirs.share for ours, theirs in zip(*seen.values(), strict=True)]
    print_report(
        f"Prompt tokens found in the caches of {REPLICAS} replicas, {PROMPTS} system prompts of {PROMPT_TOKENS} tokens",
        ["asked", "cached share", "requests/s"],
        [[name, shares[name], statistics.median(requests / one.took_s for one in runs)] for name, runs in seen.items()],
        {
            "cached_ratio": round(shares["gateway"] / shares["by turns"], 3),
            "cached_ratio_rounds": [round(ratio, 3) for ratio in ratios],
            "cached_share": round(shares["gateway"], 3),
        },
        notes=[
            f"{rounds} rounds of {requests} requests; shares are of all rounds together.",
            f"Each cache holds {CACHED_PROMPTS} system prompts. Cached tokens were billed as such, to the nano-dollar.",
        ],
    )


if __name__ == "__main__":
    main()
