"""Linear maps by either library: what torch's own give, forward and backward, in every shape and type."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from zenray.model import linear as module
from zenray.model.linear import Linear, linear, times_transposed


@pytest.fixture(autouse=True, params=[True, False], ids=["oneDNN", "MKL"])
def library(request, monkeypatch) -> str:
    """Both, whatever processor the tests run on."""
    by_onednn = request.param and torch.backends.mkldnn.is_available()
    monkeypatch.setattr(module, "onednn_is_faster", lambda: by_onednn)
    return "mkldnn" if by_onednn else "aten::mm"


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (0, 8), (2, 0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_and_gradients_are_torchs(shape, dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(6, 8, dtype=dtype, requires_grad=True)
    expected, found = F.linear(x, weight), linear(x, weight)
    torch.testing.assert_close(found, expected)
    dy = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, (x, weight), dy), torch.autograd.grad(expected, (x, weight), dy)
    )


def test_a_view_is_multiplied_where_it_lies() -> None:
    x = torch.randn(8, 2, 3).permute(2, 1, 0).requires_grad_()
    weight = torch.randn(8, 6).t().requires_grad_()
    found = torch.autograd.grad(linear(x, weight).square().sum(), (x, weight))
    torch.testing.assert_close(found, torch.autograd.grad(F.linear(x, weight).square().sum(), (x, weight)))


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_torchs_layer(bias: bool) -> None:
    layer, x = Linear(8, 6, bias=bias), torch.randn(3, 8)
    assert isinstance(layer, torch.nn.Linear)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_what_does_not_learn_gets_no_gradient() -> None:
    x, weight = torch.randn(3, 8), torch.randn(6, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    assert x.grad is None and weight.grad is not None


def test_a_product_is_written_where_it_belongs() -> None:
    a, b, room = torch.randn(3, 8), torch.randn(6, 8), torch.zeros(2, 3, 6)
    assert times_transposed(a, b, out=room[1]).data_ptr() == room[1].data_ptr()
    torch.testing.assert_close(room, torch.stack((torch.zeros(3, 6), a @ b.t())))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_what_is_in_the_cpus_memory_is_onednns_to_multiply(device: str, library: str) -> None:
    """Not weights on a GPU: oneDNN knows nothing of those."""
    seen: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    a, b = torch.ones(3, 8, device=device), torch.ones(6, 8, device=device)
    with Seen():
        assert times_transposed(a, b).shape == (3, 6)
    assert any((library if device == "cpu" else "aten::mm") in name for name in seen)
