"""Which part of a network a pipeline stage keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from zenray.catalog.memory import stage_layers
from zenray.model.config import MoDEConfig
from zenray.model.network import MoDE
from zenray.spec.errors import InvalidValue
from zenray.training.mesh import Mesh


class StageLayers(nn.Module):
    """Some of a network's layers under their numbers in the whole, so that parameters keep their names."""

    def __init__(self, layers: nn.ModuleList, mine: range) -> None:
        super().__init__()
        for number in mine:
            self.add_module(str(number), layers[number])

    def __iter__(self) -> Iterator[nn.Module]:
        return self.children()

    def __len__(self) -> int:
        return len(self._modules)


def layers_of(stage: int, layers: int, stages: int) -> range:
    """The numbers of a stage's layers, as the planner reckons. InvalidValue where there are more stages than layers."""
    if stages > layers:
        raise InvalidValue(
            f"{layers} layers cannot be shared by {stages} pipeline stages: each needs one at least.",
            hint=f"Use a pipeline_parallel of at most {layers}.",
            param="pipeline_parallel",
        )
    counts = stage_layers(layers, stages)
    first = sum(counts[:stage])
    return range(first, first + counts[stage])


def check_stages(config: MoDEConfig, train: Sequence[str], stages: int) -> None:
    """InvalidValue for stages that a network does not have layers for, or of which one would learn nothing."""
    for stage in range(stages):
        mine = layers_of(stage, config.num_hidden_layers, stages)
        if stages > 1 and "dense" not in train and not any(layer in config.sparse_layers for layer in mine):
            raise InvalidValue(
                f"Stage {stage + 1} of {stages} would have layers {mine.start} to {mine.stop - 1} alone, which are "
                f"dense: nothing of it is in {', '.join(train)}.",
                hint="Use a smaller pipeline_parallel, or train dense weights too.",
                param="pipeline_parallel",
            )


def keep_stage(model: MoDE, mesh: Mesh) -> None:
    """Keep this worker's stage of a whole network, in place; parameter names stay. Idempotent; InvalidValue.

    The first stage has the embedding, the last one the last norm and the head. A head that is the embedding lives on
    both, under the embedding's name.
    """
    layers = model.model.layers
    if mesh.stages == 1 or isinstance(layers, StageLayers):
        return
    model.model.layers = StageLayers(layers, layers_of(mesh.stage, len(layers), mesh.stages))
    if not mesh.is_last_stage:
        model.model.norm = nn.Identity()
        model.lm_head = nn.Identity()
    is_end = mesh.stage == 0 or (mesh.is_last_stage and model.config.tie_word_embeddings)
    if not is_end:
        model.model.embed_tokens = nn.Identity()


def is_on_both_ends(name: str, model: MoDE, mesh: Mesh) -> bool:
    """Whether this parameter of this worker's stage is one weight that the first and the last stage both use."""
    return mesh.stages > 1 and model.config.tie_word_embeddings and name == "model.embed_tokens.weight"
