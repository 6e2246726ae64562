"""A dense FFN cut into experts: its neurons divided by balanced k-means (zen-mode blog, phase 2) or at random.

Nothing is copied: with all experts on, the layer is the dense FFN. Which neurons belong together is read from the
weights: a neuron's features are its normalised gate row, up row and down column (MoEfication, arXiv 2110.01786, and
LLaMA-MoE, arXiv 2406.16554, use one of them). Clusters are of equal size, as experts of one bank must be.

D hidden, I width of the FFN, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zenray.model.upcycling.drop import FeedForwardWeights
from zenray.spec.errors import InvalidValue

MAX_ITERATIONS = 25


def neuron_features(ffn: FeedForwardWeights) -> Tensor:
    """(I, 3D), float32: each of the three parts of a neuron at length 1, so that none drowns the others."""
    parts = (ffn.gate_ID, ffn.up_ID, ffn.down_DI.t())
    return torch.cat([F.normalize(part.to(torch.float32), dim=1) for part in parts], dim=1)


def random_partition(width: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """expert_I: each neuron's expert, all equally many. The control that k-means must beat."""
    check_divisible(width, num_experts)
    return torch.randperm(width, generator=generator) % num_experts


def balanced_kmeans(features_IF: Tensor, num_experts: int, generator: torch.Generator) -> Tensor:
    """expert_I: clusters of equal size with a locally least sum of squared distances. Deterministic by the generator.

    Lloyd's iterations, in which the neurons with most to lose choose first among the clusters that have room. Starts
    from k-means++ centres; stops when the sum no longer falls, and keeps the best.
    """
    width = features_IF.shape[0]
    check_divisible(width, num_experts)
    centres = _spread_centres(features_IF, num_experts, generator)
    best_I, best_sum = torch.zeros(width, dtype=torch.int64), float("inf")
    for _ in range(MAX_ITERATIONS):
        expert_I = _assign_evenly(torch.cdist(features_IF, centres).square())
        centres = cluster_means(features_IF, expert_I, num_experts)
        total = squared_distances(features_IF, expert_I, num_experts)
        if total >= best_sum * (1 - 1e-6):
            break
        best_I, best_sum = expert_I, total
    return best_I


def cluster_means(features_IF: Tensor, expert_I: Tensor, num_experts: int) -> Tensor:
    """The mean of each cluster, (E, F)."""
    sums = features_IF.new_zeros(num_experts, features_IF.shape[1]).index_add_(0, expert_I, features_IF)
    return sums / torch.bincount(expert_I, minlength=num_experts)[:, None]


def squared_distances(features_IF: Tensor, expert_I: Tensor, num_experts: int) -> float:
    """What k-means makes small: the sum over neurons of the squared distance to their cluster's mean."""
    return float((features_IF - cluster_means(features_IF, expert_I, num_experts)[expert_I]).square().sum())


def cut(ffn: FeedForwardWeights, expert_I: Tensor, num_experts: int, expert: int, place: FeedForwardWeights) -> None:
    """One expert of a partition, in its place: its neurons, in the FFN's order, and `down` times E.

    Gate weights that sum to 1 give an average of experts where the dense FFN is their sum; hence the factor. With all
    experts on and even weights the layer is then the dense FFN; with K of them it is E/K times their sum, LLaMA-MoE's
    rescaling.
    """
    index = (expert_I == expert).nonzero().flatten()
    place.gate_ID.copy_(ffn.gate_ID[index])
    place.up_ID.copy_(ffn.up_ID[index])
    place.down_DI.copy_(ffn.down_DI[:, index]).mul_(num_experts)


def centroid_router(ffn: FeedForwardWeights, expert_I: Tensor, num_experts: int, std: float) -> Tensor:
    """A router (E, D) that points each expert to the inputs its neurons' gates respond to, scaled to `std`."""
    rows = F.normalize(ffn.gate_ID.to(torch.float32), dim=1)
    means = cluster_means(rows, expert_I, num_experts)
    means = means - means.mean(dim=0)  # what all experts share does not tell them apart
    return means * (std / means.std().clamp(min=1e-12))


def check_divisible(width: int, parts: int) -> None:
    """InvalidValue unless `parts` equal parts make up `width`."""
    if width % parts:
        divisors = [n for n in range(2, min(width, 512) + 1) if width % n == 0]
        raise InvalidValue(
            f"An FFN of width {width} cannot be cut into {parts} equal parts.",
            hint=f"Possible: {', '.join(map(str, divisors[:24]))}.",
        )


def _spread_centres(features_IF: Tensor, num_experts: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007): each centre drawn by its squared distance to those before."""
    first = int(torch.randint(features_IF.shape[0], (1,), generator=generator))
    centres = features_IF[first : first + 1]
    while centres.shape[0] < num_experts:
        nearest_I = torch.cdist(features_IF, centres).square().min(dim=1).values
        if float(nearest_I.sum()) == 0:  # fewer different neurons than experts
            nearest_I = torch.ones_like(nearest_I)
        chosen = int(torch.multinomial(nearest_I, 1, generator=generator))
        centres = torch.cat([centres, features_IF[chosen : chosen + 1]])
    return centres


def _assign_evenly(cost_IE: Tensor) -> Tensor:
    """Each neuron to its cheapest cluster that has room; those with the largest gap to their second choice first."""
    width, num_experts = cost_IE.shape
    room = [width // num_experts] * num_experts
    preference = cost_IE.argsort(dim=1, stable=True)
    ordered = cost_IE.gather(1, preference)
    gap_I = ordered[:, 1] - ordered[:, 0] if num_experts > 1 else ordered[:, 0]
    expert_I = [0] * width
    choices = preference.tolist()
    for neuron in gap_I.argsort(descending=True, stable=True).tolist():
        expert = next(expert for expert in choices[neuron] if room[expert])
        room[expert] -= 1
        expert_I[neuron] = expert
    return torch.tensor(expert_I)
