"""Stacked AdamW: bit-equal to its reference and to the split form, inactive memory, norms."""

import pytest
import torch
from stacked import DEVICE, normal

from kernels.accumulate import accumulate_reference_, accumulate_triton_
from kernels.adamw import AdamWScalars, adamw_, adamw_reference_, adamw_split_, adamw_triton_
from kernels.gradient_norm import BLOCK, global_norm_reference, global_norm_triton
from kernels.momentum import MomentumScalars, momentum_step_reference_, momentum_step_triton_
from kernels.split_master import join_master, round_to_weight, split_master

pytestmark = pytest.mark.kernel

EPS = 1e-8


def bits(x):
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def same(a, b):
    return torch.equal(bits(a), bits(b)) if a.is_floating_point() else torch.equal(a, b)


def special_masters():
    """Ties, infinities, zeros, the largest finite number, subnormals, NaNs of all kinds, and random bits."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (100_000,), generator=generator)
    ties = (words[:1000] & ~0xFFFF) | 0x8000
    named = [0x7F800000, -0x800000, 0x7F7FFFFF, 0, -(2**31), 1, 0x7FFFFFFF, 0x7FC00000, 0x7F7F8000]
    words = torch.cat([words, ties, torch.tensor(named)]).to(torch.int32)
    return words.view(torch.float32)


def test_master_splits_exactly():
    master = special_masters()
    weight, remainder = split_master(master)
    assert same(join_master(weight, remainder), torch.where(master.isnan(), torch.nan, master))
    assert torch.equal(weight.isnan(), master.isnan())
    finite = master.isfinite()
    to_even = master.to(torch.bfloat16)
    tie = bits(master) & 0xFFFF == 0x8000
    assert same(weight[finite & ~tie], to_even[finite & ~tie])
    assert (weight.abs() >= to_even.abs())[finite & tie].all()


class State:
    """Views of flat [R, P] buffers, as a stack keeps them, with moments as after some steps."""

    def __init__(self, R, n, seed=0, gradient_dtype=torch.bfloat16):
        flat = normal(seed, 3, R, n + 24)
        flat[2] = flat[2].square()
        self.master, self.first, self.second = (buffer[:, 16 : 16 + n] for buffer in flat)
        weights = torch.zeros(R, n + 24, dtype=torch.bfloat16, device=DEVICE)
        self.weight = weights[:, 16 : 16 + n].copy_(round_to_weight(self.master, torch.bfloat16))
        remainders = torch.zeros(R, n + 24, dtype=torch.int16, device=DEVICE)
        self.remainder = remainders[:, 16 : 16 + n].copy_(split_master(self.master)[1])
        self.gradient = normal(seed + 1, R, n, dtype=gradient_dtype)
        draw = torch.rand(6, R, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        rate, decay, beta1, beta2, bias1, bias2 = draw * 0.9 + 0.05
        self.scalars = (rate, decay, beta1, beta2, 1 / bias1, bias2**-0.5, torch.full((R,), EPS, device=DEVICE))
        self.active = torch.ones(R, dtype=torch.bool, device=DEVICE)
        self.nonfinite = torch.zeros(R, dtype=torch.int32, device=DEVICE)

    def run(self, step, weight=True, split=False, scale_R=None):
        weight = self.weight if weight else None
        master = self.remainder if split else self.master
        moments = (self.first, self.second)
        scalars = AdamWScalars(*self.scalars, scale_R, self.active, self.nonfinite)
        step(master, self.gradient, weight, *moments, scalars)
        return self

    def tensors(self):
        master = self.master
        return [master, self.weight, self.first, self.second, self.nonfinite]


@pytest.mark.parametrize("gradient_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize(("R", "n"), [(1, 1), (2, 63), (5, 1300)])
def test_kernel_has_the_references_bits(R, n, weight, gradient_dtype):
    scale_R = torch.linspace(0.1, 1, R, device=DEVICE)
    wanted = State(R, n, gradient_dtype=gradient_dtype).run(adamw_reference_, weight, scale_R=scale_R)
    got = State(R, n, gradient_dtype=gradient_dtype).run(adamw_triton_, weight, scale_R=scale_R)
    assert all(map(same, got.tensors(), wanted.tensors()))


def test_reference_is_adamw():
    """Against torch's own optimizer in float64, three steps from rest."""
    R, n = 1, 50
    start, gradients = normal(0, n).cpu(), normal(1, 3, n).cpu()
    parameter = start.double().requires_grad_()
    optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=(0.8, 0.9), eps=EPS, weight_decay=0.3)
    master, first, second = start[None].clone(), torch.zeros(R, n), torch.zeros(R, n)
    for step in range(1, 4):
        parameter.grad = gradients[step - 1].double()
        optimizer.step()
        rates = (0.1, 0.3, 0.8, 0.9, 1 / (1 - 0.8**step), (1 - 0.9**step) ** -0.5, EPS)
        scalars = [torch.tensor([value]) for value in rates]
        flags = (torch.ones(R, dtype=torch.bool), torch.zeros(R, dtype=torch.int32))
        adamw_(master, gradients[None, step - 1], None, first, second, AdamWScalars(*scalars, None, *flags))
    torch.testing.assert_close(master[0], parameter.detach().float(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy warns of NaN
@pytest.mark.parametrize("step", [adamw_triton_, adamw_split_], ids=["kernel", "dispatch"])
def test_split_master_has_the_plain_forms_bits(step):
    plain, split = State(3, 700), State(3, 700)
    for state in (plain, split):
        state.gradient[1, 5] = float("inf")
        state.gradient[2, 6] = float("nan")
    plain.run(adamw_triton_)
    split.run(step, split=True)
    assert same(join_master(split.weight, split.remainder), plain.master)
    assert all(map(same, split.tensors()[1:], plain.tensors()[1:]))
    assert plain.nonfinite.tolist() == [0, 1, 1]


def test_without_eps_what_lies_behind_a_parameter_does_not_break_it():
    state = State(2, 63)
    state.scalars = (*state.scalars[:-1], torch.zeros(2, device=DEVICE))
    assert state.run(adamw_triton_).nonfinite.tolist() == [0, 0]
    assert state.master.isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy warns of NaN
@pytest.mark.parametrize("split", [True, False])
def test_inactive_replicas_are_not_touched(split):
    before, after = State(3, 300), State(3, 300)
    after.active[1] = False
    after.gradient[1] = float("nan")
    after.run(adamw_triton_, split=split)
    kept = zip(before.tensors() + [before.remainder], after.tensors() + [after.remainder], strict=True)
    assert all(same(old[1], new[1]) for old, new in kept)
    assert after.nonfinite.tolist() == [0, 0, 0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy warns of NaN
def test_batch_invariant():
    everyone, beside_nan = State(5, 300).run(adamw_triton_), State(5, 300)
    beside_nan.gradient[0], beside_nan.master[2] = float("nan"), float("inf")
    beside_nan.run(adamw_triton_)
    for replica in (1, 3, 4):
        pairs = zip(everyone.tensors(), beside_nan.tensors(), strict=True)
        assert all(same(a[replica], b[replica]) for a, b in pairs)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy warns of NaN
def test_global_norm():
    gradients = [normal(i, 5, n) for i, n in enumerate((1, 63, BLOCK + 5, 3 * BLOCK))]
    gradients[1] = gradients[1].bfloat16()
    norm_R = global_norm_triton(gradients)
    true = torch.cat([g.double() for g in gradients], dim=1).norm(dim=1)
    torch.testing.assert_close(norm_R.double(), true, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm_R, global_norm_reference(gradients), rtol=1e-6, atol=0)
    for lone in (0, 3):
        assert torch.equal(global_norm_triton([g[lone : lone + 1] for g in gradients]), norm_R[lone : lone + 1])
    gradients[2][0, 7], gradients[2][1, 7] = float("nan"), float("inf")
    beside = global_norm_triton(gradients)
    assert torch.equal(beside[2:], norm_R[2:])
    assert beside[:2].isnan().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy warns of overflow
@pytest.mark.parametrize("form", [global_norm_triton, global_norm_reference])
def test_a_norm_whose_squares_overflow(form):
    """By one square, by the sum within a block, by the sum over blocks; a norm beyond fp32 is no number."""
    gradients = [normal(0, 4, 3 * BLOCK), normal(1, 4, 63)]
    gradients[0][0, 7] = 3e25
    gradients[0][1] *= 3e17
    gradients[0][2, ::BLOCK] = 1.5e19
    gradients[0][3, :2] = 3e38
    norm_R = form(gradients)
    true = torch.cat([g.double() for g in gradients], dim=1).norm(dim=1)
    assert (true[:3] > 1.8e19).all()
    torch.testing.assert_close(norm_R[:3].double(), true[:3], rtol=1e-6, atol=0)
    assert norm_R[3].isnan()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy warns of overflow
@pytest.mark.parametrize("size", [1e25, 3e38])
def test_clipping_a_gradient_whose_squares_overflow_does_not_freeze_the_run(size):
    """It moves every weight, or, where its norm is no fp32 number, breaks the run, which is recorded."""
    clipped, frozen = (State(1, 63, gradient_dtype=torch.float32) for _ in range(2))
    clipped.gradient[:], frozen.gradient[:] = size, 0
    clipped.run(adamw_triton_, scale_R=1 / global_norm_triton([clipped.gradient]))
    assert (clipped.master != frozen.run(adamw_triton_).master).all()
    assert clipped.nonfinite.tolist() == [int(size > 1e30)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_accumulation(dtype):
    fresh = torch.tensor([True, False, False, True], device=DEVICE)
    active = torch.tensor([True, True, False, False], device=DEVICE)
    gradient = normal(0, 4, 1100, dtype=dtype)
    wanted = normal(1, 4, 1111)[:, 3:1103]
    wanted[0] = float("nan")  # a fresh accumulator's past does not count
    got = wanted.clone()
    accumulate_reference_(wanted, gradient, fresh, active)
    accumulate_triton_(got, gradient, fresh, active)
    assert same(got, wanted)
    assert same(got[0], gradient[0].float())


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 1000, 1024 * 1024 + 3])
def test_gpu_bits_equal_the_references_on_both_devices(n):
    kernel, reference = State(4, n).run(adamw_triton_), State(4, n).run(adamw_reference_)
    assert all(map(same, kernel.tensors(), reference.tensors()))
    host = State(4, n)
    moved = [t.cpu() for t in (host.master, host.gradient, host.weight, host.first, host.second)]
    scalars = [scalar_R.cpu() for scalar_R in host.scalars]
    adamw_reference_(*moved, AdamWScalars(*scalars, None, host.active.cpu(), host.nonfinite.cpu()))
    for on_gpu, on_cpu in zip(
        (kernel.master, kernel.weight, kernel.first), (moved[0], moved[2], moved[3]), strict=True
    ):
        assert same(on_gpu.cpu(), on_cpu)


@pytest.mark.gpu
@pytest.mark.large
def test_addresses_beyond_two_to_the_31():
    R, n = 3, 2**30  # 3.2e9 elements
    gradient = torch.zeros(R, n, dtype=torch.bfloat16, device=DEVICE)
    master, first, second = (torch.zeros(R, n, device=DEVICE) for _ in range(3))
    gradient[-1, -5:] = 1
    ones = [torch.full((R,), value, device=DEVICE) for value in (0.1, 0.0, 0.9, 0.9, 10.0, 10**0.5, EPS)]
    flags = (torch.ones(R, dtype=torch.bool, device=DEVICE), torch.zeros(R, dtype=torch.int32, device=DEVICE))
    adamw_triton_(master, gradient, None, first, second, AdamWScalars(*ones, None, *flags))
    assert torch.equal(master.count_nonzero(dim=1).cpu(), torch.tensor([0, 0, 5]))
    assert (master[-1, -5:] < -0.09).all()
    torch.testing.assert_close(global_norm_triton([gradient]).cpu(), torch.tensor([0.0, 0.0, 5**0.5]))


@pytest.mark.parametrize("lion", [True, False])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_momentum_steps_equal_their_reference_bit_for_bit(lion, split, scaled):
    results = []
    for form in (momentum_step_reference_, momentum_step_triton_):
        state = State(3, 1300, seed=4)
        state.gradient[0, 5], state.gradient[2, 7] = torch.nan, torch.inf
        state.active[2] = False
        rate, decay, beta1, beta2, scale, *_ = state.scalars
        scalars = MomentumScalars(
            rate, decay, beta1 if lion else None, beta2, scale if scaled else None, state.active, state.nonfinite
        )
        weight, remainder = (state.weight, state.remainder) if split else (state.master, None)
        form(weight, remainder, state.gradient, state.first, scalars)
        results.append([*state.tensors(), state.remainder])
        assert state.nonfinite.tolist() == [1, 0, 0]
    assert all(same(ours, true) for ours, true in zip(*results, strict=True))
