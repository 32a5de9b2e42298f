"""Stacked matrix products and their operators: against float64, batch-invariant, at any address."""

import pytest
import torch
from stacked import (
    DEVICE,
    assert_batch_invariant,
    assert_close_to_float64,
    assert_well_registered,
    differentiate,
    normal,
)

from kernels.linear import (
    linear_add_norm_op,
    linear_add_norm_reference,
    linear_add_norm_triton,
    linear_op,
    linear_reference,
    linear_relu2_op,
    linear_relu2_reference,
    linear_relu2_triton,
    linear_triton,
    relu2_mlp_norm_op,
    relu2_mlp_norm_reference,
    relu2_mlp_norm_triton,
)
from kernels.matmul import stacked_matmul
from kernels.norm import rms_norm_triton
from kernels.tiles import TUNED, Tile, tile_for

pytestmark = pytest.mark.kernel


def plain_inputs(R, N, outputs, inputs, dtype=torch.float32):
    return [
        normal(0, R, N, inputs, dtype=dtype),
        normal(1, R, outputs, inputs, dtype=dtype) / inputs**0.5,
    ]


def mlp_inputs(R, N, D, F, dtype=torch.float32):
    x, up = plain_inputs(R, N, F, D, dtype)
    down, residual = normal(2, R, D, F, dtype=dtype) / F**0.5, normal(3, R, N, D, dtype=dtype)
    return [x, up, down, residual, normal(4, R, D, dtype=dtype)]


def add_inputs(R, N, outputs, inputs, dtype=torch.float32):
    residual, norm = normal(3, R, N, outputs, dtype=dtype), normal(4, R, outputs, dtype=dtype)
    return [*plain_inputs(R, N, outputs, inputs, dtype), residual, norm]


def layer_norm_inputs(R, N, outputs, inputs, dtype=torch.float32):
    return [*add_inputs(R, N, outputs, inputs, dtype), normal(5, R, outputs, dtype=dtype)]


def with_bias(function):
    """`linear_add_norm` with tensors only."""
    return lambda x, weight, residual, norm, bias: function(x, weight, residual, norm, 1e-5, bias)


