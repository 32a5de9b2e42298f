"""Attention: against float64, at odd contexts, with shared kv heads, batch-invariant."""

from functools import partial

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

from kernels.attention import (
    attention_backward_op,
    attention_op,
    qkv_attention,
    qkv_attention_reference,
    qkv_attention_triton,
)

pytestmark = pytest.mark.kernel


def rotary_tables(T, K, dtype=torch.float32):
    angle = torch.arange(T)[:, None] * 10000 ** (-torch.arange(K // 2) / (K // 2))
    return angle.cos().to(DEVICE, dtype), angle.sin().to(DEVICE, dtype)


def bind(function, T, K, heads, kv_heads, qk_norm, dtype=torch.float32, **more):
    cos, sin = rotary_tables(T, K, dtype)
    return partial(function, cos_TK2=cos, sin_TK2=sin, heads=heads, kv_heads=kv_heads, qk_norm=qk_norm, **more)


def check_against_float64(R, B, T, H, G, K, qk_norm, dtype, tolerance, **more):
    qkv = normal(0, R, B, T, (H + 2 * G) * K, dtype=dtype)
    operator = bind(qkv_attention_triton, T, K, H, G, qk_norm, **more)
    reference = bind(qkv_attention_reference, T, K, H, G, qk_norm, torch.float64, **more)
    assert_close_to_float64(operator, reference, [qkv], tolerance)


@pytest.mark.parametrize(
    ("R", "T", "H", "G", "K", "qk_norm"),
    [
        (2, 1, 2, 1, 16, False),
        (2, 16, 2, 2, 32, True),
        (1, 63, 3, 1, 16, False),
        (2, 63, 2, 2, 16, True),
        (1, 100, 2, 1, 48, True),
        (1, 127, 1, 1, 64, False),
    ],
)
def test_matches_float64(R, T, H, G, K, qk_norm):
    check_against_float64(R, 1, T, H, G, K, qk_norm, torch.float32, 1e-6)  # measured: 3e-7 at most


# fp32's blocks have 32 times: contexts of one block, of a pair of half blocks, of two shared blocks, and of several
@pytest.mark.parametrize(("T", "H", "G"), [(23, 2, 1), (50, 1, 1), (50, 2, 1), (110, 2, 1)])
@pytest.mark.parametrize("window", [0, 7, 33, 80])
def test_windows_match_float64(T, H, G, window):
    check_against_float64(1, 1, T, H, G, 16, True, torch.float32, 1e-6, window=window, qk_scale=1.2)  # measured: 4e-7


def test_a_window_that_covers_the_context_is_none():
    qkv = normal(4, 2, 1, 50, 48)
    whole, covered, shorter = (
        torch.func.vmap(bind(qkv_attention_triton, 50, 16, 1, 1, True, window=window))(qkv) for window in (None, 49, 48)
    )
    assert torch.equal(whole, covered) and not torch.equal(whole, shorter)
    torch.testing.assert_close(whole[:, :, :49], shorter[:, :, :49])  # keys in another order


@pytest.mark.parametrize("window", [None, 3])
def test_plain_torch_attention_agrees(window):
    """The reference itself, against torch's attention on separately rotated heads."""
    B, T, H, G, K = 2, 9, 4, 2, 8
    qkv = normal(1, B, T, (H + 2 * G) * K, dtype=torch.float64)
    cos, sin = rotary_tables(T, K, torch.float64)
    q, k, v = qkv.view(B, T, H + 2 * G, K).transpose(1, 2).split([H, G, G], dim=1)

    def rotate(x):
        turned = torch.complex(x[..., : K // 2], x[..., K // 2 :]) * torch.complex(cos, sin)
        return torch.cat([turned.real, turned.imag], -1)

    def norm(x):
        return torch.nn.functional.rms_norm(x, (K,), eps=1e-6)

    seen = torch.ones(T, T, dtype=torch.bool, device=DEVICE).tril().triu(-T if window is None else -window)
    q, k = 1.5 * norm(rotate(q)), 1.5 * norm(rotate(k))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
    expected = o.transpose(1, 2).reshape(B, T, H * K)
    got = qkv_attention_reference(qkv, cos, sin, H, G, True, window=window, qk_scale=1.5)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("T", "H"), [(9, 2), (40, 1), (70, 1)])  # 40: pairs of half blocks; 70: a longer context
def test_batch_invariant(T, H, window):
    qkv = normal(2, 5, 1, T, (H + 2) * 16)
    assert_batch_invariant(bind(qkv_attention_triton, T, 16, H, 1, True, window=window), [qkv])


def test_each_replica_may_have_its_own_rotary_tables():
    R, B, T, H, K = 2, 1, 8, 2, 16
    qkv, angle = normal(3, R, B, T, 3 * H * K), normal(4, R, T, K // 2)
    cos, sin = angle.cos(), angle.sin()
    stacked = torch.func.vmap(qkv_attention_triton, in_dims=(0, 0, 0, None, None))(qkv, cos, sin, H, H)
    for r in range(R):
        assert torch.equal(stacked[r], qkv_attention_triton(qkv[r], cos[r], sin[r], H, H))


def test_a_strided_projection_and_another_mapped_dimension():
    R, B, T, H, K = 2, 2, 8, 1, 16
    qkv = normal(5, B, R, 3 * H * K, T).transpose(2, 3)
    operator = bind(qkv_attention_triton, T, K, H, H, False)
    stacked = torch.func.vmap(operator, in_dims=1)(qkv)
    assert torch.equal(stacked, torch.func.vmap(operator)(qkv.movedim(1, 0).contiguous()))


def test_operators_are_well_registered():
    qkv, settings = normal(9, 2, 1, 8, 64), (2, 1, True, 1e-6, 3, 1.2)
    cos, sin = (table.expand(2, -1, -1).contiguous() for table in rotary_tables(8, 16))
    checked = [qkv, cos, sin]  # the tables take no gradient
    o, logsumexp = attention_op(*checked, *settings)
    assert_well_registered(attention_op, *checked, *settings)
    assert_well_registered(attention_backward_op, normal(10, *o.shape), *checked, o, logsumexp, *settings)


def test_refuses_channels_and_tables_that_do_not_fit():
    cos, sin = rotary_tables(8, 16)
    with pytest.raises(ValueError, match="qkv channels"):
        qkv_attention(normal(0, 1, 8, 50), cos, sin, 1, 1)
    with pytest.raises(ValueError, match="rotary tables"):
        qkv_attention(normal(0, 1, 9, 48), cos, sin, 1, 1)
    with pytest.raises(ValueError, match="a window of -1, expected at least 0"):
        qkv_attention(normal(0, 1, 8, 48), cos, sin, 1, 1, window=-1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("T", "H", "G", "K", "qk_norm"),
    [
        (1, 2, 2, 64, True),
        (32, 2, 1, 128, False),
        (63, 9, 3, 64, True),
        (64, 2, 2, 16, False),
        (100, 4, 2, 96, True),
        (70, 3, 3, 32, False),
        (128, 2, 2, 64, True),
        (128, 9, 3, 64, False),
        (127, 2, 1, 128, True),
        (129, 2, 2, 64, False),
        (512, 2, 1, 128, True),
        (1000, 9, 3, 64, False),
        (2048, 2, 2, 64, True),
        (300, 4, 2, 80, True),
        (520, 4, 1, 96, False),
        (200, 2, 2, 20, True),  # heads that are no whole 16-byte units
        (4096, 1, 1, 64, True),
    ],
)
def test_bf16_matches_float64(T, H, G, K, qk_norm):
    # bf16 keeps 8 bits: each of qkv's products, p and ds is rounded once, 2^-9 relative.
    check_against_float64(2, 2, T, H, G, K, qk_norm, torch.bfloat16, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("T", "H", "G", "K", "window"),
    [
        (64, 9, 3, 64, 20),
        (127, 2, 2, 64, 40),
        (128, 2, 1, 128, 100),
        (512, 2, 2, 64, 1),
        (1000, 9, 3, 64, 333),
        (1000, 2, 2, 128, 512),
        (2048, 6, 6, 128, 768),
        (300, 4, 2, 20, 70),
    ],
)
def test_bf16_windows_match_float64_and_are_batch_invariant(T, H, G, K, window):
    more = {"window": window, "qk_scale": 1.2}
    check_against_float64(2, 1, T, H, G, K, True, torch.bfloat16, 1e-2, **more)  # as above, scores 1.44 times as large
    qkv = normal(6, 5, 1, T, (H + 2 * G) * K, dtype=torch.bfloat16)
    assert_batch_invariant(bind(qkv_attention_triton, T, K, H, G, True, **more), [qkv])


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("highest", 2e-6), ("high", 2e-3)])
@pytest.mark.parametrize(("T", "H", "G", "K"), [(128, 4, 4, 64), (1000, 3, 1, 64), (300, 2, 2, 128)])
def test_float32_matches_float64(T, H, G, K, precision, tolerance):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        check_against_float64(2, 1, T, H, G, K, True, torch.float32, tolerance)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("T", "H", "G", "qk_norm"), [(128, 4, 4, True), (128, 12, 12, True), (128, 9, 3, False), (1000, 9, 3, True)]
)
def test_batch_invariant_at_real_shapes(T, H, G, qk_norm):
    qkv = normal(6, 5, 8, T, (H + 2 * G) * 64, dtype=torch.bfloat16)
    operator = bind(qkv_attention_triton, T, 64, H, G, qk_norm)
    assert_batch_invariant(operator, [qkv])
    many = qkv.repeat(13, 1, 1, 1)[:64]
    y, g, _ = differentiate(torch.func.vmap(operator), [many])
    y5, g5, _ = differentiate(torch.func.vmap(operator), [qkv], [normal(7, *y[0].shape, dtype=torch.bfloat16)[:5]])
    assert torch.equal(y[0][:5], y5[0])
    assert torch.equal(g[0][:5], g5[0])


@pytest.mark.gpu
@pytest.mark.large
def test_more_than_2_to_the_31_elements():
    B, T, H, K = 8, 128, 4, 64
    R = 2**31 // (B * T * 3 * H * K) + 2
    operator = bind(qkv_attention_triton, T, K, H, H, True)
    last = normal(8, B, T, 3 * H * K, dtype=torch.bfloat16)
    qkv = torch.zeros(R, *last.shape, dtype=torch.bfloat16, device=DEVICE)
    qkv[-1] = last
    qkv.requires_grad_()
    o = torch.func.vmap(operator)(qkv)
    (dqkv,) = torch.autograd.grad(o, qkv, o.detach())
    y, g, _ = differentiate(operator, [last], [o[-1].detach()])
    assert torch.equal(o[-1], y[0])
    assert torch.equal(dqkv[-1], g[0])
