"""The claim tested: is Drop-Upcycling the best way to use a trained dense model? Small, on real text, three seeds.

    python -m benchmarks.upcycling_study [--quick] [--report]

Five ways on from one dense parent: Drop-Upcycling (r = 0.5, joint), naive copies, balanced k-means, a mixture from
fresh weights, and the dense model trained on; at equal tokens, and at equal FLOPs. Hypotheses, sizes and the rule that
decides are in docs/experiments.md, written before the first cell ran. A cell is a line of study/cells.jsonl: a run
that was killed goes on with the cells that are missing, and `--report` only prints those that are there. `--quick`:
sizes that say nothing about the claim, in under a minute, in a folder that is thrown away.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from benchmarks.report import Cell as TableCell
from benchmarks.report import print_report
from zenray.catalog.accounting import count_parameters, flops_per_token
from zenray.model.config import RouterConfig
from zenray.model.network import MoDE
from zenray.model.tokenizer.bpe import add_merges, from_bytes, learn_merges, match_exactly
from zenray.model.upcycling.drop import DropMode
from zenray.model.upcycling.recipe import GroupRecipe, PartitionMode, UpcyclingRecipe
from zenray.model.upcycling.source import dense_config
from zenray.model.upcycling.upcycle import upcycle
from zenray.model.weights import TensorPlan
from zenray.spec.lineage import BaseVersion, NewVersion
from zenray.spec.training import (
    BuiltinCorpus,
    DataSource,
    Evaluation,
    Optimisation,
    PretrainJob,
    TrainingData,
)
from zenray.training.data.corpus import builtin_documents
from zenray.training.data.stream import PackedDomain
from zenray.training.data.tokens import TokenFolder, prepare
from zenray.training.expert_parallel import expert_banks
from zenray.training.loop import TrainingSet
from zenray.training.mesh import Mesh
from zenray.training.networks import Checkpoint, write_checkpoint
from zenray.training.trainable import named_tensors
from zenray.training.trainer import Trainer

Method = Literal["parent", "drop", "copy", "kmeans", "scratch", "dense"]
Budget = Literal["parent", "tokens", "flops", "flops with the parent's"]

FOLDER = Path(__file__).parent / "study"
END_TOKEN = "<|end|>"
CHILDREN = 1000  # added to the seed: the children of a parent read the same text in the same order, the parent another
T_TWO_SIDED_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # Student's t by degrees of freedom


@dataclass(frozen=True)
class Sizes:
    """All that fixes a study. `steps` are those of an upcycled mixture; its FLOPs are the budget of the other cells."""

    domains: tuple[BuiltinCorpus, ...] = ("code", "prose", "mathematics")
    weights: tuple[float, ...] = (3, 1, 2)
    validation_share: float = 0.15
    vocabulary: int = 2048
    hidden: int = 96
    layers: int = 3
    heads: int = 3
    width: int = 384
    experts: int = 8
    experts_per_token: int = 2
    drop_rate: float = 0.5
    sequence_tokens: int = 128
    sequences: int = 16
    parent_steps: int = 400
    steps: int = 160
    evaluations: int = 4
    held_out_sequences: int = 48  # of each domain, evenly spaced
    parent_learning_rate: float = 3e-3
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    seeds: tuple[int, ...] = (0, 1, 2)


STUDY = Sizes()
QUICK = Sizes(
    domains=("prose",),
    weights=(1,),
    vocabulary=512,
    hidden=32,
    layers=2,
    heads=1,
    width=64,
    parent_steps=20,
    steps=10,
    seeds=(0,),
)


@dataclass(frozen=True)
class Cell:
    """One training run of the study."""

    method: Method
    budget: Budget
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}/{self.budget}/{self.seed}"


PARENT: tuple[Method, Budget] = ("parent", "parent")
COLUMNS: tuple[tuple[Method, Budget], ...] = (
    ("drop", "tokens"),  # the three mixtures are of one shape: for them equal tokens are equal FLOPs
    ("copy", "tokens"),
    ("dense", "tokens"),
    ("scratch", "tokens"),
    ("dense", "flops"),
    ("kmeans", "tokens"),
    ("kmeans", "flops"),
    ("scratch", "flops with the parent's"),
)


def plan(sizes: Sizes) -> list[Cell]:
    """Every cell in the order in which they run: what matters most first, for all seeds."""
    return [Cell(method, budget, seed) for method, budget in (PARENT, *COLUMNS) for seed in sizes.seeds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, in a folder that is thrown away")
    parser.add_argument("--report", action="store_true", help="print what is there; train nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if options.quick:
        with tempfile.TemporaryDirectory() as scratch:
            run(QUICK, Path(scratch, "study"), Path(scratch, "work"))
            report(QUICK, Path(scratch, "study"), "Upcycling, QUICK: sizes too small to say anything about the claim")
        return
    if not options.report:
        run(STUDY, FOLDER, Path(os.environ.get("ZENRAY_HOME", ".zenray")) / "upcycling-study")
    report(STUDY, FOLDER, "Ways on from a dense model: held-out loss in nats per token")


def run(sizes: Sizes, folder: Path, work: Path) -> None:
    """Train every cell that has no line yet. `work` keeps tokens and parents between runs; it can be thrown away."""
    done = read_cells(sizes, folder)
    missing = [cell for cell in plan(sizes) if cell.name not in done]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench.open(sizes, work)
    for number, cell in enumerate(missing, 1):
        line = bench.run(cell)
        with (folder / "cells.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        print(f"{number}/{len(missing)}  {cell.name}: {line['loss']:.4f} in {line['cpu_s']:.0f} CPU s", flush=True)


def read_cells(sizes: Sizes, folder: Path) -> dict[str, dict[str, Any]]:
    """The lines that were written, by cell. A half-written last line counts as missing."""
    path = folder / "cells.jsonl"
    found: dict[str, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["study"] != digest(sizes):
            raise SystemExit(f"{path} has cells of other sizes ({line['study']}): move it away first.")
        found[line["cell"]] = line
    return found


def digest(sizes: Sizes) -> str:
    return hashlib.sha256(json.dumps(asdict(sizes)).encode()).hexdigest()[:12]


class SpreadDomain(PackedDomain):
    """Held-out text of a domain, as at most `count` sequences from all over it: neighbours are of one document."""

    def __init__(self, whole: PackedDomain, count: int) -> None:
        super().__init__(whole.tokens, whole.length, whole.seed)
        self._stride = max(1, self.num_sequences // count)
        self.num_sequences = min(self.num_sequences, count)

    def at(self, index: int):  # type: ignore[no-untyped-def]
        return super().at(index * self._stride)


@dataclass(frozen=True)
class Bench:
    """What all cells share: the text as tokens, and where parents are kept."""

    sizes: Sizes
    work: Path
    data: TrainingData
    tokens: TokenFolder

    @classmethod
    def open(cls, sizes: Sizes, work: Path) -> Bench:
        """Trains the tokenizer and tokenises unless that was done. One split into training and held-out documents."""
        work = work / digest(sizes)
        work.mkdir(parents=True, exist_ok=True)
        tokenizer = work / "tokenizer.json"
        if not tokenizer.exists():
            tokenizer.write_text(json.dumps(make_tokenizer(sizes)), encoding="utf-8")
        data = TrainingData(
            sources=tuple(
                DataSource(domain=domain, builtin=domain, weight=weight)
                for domain, weight in zip(sizes.domains, sizes.weights, strict=True)
            ),
            sequence_tokens=sizes.sequence_tokens,
            validation_share=sizes.validation_share,
        )
        return cls(sizes, work, data, prepare(data, tokenizer, sizes.vocabulary - 1, 0, work / "tokens"))

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train one cell; its line of the log. A parent's weights are kept."""
        began, cpu = time.monotonic(), time.process_time()
        steps = self.steps(cell)
        job = self.job(cell, steps)
        data = TrainingSet.open(job, self.tokens)
        count = self.sizes.held_out_sequences
        data.held_out = {domain: SpreadDomain(part, count) for domain, part in data.held_out.items()}
        with tempfile.TemporaryDirectory(dir=self.work) as scratch:
            model = self.network(cell, Path(scratch))
            similarity = [expert_similarity(model)]
        measured = train(cell, Trainer(model, job), data)
        if cell.method == "parent":
            self.keep(model, cell.seed)
        parameters = count_parameters(model.config.dimensions())
        return {
            "cell": cell.name,
            **asdict(cell),
            "study": digest(self.sizes),
            "steps": steps,
            "tokens": steps * self.step_tokens,
            "flops": steps * self.step_tokens * self.token_flops(cell.method),
            "parameters": parameters.total,
            "active_parameters": parameters.active,
            **measured,
            "expert_similarity": [*similarity, expert_similarity(model)],
            "cpu_s": round(time.process_time() - cpu, 1),
            "took_s": round(time.monotonic() - began, 1),
            "torch": torch.__version__,
        }

    def network(self, cell: Cell, scratch: Path) -> MoDE:
        """What a cell starts from."""
        if cell.method == "parent":
            return self.seedling(scratch / "seedling").fresh_network(cell.seed)
        parent = self.parent_folder(cell.seed)
        if cell.method == "dense":
            return Checkpoint.open(parent).network()
        upcycle(parent, self.recipe(cell), scratch / "upcycled")
        made = Checkpoint.open(scratch / "upcycled")
        return made.fresh_network(cell.seed) if cell.method == "scratch" else made.network()

    def recipe(self, cell: Cell) -> UpcyclingRecipe:
        """How a parent becomes a mixture. From scratch: the shape of a copied one."""
        sizes = self.sizes
        mode: DropMode | PartitionMode = "copy"
        if cell.method == "drop":
            mode = "joint"
        elif cell.method == "kmeans":
            mode = "kmeans"
        rate = sizes.drop_rate if mode == "joint" else 0.0
        return UpcyclingRecipe(
            groups=(GroupRecipe("general", (rate,) * sizes.experts),),
            layers=tuple(range(sizes.layers)),
            mode=mode,
            router=RouterConfig(experts_per_token=sizes.experts_per_token),
            router_init="centroid" if mode == "kmeans" else "normal",
            seed=cell.seed,
        )

    def steps(self, cell: Cell) -> int:
        """Those that use up the cell's budget."""
        sizes = self.sizes
        if cell.method == "parent":
            return sizes.parent_steps
        if cell.budget == "tokens":
            return sizes.steps
        mixture = self.token_flops("drop")
        if cell.budget == "flops":
            return round(sizes.steps * mixture / self.token_flops(cell.method))
        return round(sizes.steps + sizes.parent_steps * self.token_flops("parent") / mixture)

    def token_flops(self, method: Method) -> int:
        """Of one token, forward and backward, attending to half a sequence on average."""
        shape = dense_config(self.llama())
        if method not in ("parent", "dense"):
            shape = self.recipe(Cell(method, "tokens", 0)).config(shape)
        return 3 * flops_per_token(shape.dimensions(), self.sizes.sequence_tokens // 2)

    @property
    def step_tokens(self) -> int:
        return self.sizes.sequences * self.sizes.sequence_tokens

    def job(self, cell: Cell, steps: int) -> PretrainJob:
        sizes = self.sizes
        nowhere = {"model": "study", "version": "v0"}
        highest = sizes.parent_learning_rate if cell.method == "parent" else sizes.learning_rate
        rates = Optimisation(learning_rate=highest, warmup_steps=min(sizes.warmup_steps, steps // 5))
        return PretrainJob(
            kind="pretrain",
            name="upcycling-study",
            base=BaseVersion(**nowhere),
            into=NewVersion(**nowhere),
            data=self.data,
            steps=steps,
            sequences_per_step=sizes.sequences,
            sequences_per_pass=sizes.sequences,
            optimisation=rates,
            evaluation=Evaluation(every_steps=math.ceil(steps / sizes.evaluations), sequences=sizes.held_out_sequences),
            activation_checkpointing=False,
            seed=cell.seed if cell.method == "parent" else CHILDREN + cell.seed,
        )

    def parent_folder(self, seed: int) -> Path:
        """Its weights, trained again where its line is there but they were thrown away."""
        folder = self.work / f"parent-{seed}"
        if not folder.is_dir():
            self.run(Cell("parent", "parent", seed))
        return folder

    def keep(self, model: MoDE, seed: int) -> None:
        """Write a parent's weights: whole or not at all."""
        tensors = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
        plans = [TensorPlan(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
        with tempfile.TemporaryDirectory(dir=self.work) as scratch:
            made = Path(scratch, "parent")
            write_checkpoint(self.seedling(Path(scratch, "seedling")), plans, lambda plan: tensors[plan.name], made)
            made.rename(self.work / f"parent-{seed}")

    def seedling(self, folder: Path) -> Checkpoint:
        """A dense checkpoint without weights: a shape and a tokenizer."""
        config = self.llama()
        config.save_pretrained(folder)
        shutil.copyfile(self.work / "tokenizer.json", folder / "tokenizer.json")
        return Checkpoint(folder, dense_config(config), config)

    def llama(self) -> LlamaConfig:
        sizes = self.sizes
        return LlamaConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.heads,
            max_position_embeddings=sizes.sequence_tokens,
            tie_word_embeddings=True,
            eos_token_id=sizes.vocabulary - 1,
        )


def make_tokenizer(sizes: Sizes) -> dict[str, Any]:
    """A byte-level BPE learned from the corpus; its last entry ends a document."""
    texts = (text for domain in sizes.domains for text in builtin_documents(domain))
    bpe = from_bytes()
    free = sizes.vocabulary - len(bpe.ids) - 1
    merges = learn_merges(bpe, texts, free, min_count=2, show=False)
    add_merges(bpe, merges, iter(range(len(bpe.ids), sizes.vocabulary - 1)), {})
    bpe.ids[END_TOKEN] = sizes.vocabulary - 1
    bpe.added[END_TOKEN] = match_exactly(special=True)
    return bpe.document()


@torch.no_grad()
def expert_similarity(model: MoDE) -> float | None:
    """Mean cosine between the weights of two experts of a layer, over pairs and layers; None without experts."""
    found = []
    for _, bank in expert_banks(model):
        flat_EP = torch.cat([bank.gate_up_proj.flatten(1), bank.down_proj.flatten(1)], dim=1)
        cosine_EE = F.normalize(flat_EP) @ F.normalize(flat_EP).t()
        count = cosine_EE.shape[0]
        found.append(float((cosine_EE.sum() - cosine_EE.trace()) / (count * (count - 1))))
    return mean(found) if found else None


def train(cell: Cell, trainer: Trainer, data: TrainingSet) -> dict[str, Any]:
    """All steps of a cell: losses and their course, and the routing of its last tenth, layer by layer."""
    job, one_process = trainer.job, Mesh()
    reports, curve = [], []
    for index in range(job.steps + 1):
        if index % job.evaluation.every_steps == 0 or index == job.steps:
            parts = {domain: data.evaluation(job, one_process, domain) for domain in data.held_out}
            losses = {domain: trainer.evaluate(batches) for domain, batches in parts.items()}
            curve.append([index, mean(losses.values())])
        if index < job.steps:
            reports.append(trainer.step(index, data.step(job, one_process, index)))
            if reports[-1].was_skipped:
                raise SystemExit(f"{cell.name}: the loss or the gradient of step {index} is not finite.")
    last = reports[-max(1, len(reports) // 10) :]
    return {
        "losses": losses,
        "loss": mean(losses.values()),
        "curve": curve,
        "training_losses": [round(report.lm_loss, 4) for report in reports],
        "entropy_ratios": [mean(layer) for layer in zip(*(report.entropy_ratios for report in last), strict=True)],
        "max_violations": [mean(layer) for layer in zip(*(report.max_violations for report in last), strict=True)],
    }


def report(sizes: Sizes, folder: Path, title: str) -> None:
    """Print the table and the differences, draw the plot, and end with one line of JSON. Missing cells are empty."""
    done = read_cells(sizes, folder)
    rows: list[list[TableCell]] = []
    for method, budget in (PARENT, *COLUMNS):
        lines = [done[name] for seed in sizes.seeds if (name := f"{method}/{budget}/{seed}") in done]
        rows.append([method, budget, *_row(lines, sizes)])
    differences = {name: _difference(done, sizes, *pair) for name, pair in COMPARISONS.items()}
    result: dict[str, object] = {
        "study": digest(sizes),
        "cells": len(done),
        "cells_planned": len(plan(sizes)),
        "cpu_minutes": round(sum(line["cpu_s"] for line in done.values()) / 60, 1),
        "drop_minus": differences,
    }
    notes = ["", "Drop-Upcycling minus each, in nats, paired by seed (below 0: Drop-Upcycling is better):"]
    notes += [f"  {name:32} {_in_words(found)}" for name, found in differences.items()]
    if done:
        draw(sizes, done, folder / "upcycling.png")
        notes.append(f"plot: {folder / 'upcycling.png'}")
    heads = ["method", "equal", "steps", "GFLOP", *sizes.domains, "mean ± sd", "even routing", "alike"]
    print_report(title, heads, rows, result, notes=notes)


COMPARISONS: dict[str, tuple[tuple[Method, Budget], tuple[Method, Budget]]] = {
    f"{method}, equal {budget}": (("drop", "tokens"), (method, budget)) for method, budget in COLUMNS[1:]
}


def _row(lines: Sequence[dict[str, Any]], sizes: Sizes) -> list[TableCell]:
    """One method and budget over its seeds. Even routing: the least even layer; alike: experts at start and end."""
    if not lines:
        return [""] * (5 + len(sizes.domains))
    losses = [line["loss"] for line in lines]
    spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
    counted = "" if len(lines) == len(sizes.seeds) else f" (of {len(lines)})"
    even = [min(line["entropy_ratios"]) for line in lines if line["entropy_ratios"]]
    alike = [line["expert_similarity"] for line in lines if line["expert_similarity"][0] is not None]
    return [
        f"{lines[0]['steps']:,}",
        f"{lines[0]['flops'] / 1e9:,.0f}",
        *(f"{mean(line['losses'][domain] for line in lines):.4f}" for domain in sizes.domains),
        f"{mean(losses):.4f}{spread}{counted}",
        f"{mean(even):.3f}" if even else "",
        f"{mean(one[0] for one in alike):.3f} to {mean(one[1] for one in alike):.3f}" if alike else "",
    ]


def _difference(
    done: dict[str, dict[str, Any]], sizes: Sizes, one: tuple[Method, Budget], other: tuple[Method, Budget]
) -> dict[str, Any] | None:
    """Paired over seeds: the mean, half the 95 % interval (Student's t), and the verdict of the registered rule."""
    pairs = [[done.get(f"{method}/{budget}/{seed}") for method, budget in (one, other)] for seed in sizes.seeds]
    found = [first["loss"] - second["loss"] for first, second in pairs if first and second]
    if len(found) < 2:
        return None
    middle = mean(found)
    half = T_TWO_SIDED_95[len(found) - 1] * stdev(found) / math.sqrt(len(found))
    verdict = "undecided" if abs(middle) <= half else "better" if middle < 0 else "worse"
    return {"mean": round(middle, 4), "half_95": round(half, 4), "seeds": len(found), "drop_is": verdict}


def _in_words(found: dict[str, Any] | None) -> str:
    if found is None:
        return "needs two seeds"
    return f"{found['mean']:+.4f} ± {found['half_95']:.4f}  {found['drop_is']} ({found['seeds']} seeds)"


def draw(sizes: Sizes, done: dict[str, dict[str, Any]], path: Path) -> None:
    """Held-out loss against tokens and against FLOPs: a line for the mean over seeds, a band from lowest to highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    by_tokens = [column for column in COLUMNS if column[1] == "tokens"]
    mixtures = [column for column in by_tokens if column[0] in ("drop", "copy", "scratch")]
    by_flops = mixtures + [column for column in COLUMNS if column[1] != "tokens"]
    for axes, unit, columns in ((left, "tokens", by_tokens), (right, "flops", by_flops)):
        for method, budget in columns:
            lines = [done[name] for seed in sizes.seeds if (name := f"{method}/{budget}/{seed}") in done]
            if not lines:
                continue
            each = lines[0][unit] / lines[0]["steps"]
            x = [step * each for step, _ in lines[0]["curve"]]
            y = [[loss for _, loss in line["curve"]] for line in lines]
            label = f"{method}, with the parent's FLOPs" if "with" in budget else method
            colour = f"C{get_args(Method).index(method)}" if "with" not in budget else "C6"
            axes.plot(x, [mean(at) for at in zip(*y, strict=True)], label=label, color=colour)
            lowest, highest = zip(*((min(at), max(at)) for at in zip(*y, strict=True)), strict=True)
            axes.fill_between(x, lowest, highest, alpha=0.2, color=colour)
        axes.set_xlabel(f"{'training FLOPs' if unit == 'flops' else 'tokens'} after the parent")
        axes.legend()
    parents = [line["loss"] for line in done.values() if line["method"] == "parent"]
    left.axhline(mean(parents), color="grey", linewidth=0.8, linestyle=":")
    left.set_ylabel("held-out loss, nats per token (dotted: the parent)")
    left.set_ylim(top=min(left.get_ylim()[1], mean(parents) + 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
