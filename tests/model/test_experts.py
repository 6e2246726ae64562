"""Expert layers: the loop, the kernel and the definition give the same numbers and the same gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zenray.model.dispatch import assign_mask, assign_top_k, combine_rows, gather_rows
from zenray.model.experts import make_experts, runs
from zenray.model.grouped import grouped_swiglu, swiglu_by_kernel

SHAPES = st.tuples(
    st.lists(st.integers(0, 5), min_size=1, max_size=5),  # rows of each expert
    st.sampled_from([4, 8, 12]),  # hidden size
    st.sampled_from([4, 8, 20]),  # width
)


def by_definition(x_RD, gate_up, down, rows, weight_R):
    parts = []
    for expert, x in enumerate(x_RD.split(rows)):
        gate, up = (x @ gate_up[expert].t()).chunk(2, dim=-1)
        parts.append((torch.nn.functional.silu(gate) * up) @ down[expert].t())
    return torch.cat(parts) * weight_R[:, None]


def draw(rows, hidden, width, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((sum(rows), hidden), (len(rows), 2 * width, hidden), (len(rows), hidden, width), (sum(rows),))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.sampled_from([torch.float64, torch.float32]))
def test_loop_and_kernel_are_the_definition_forward_and_backward(shape, dtype):
    rows, hidden, width = shape
    if not sum(rows):
        return
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    found = []
    for function, takes_tensor in ((by_definition, False), (grouped_swiglu, True), (swiglu_by_kernel, True)):
        if function is swiglu_by_kernel and dtype == torch.float64:
            continue  # PyTorch's grouped product has no float64
        inputs = [tensor.requires_grad_() for tensor in draw(rows, hidden, width, dtype)]
        x_RD, gate_up, down, weight_R = inputs
        y_RD = function(x_RD, gate_up, down, torch.tensor(rows) if takes_tensor else rows, weight_R)
        (y_RD * torch.arange(1, hidden + 1, dtype=dtype)).sum().backward()
        found.append([y_RD.detach(), *(tensor.grad for tensor in inputs)])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(two, one, rtol=tolerance, atol=tolerance)


def test_gradients_by_finite_differences():
    inputs = [tensor.requires_grad_() for tensor in draw([2, 0, 3], 4, 3)]
    assert torch.autograd.gradcheck(
        lambda x, gate_up, down, weight: grouped_swiglu(x, gate_up, down, torch.tensor([2, 0, 3]), weight), inputs
    )


@pytest.mark.parametrize("frozen", range(4))
def test_what_needs_no_gradient_gets_none_and_the_rest_is_unchanged(frozen):
    every, some = draw([3, 2], 4, 4), draw([3, 2], 4, 4)
    for index, (one, two) in enumerate(zip(every, some, strict=True)):
        one.requires_grad_()
        two.requires_grad_(index != frozen)
    for x, gate_up, down, weight in (every, some):
        grouped_swiglu(x, gate_up, down, torch.tensor([3, 2]), weight).square().sum().backward()
    for index, (one, two) in enumerate(zip(every, some, strict=True)):
        assert two.grad is None if index == frozen else torch.equal(one.grad, two.grad)


def test_bfloat16_is_no_further_from_the_truth_than_the_kernel():
    rows = [40, 3, 21]
    truth = grouped_swiglu(*(t.double() for t in draw(rows, 64, 32, torch.bfloat16)[:3]), torch.tensor(rows))
    x, gate_up, down, _ = draw(rows, 64, 32, torch.bfloat16)
    ones = torch.ones(sum(rows), dtype=torch.bfloat16)
    ours = (grouped_swiglu(x, gate_up, down, torch.tensor(rows)).double() - truth).norm()
    kernel = (swiglu_by_kernel(x, gate_up, down, torch.tensor(rows), ones).double() - truth).norm()
    assert ours <= 1.1 * kernel


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 5), st.data())
def test_top_k_and_mask_assign_the_same_rows(tokens, experts, data):
    k = data.draw(st.integers(1, experts))
    scores_TE = torch.rand(tokens, experts, dtype=torch.float64).requires_grad_()
    weights_TK, experts_TK = scores_TE.topk(k, dim=-1)
    chosen_TE = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, experts_TK, True)
    x_TD = torch.randn(tokens, 3, dtype=torch.float64).requires_grad_()
    results = []
    for assignment in (assign_top_k(experts_TK, weights_TK, experts), assign_mask(chosen_TE, scores_TE)):
        assert assignment.rows_E.sum() == tokens * k
        rows = gather_rows(x_TD, assignment) * assignment.weight_R[:, None]
        scale_R = torch.arange(1, experts + 1).repeat_interleave(assignment.rows_E)  # rows really are by expert
        y_TD = combine_rows(rows * scale_R[:, None], assignment, tokens)
        results.append([y_TD, *torch.autograd.grad(y_TD.square().sum(), (x_TD, scores_TE), retain_graph=True)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_top_k_is_assigned_without_a_look_at_the_values():
    """On the meta device, which has none: on a GPU every look would be a wait for all that is under way."""
    experts_TK = torch.tensor([[3, 1], [1, 0], [3, 0]])
    assert assign_top_k(experts_TK, torch.ones(3, 2), 5).rows_E.tolist() == [2, 2, 0, 2, 0]
    nowhere = torch.device("meta")
    assignment = assign_top_k(experts_TK.to(nowhere), torch.ones(3, 2, device=nowhere), 5)
    x_RD = gather_rows(torch.empty(3, 4, device=nowhere), assignment)
    assert combine_rows(x_RD, assignment, 3).shape == (3, 4)


def test_runs_of_equal_widths():
    assert runs((8, 8, 4, 8)) == [(8, 2), (4, 1), (8, 1)]
    assert make_experts(6, (8, 8)).gate_up_proj.shape == (2, 16, 6)