OPERATORS = {
    "linear": (linear_triton, linear_reference, plain_inputs),
    "linear_add_norm": (linear_add_norm_triton, linear_add_norm_reference, add_inputs),
    "linear_add_layer_norm": (
        with_bias(linear_add_norm_triton),
        with_bias(linear_add_norm_reference),
        layer_norm_inputs,
    ),
    "linear_relu2": (linear_relu2_triton, linear_relu2_reference, plain_inputs),
    "relu2_mlp_norm": (relu2_mlp_norm_triton, relu2_mlp_norm_reference, mlp_inputs),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", [(2, 1, 24, 16), (1, 63, 40, 48), (2, 127, 33, 17)])
def test_matches_float64(name, shape):
    operator, reference, make = OPERATORS[name]
    assert_close_to_float64(operator, reference, make(*shape), 1e-6)  # fp32 products: 1e-7


@pytest.mark.parametrize("name", OPERATORS)
def test_batch_invariant(name):
    operator, _, make = OPERATORS[name]
    assert_batch_invariant(operator, make(5, 40, 24, 16))


@pytest.mark.parametrize("form", ["nt", "nn", "tn"])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("columns", [72, 70])
@pytest.mark.parametrize("residents", [0, 1])
def test_tiles_of_bf16(form, wide, columns, residents):
    """By tensor maps and by plain pointers, on shapes that no tile divides, the last two tiles of 18 by halves."""
    tile = Tile(32, 32, 32, 4, 2, residents=residents, wide=wide)
    a, b = normal(0, 3, 63, 40).bfloat16(), normal(1, 3, 40, columns).bfloat16()
    true = a.double() @ b.double()
    a = a.mT.contiguous() if form == "tn" else a
    b = b.mT.contiguous() if form == "nt" else b
    out = torch.full_like(true, float("nan"), dtype=torch.bfloat16)
    stacked_matmul(a, b, form, tile=tile, out=out)
    # One rounding to bf16 is 2^-9 at most; the interpreter truncates, up to 2^-8.
    assert (out.double() - true).norm() / true.norm() < 4e-3


def test_weights_are_read_from_one_flat_buffer():
    flat_RP, x = normal(3, 3, 800), normal(4, 3, 5, 16)
    view_ROI = flat_RP[:, 64 : 64 + 24 * 16].unflatten(1, (24, 16))
    stacked = torch.func.vmap(linear_triton)
    assert torch.equal(stacked(x, view_ROI), stacked(x, view_ROI.contiguous()))


def test_fused_mlp_has_the_bits_of_its_parts():
    inputs = mlp_inputs(2, 9, 16, 24)
    fused = torch.func.vmap(relu2_mlp_norm_triton)(*inputs)

    def parts(x, up, down, residual, norm):
        return linear_add_norm_triton(linear_relu2_triton(x, up), down, residual, norm)

    def separate(x, up, down, residual, norm):
        y = residual + linear_triton(linear_relu2_triton(x, up), down)
        return rms_norm_triton(y, norm), y

    for other in (parts, separate):
        for one, two in zip(fused, torch.func.vmap(other)(*inputs), strict=True):
            assert torch.equal(one, two)


def test_a_norm_weight_of_another_width_is_refused():
    x, weight, residual, _ = (tensor[0] for tensor in add_inputs(1, 5, 16, 24))
    with pytest.raises(ValueError, match=r"expected \(16,\): one value a channel"):
        linear_add_norm_triton(x, weight, residual, normal(0, 24))
    with pytest.raises(ValueError, match=r"expected \(16,\): one value a channel"):
        relu2_mlp_norm_triton(normal(0, 5, 16), normal(1, 24, 16), normal(2, 16, 24), normal(3, 5, 16), normal(0, 24))


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_the_two_results_may_go_nowhere(used):
    inputs = [x.requires_grad_() for x in add_inputs(2, 5, 16, 24)]
    upstream = normal(7, 2, 5, 16)
    gradients = []
    for form in (linear_add_norm_triton, linear_add_norm_reference):
        y = torch.func.vmap(form)(*inputs)[used]
        gradients.append(torch.autograd.grad(y, inputs, upstream, allow_unused=True))
    for ours, true in zip(*gradients, strict=True):
        assert (ours is None) == (true is None)
        if ours is not None:
            torch.testing.assert_close(ours, true)


def test_a_shared_weight_gathers_every_replicas_gradient():
    x, weight = normal(5, 3, 4, 16), normal(6, 24, 16).requires_grad_()
    upstream = normal(7, 3, 4, 24)
    y = torch.func.vmap(linear_triton, in_dims=(0, None))(x, weight)
    (gradient,) = torch.autograd.grad(y, weight, upstream)
    torch.testing.assert_close(gradient, torch.einsum("rno,rni->oi", upstream, x))


def test_operators_are_well_registered():
    assert_well_registered(linear_op, *plain_inputs(2, 5, 16, 8))
    assert_well_registered(linear_relu2_op, *plain_inputs(2, 5, 16, 8))
    assert_well_registered(linear_add_norm_op, *add_inputs(2, 5, 16, 8), None, 1e-6)
    assert_well_registered(linear_add_norm_op, *layer_norm_inputs(2, 5, 16, 8), 1e-6)
    assert_well_registered(relu2_mlp_norm_op, *mlp_inputs(2, 5, 16, 8), 1e-6)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(1, 4, 8).half(), torch.zeros(1, 4, 8).half(), "bfloat16"),
        (torch.zeros(1, 4, 8), torch.zeros(1, 4, 8).bfloat16(), "compute dtype"),
        (torch.zeros(1, 4, 8), torch.zeros(1, 4, 9), "inner width"),
    ],
)
def test_unsupported_operands_are_named(x, weight, message):
    with pytest.raises(ValueError, match=message):
        linear_op(x.to(DEVICE), weight.to(DEVICE))


