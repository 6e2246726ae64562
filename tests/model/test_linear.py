"""Linear maps through oneDNN: what torch's own give, forward and backward, in every shape and type."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from zenray.model.linear import Linear, linear, times_transposed


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


@pytest.mark.parametrize(("device", "is_onednns"), [("cpu", True), ("meta", False)])
def test_what_is_not_in_the_cpus_memory_is_torchs_to_multiply(device: str, is_onednns: bool) -> None:
    """As weights on a GPU are: oneDNN knows nothing of those."""
    seen: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    a, b = torch.ones(3, 8, device=device), torch.ones(6, 8, device=device)
    with Seen():
        assert times_transposed(a, b).shape == (3, 6)
    assert any("mkldnn" in name for name in seen) == (is_onednns and torch.backends.mkldnn.is_available())
