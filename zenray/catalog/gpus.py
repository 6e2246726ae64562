"""GPUs by name: their memory, their peak, and how much of the peak training is taken to reach (`gpus.yaml`)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import Field

from zenray.spec.documents import Document, load_document
from zenray.spec.errors import InvalidValue, suggest


class Gpu(Document):
    """One kind of GPU."""

    name: str
    memory_bytes: int = Field(ge=1)
    bf16_flops_per_s: float = Field(gt=0, description="Peak of dense matrix products.")
    float32_flops_per_s: float = Field(gt=0, description="The same in float32, without TF32.")
    assumed_mfu: float = Field(gt=0, le=1, description="Model FLOPs in training, as a share of the peak.")

    def peak_flops_per_s(self, dtype: str) -> float:
        """`dtype`: bfloat16 or float32."""
        return self.bf16_flops_per_s if dtype == "bfloat16" else self.float32_flops_per_s


class _Gpus(Document):
    gpus: tuple[Gpu, ...]


def find_gpu(name: str) -> Gpu:
    """InvalidValue, with the known names, for one that is not in the file."""
    known = _load()
    if name not in known:
        raise InvalidValue(f"There is no GPU {name!r} in the catalog.", hint=suggest(name, known), param="gpu")
    return known[name]


def gpu_of_device(device_name: str) -> Gpu | None:
    """The catalog's GPU of the kind that a driver calls `device_name` ("NVIDIA A100-SXM4-80GB"), whatever its memory;
    None for one that is not in the file."""
    words = device_name.replace("-", " ").split()
    return next((gpu for gpu in _load().values() if gpu.name.split()[0] in words), None)


@cache
def _load() -> dict[str, Gpu]:
    return {gpu.name: gpu for gpu in load_document(Path(__file__).parent / "gpus.yaml", _Gpus).gpus}