def test_tiles_come_from_the_table_or_the_rule():
    assert tile_for("nt", 1000, 77, 33, torch.bfloat16, "ieee").block_m == 128
    for key, tile in TUNED.items():
        form, sides, dtype = key.split()
        found = tile_for(form, *map(int, sides.split("x")), getattr(torch, dtype), "ieee")
        assert found == tile


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", [(2, 1, 256, 64), (3, 1000, 768, 256), (2, 1024, 1000, 520)])
def test_bf16_matches_float64(name, shape):
    operator, reference, make = OPERATORS[name]
    # Inputs are bf16 exactly; every result is rounded to bf16 once or twice (2^-9 each).
    assert_close_to_float64(operator, reference, make(*shape, dtype=torch.bfloat16), 6e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_fp32_precisions(name, precision):
    operator, reference, make = OPERATORS[name]
    torch.set_float32_matmul_precision(precision)
    tolerance = 1e-6 if precision == "highest" else 3e-3  # tf32 keeps 10 bits; squares double it
    assert_close_to_float64(operator, reference, make(2, 1000, 320, 256), tolerance)
    torch.set_float32_matmul_precision("highest")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", OPERATORS)
def test_bits_at_networks_shapes(name, dtype):
    operator, _, make = OPERATORS[name]
    assert_batch_invariant(operator, make(5, 1024, 1024, 256, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["nt", "nn", "tn"])
def test_bits_in_a_stack_of_64(form):
    a = normal(0, 64, 256, 256, dtype=torch.bfloat16)
    b = normal(1, 64, 256, 256, dtype=torch.bfloat16)
    stacked = stacked_matmul(a, b, form)
    for replica in (0, 37, 63):
        alone = stacked_matmul(a[replica : replica + 1], b[replica : replica + 1], form)
        assert torch.equal(alone[0], stacked[replica])


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["nt", "nn", "tn"])
def test_how_a_tile_is_moved_does_not_change_it(form):
    """Persistence, width, stages and order leave every bit; so does an unaligned stack."""
    a, b = (normal(i, 3, 512, 512, dtype=torch.bfloat16) for i in range(2))
    tile = Tile(128, 128, 64, 8, 3)
    wanted = stacked_matmul(a, b, form, tile=tile)
    for change in ({"residents": 1}, {"wide": True}, {"stages": 4}, {"group_m": 1}):
        assert torch.equal(wanted, stacked_matmul(a, b, form, tile=tile._replace(**change)))
    flat = torch.zeros(3, 512 * 512 + 3, dtype=torch.bfloat16, device=DEVICE)
    view = flat[:, 3:].unflatten(1, (512, 512)).copy_(b)
    assert torch.equal(wanted, stacked_matmul(a, view, form, tile=tile))


@pytest.mark.gpu
@pytest.mark.parametrize("epilogue", ["none", "add", "relu2", "relu2_backward"])
@pytest.mark.parametrize("form", ["nt", "nn", "tn"])
def test_half_tiles_leave_every_bit(form, epilogue):
    """8 tiles a replica on 132 multiprocessors: 16 replicas take none by halves, 17 the last 4, a lone one all."""
    a, b, extra = (normal(i, 17, 512, 512, dtype=torch.bfloat16) for i in range(3))
    extra = extra.square() if epilogue == "relu2_backward" else extra
    tile = Tile(128, 256, 64, 8, 3, residents=1)
    whole, mixed, halves = (
        stacked_matmul(a[:count], b[:count], form, epilogue, extra[:count], tile=tile) for count in (16, 17, 1)
    )
    assert whole.isfinite().all() and torch.equal(whole, mixed[:16]) and torch.equal(whole[:1], halves)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_addresses_beyond_two_to_the_31(dtype):
    width = 32768  # 3 replicas of 32768 x 32768 elements
    weight = torch.zeros(3, width, width, dtype=dtype, device=DEVICE)
    weight[2, -64:] = normal(0, 64, width, dtype=dtype)
    x = normal(1, 3, 64, width, dtype=dtype) / width**0.5
    y = stacked_matmul(x, weight, "nt")
    true = x[2].double() @ weight[2, -64:].double().T
    assert (y[2, :, -64:].double() - true).norm() / true.norm() < 6e-3
    assert not y[:, :, :-64].any()
    assert torch.equal(stacked_matmul(x[2:], weight[2:], "nt")[0], y[2])


@pytest.mark.gpu
def test_runs_inside_a_cuda_graph():
    x, weight = plain_inputs(2, 128, 256, 256, torch.bfloat16)
    (wanted,), _, _ = differentiate(linear_op, [x, weight])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear_op(x, weight)
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, wanted)
