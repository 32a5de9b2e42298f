"""The paper's network: fused kernel and CPU loop against float64 numpy, its measure, its problem files, its rows.

R cell, Q problem, N data point, K input, H hidden unit, S step, B point of a minibatch, P flat parameters.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, grad_and_value, vmap

from engine.config import Run, make_config, resolve
from engine.measure import measurements_of
from engine.models.mlp import MLP
from engine.two_layer import as_numpy, load_problem, make_problem, train_cells
from kernels import descent_cpu
from kernels.descent import descend
from kernels.descent_triton import descend_triton
from kernels.two_layer import CAP, DTYPES, digest, measure

# diverging cells overflow; numpy and the interpreter, which computes with numpy, warn of it
pytestmark = [pytest.mark.kernel, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT2 = np.sqrt(2)


def case(precision, points, cells, steps, minibatch=0, problems=2, rates=(-1.0, 1.0), seed=0):
    """Arguments of `descend_triton` up to the problem index, and the draws (None without minibatches)."""
    random = np.random.default_rng(seed)
    dtype = DTYPES[precision]
    shapes = [(problems, points, 16), (problems, points), (problems, 16, 16), (problems, 16)]
    tensors = [torch.from_numpy(random.standard_normal(shape)).to(DEVICE, dtype) for shape in shapes]
    tensors += [torch.from_numpy(10 ** random.uniform(*rates, cells)).to(DEVICE, dtype) for _ in range(2)]
    tensors.append(torch.from_numpy(random.uniform(-0.3, 0.3, cells)).to(DEVICE, dtype))
    tensors.append(torch.from_numpy(random.integers(0, problems, cells).astype(np.int32)).to(DEVICE))
    draws = random.integers(0, points, (problems, steps, minibatch)).astype(np.int32)
    return tensors, torch.from_numpy(draws).to(DEVICE) if minibatch else None


def numpy_run(tensors, draws, cell, steps, nonlinearity, every_step):
    """Losses [S] and final weights [P] of one cell in float64 numpy, straight from the definition."""
    x, y, w0, w1, lr0, lr1, offset, problem = (t.cpu().numpy() for t in tensors)
    q = problem[cell]
    x_NK, y_N = x[q].astype(np.float64), y[q].astype(np.float64)
    w0_KH, w1_H = w0[q].astype(np.float64), w1[q].astype(np.float64)
    rate0, rate1, shift = float(lr0[cell]), float(lr1[cell]), float(offset[cell])

    def forward(x_NK):
        z_NH = x_NK @ w0_KH / np.sqrt(16)
        if nonlinearity == "tanh":
            a_NH = np.tanh(ROOT2 * z_NH)
            return a_NH, ROOT2 * (1 - a_NH**2)
        if nonlinearity == "relu":
            return ROOT2 * np.maximum(z_NH, 0), ROOT2 * (z_NH > 0)
        return z_NH, np.ones_like(z_NH)

    losses = []
    if not every_step:
        w0_KH = w0_KH + shift
    for s in range(steps):
        if every_step:
            w0_KH = w0_KH + shift
        losses.append(np.mean((forward(x_NK)[0] @ w1_H / 16 - y_N) ** 2))
        drawn = slice(None) if draws is None else draws[q, s].cpu().numpy()
        a_BH, slope_BH = forward(x_NK[drawn])
        r_B = (a_BH @ w1_H / 16 - y_N[drawn]) * 2 / (16 * len(a_BH))
        g0_KH = x_NK[drawn].T @ (r_B[:, None] * w1_H * slope_BH) / np.sqrt(16)
        w0_KH, w1_H = w0_KH - rate0 * g0_KH, w1_H - rate1 * a_BH.T @ r_B
    return np.array(losses), np.concatenate([w0_KH.ravel(), w1_H])


def numpy_measure(losses):
    """The convergence measure, one number after the other."""
    v = []
    for loss in losses:
        ratio = np.float64(loss) / np.float64(losses[0])
        v.append(float(ratio) if np.isfinite(ratio) and ratio <= CAP else CAP)
    tail = v[-20:]
    return -sum(v) if sum(tail) / len(tail) < 1 else sum(1 / np.float64(x) for x in v)


def check_run(run, tensors, draws, steps, nonlinearity, every_step, tolerance, cells):
    """Compare some cells of a run, and its digests, with numpy."""
    for cell in cells:
        losses, weights = numpy_run(tensors, draws, cell, steps, nonlinearity, every_step)
        np.testing.assert_allclose(run.losses_RS[cell].cpu(), losses, rtol=max(tolerance, 2e-7))
        np.testing.assert_allclose(run.weights_RP[cell].cpu(), weights, rtol=tolerance, atol=tolerance)
        assert float(run.first_loss_R[cell]) == pytest.approx(losses[0], rel=tolerance)
        assert float(run.last_loss_R[cell]) == pytest.approx(losses[-20:].mean(), rel=tolerance)
        assert float(run.measure_R[cell]) == pytest.approx(numpy_measure(losses), rel=tolerance)
        assert run.nonfinite_step_R[cell] == -1
    assert torch.equal(run.weights_digest_R, digest(run.weights_RP))


# ---- the kernel and the CPU loop against numpy

FORMS = [
    ("tanh", "fp64", 4, 0, False),
    ("tanh", "fp32", 6, 0, False),
    ("tanh", "tf32x3", 19, 0, False),
    ("relu", "fp64", 3, 2, True),
    ("relu", "tf32x3", 6, 18, False),
    ("identity", "fp32", 7, 0, True),
    ("tanh", "fp32", 4, 2, False),
]
TOLERANCE = {"fp64": 1e-12, "fp32": 2e-5, "tf32x3": 2e-5}  # rounding of 3 steps whose weights are of order 1


@pytest.mark.parametrize(("nonlinearity", "precision", "points", "minibatch", "every_step"), FORMS)
def test_kernel_equals_numpy(nonlinearity, precision, points, minibatch, every_step):
    tensors, draws = case(precision, points, cells=4, steps=3, minibatch=minibatch)
    run = descend_triton(*tensors, 3, nonlinearity, draws, every_step, True, True, precision=precision)
    check_run(run, tensors, draws, 3, nonlinearity, every_step, TOLERANCE[precision], range(4))


@pytest.mark.parametrize(("nonlinearity", "precision", "points", "minibatch", "every_step"), FORMS)
def test_cpu_loop_equals_numpy(nonlinearity, precision, points, minibatch, every_step):
    tensors, draws = case(precision, points, cells=40, steps=23, minibatch=minibatch, rates=(-1.5, 0.0))
    tensors = [t.cpu() for t in tensors]
    draws = None if draws is None else draws.cpu()
    run = descend(
        *tensors,
        steps=23,
        nonlinearity=nonlinearity,
        precision=precision,
        minibatch_QSB=draws,
        offset_every_step=every_step,
        keep_losses=True,
        keep_weights=True,
    )
    check_run(run, tensors, draws, 23, nonlinearity, every_step, 10 * TOLERANCE[precision], range(0, 40, 6))


@pytest.mark.parametrize(
    ("real", "function", "tolerance"),
    [(np.float32, descent_cpu.tanh_32, 4e-7), (np.float64, descent_cpu.tanh_64, 4e-16)],
)
def test_tanh_of_the_cpu_loop(real, function, tolerance):
    """Relative error everywhere, exactly 1 far out, NaN for NaN."""
    u = np.concatenate([np.linspace(-25, 25, 4001), np.linspace(-0.41, 0.41, 401), [1e-30, 1e-6]]).astype(real)
    wanted = np.tanh(u.astype(np.longdouble))
    got = np.array([function(x) for x in u])  # what returns is a Python float
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=0)
    assert [function(real(x)) for x in (30, -30, 1e30, np.inf, -np.inf)] == [1, -1, 1, 1, -1]
    assert np.isnan(function(real("nan")))


def test_identity_network_with_a_fixed_first_layer_is_linear_regression():
    (x, y, w0, w1, lr0, lr1, offset, problem), _ = case("fp64", 4, cells=2, steps=3, problems=1)
    tensors = (x, y, w0, w1, torch.zeros_like(lr0), lr1, torch.zeros_like(offset), problem)
    run = descend_triton(*tensors, 3, "identity", None, False, True, True, precision="fp64")
    a_NH = (x[0] @ w0[0] / 4 / 16).cpu().numpy()
    for cell in range(2):
        step_NN = np.eye(4) - float(lr1[cell]) * 2 / 4 * a_NH @ a_NH.T
        r_N = a_NH @ w1[0].cpu().numpy() - y[0].cpu().numpy()
        expected = [np.mean((np.linalg.matrix_power(step_NN, s) @ r_N) ** 2) for s in range(3)]
        np.testing.assert_allclose(run.losses_RS[cell].cpu(), expected, rtol=2e-7)


# ---- cells are independent, and stopping early changes nothing


def bits(run):
    """Every output as integers, so that NaNs compare."""
    tensors = [t for t in run if t is not None]
    return [t.view(torch.int64 if t.element_size() == 8 else torch.int32).cpu() for t in tensors]


def assert_same(run, other, cells=slice(None)):
    for left, right in zip(bits(run), bits(other), strict=True):
        assert torch.equal(left[cells], right)


@pytest.mark.parametrize("precision", ["fp32", "fp64", "tf32x3"])
def test_bits_do_not_depend_on_launch_tile_or_neighbours(precision):
    tensors, _ = case(precision, 2, cells=5, steps=3)
    # a cell that overflows at once, beside others that do not
    tensors[4][2] = tensors[5][2] = 1e200 if precision == "fp64" else 1e30
    whole = descend_triton(*tensors, 3, "tanh", None, False, True, True, precision=precision)
    assert int(whole.nonfinite_step_R[2]) >= 0
    if precision != "tf32x3":
        assert_same(whole, descend_triton(*tensors, 3, "tanh", None, False, True, True, precision, 2, 1))
    cells = torch.tensor([4, 2, 0], device=DEVICE)
    part = [*tensors[:4], *(t[cells].contiguous() for t in tensors[4:])]
    assert_same(whole, descend_triton(*part, 3, "tanh", None, False, True, True, precision=precision), cells.cpu())


@pytest.mark.parametrize("form", [("tanh", 0), ("relu", 0), ("tanh", 2)])
@pytest.mark.parametrize("path", ["kernel", "cpu"])
def test_a_settled_cell_ends_as_the_full_loop_ends(form, path, monkeypatch):
    """A program stops early only when all its cells are settled: beside a live cell, the settled one runs on."""
    nonlinearity, minibatch = form
    tensors, draws = case("fp32", 2, cells=2, steps=5, minibatch=minibatch, problems=1)
    tensors[4][0] = tensors[5][0] = 1e25
    tensors[4][1] = tensors[5][1] = 1e-2
    alone = [*tensors[:4], *(t[:1].contiguous() for t in tensors[4:])]
    options = (5, nonlinearity, draws, False, True, True)
    if path == "kernel":
        early = descend_triton(*alone, *options, precision="fp32")
        full = descend_triton(*tensors, *options, precision="fp32")
    else:
        tensors, alone = [t.cpu() for t in tensors], [t.cpu() for t in alone]
        options = (5, nonlinearity, None if draws is None else draws.cpu(), False, True, True)
        # as Python runs it: compiled, it cannot be kept from stopping
        monkeypatch.setattr(descent_cpu, "_train_cells", descent_cpu._train_cells.py_func)
        early = descent_cpu.descend_cpu(*alone, *options)
        monkeypatch.setattr(descent_cpu, "_settled", lambda old, new, draws: False)
        full = descent_cpu.descend_cpu(*alone, *options)
    step = int(early.nonfinite_step_R[0])
    assert 0 <= step < 4
    assert not early.losses_RS[0, step:].isfinite().any()
    assert float(early.measure_R[0]) == pytest.approx(numpy_measure(early.losses_RS[0].cpu().numpy()), rel=1e-6)
    assert torch.equal(early.weights_digest_R[:1], digest(early.weights_RP[:1]))
    for left, right in zip(early, full, strict=True):
        torch.testing.assert_close(left[:1], right[:1], rtol=0, atol=0, equal_nan=True)


def test_a_fixed_point_with_finite_weights_is_the_end():
    tensors, _ = case("fp32", 2, cells=3, steps=5)
    tensors[4].zero_()
    tensors[5].zero_()
    run = descend_triton(*tensors, 5, "tanh", None, False, True, True, precision="fp32")
    assert torch.equal(run.losses_RS, run.losses_RS[:, :1].expand(3, 5))
    assert run.measure_R.tolist() == [5.0] * 3  # v is 1 at every step, which is not below 1


# ---- the measure

LOSS = st.one_of(st.floats(1e-6, 1e12), st.sampled_from([0.0, 1e300, float("inf"), float("nan")]))


@settings(max_examples=200, deadline=None)
@given(st.lists(LOSS, min_size=1, max_size=45))
def test_measure_is_its_definition(losses):
    got, last, step = measure(torch.tensor([losses], dtype=torch.float64))
    assert float(got[0]) == pytest.approx(numpy_measure(losses), rel=1e-12)
    bad = [s for s, loss in enumerate(losses) if not np.isfinite(loss)]
    assert int(step[0]) == (bad[0] if bad else -1)
    assert float(last[0]) == pytest.approx(np.mean(losses[-20:]), rel=1e-12, nan_ok=True)


def test_measure_of_a_ratio_that_overflows_is_divergence():
    got, _, step = measure(torch.tensor([[1e-300] + [1e300] * 30], dtype=torch.float64))
    assert float(got[0]) == pytest.approx(1 + 30e-6)
    assert int(step[0]) == -1


# ---- problems and rows


def run_of(**fields) -> Run:
    fields = {"y": "lr.0:log:1e-2:1e3:3", "x": "lr.1:log:1e-2:1e3:5", "steps": 12, "data_points": 24} | fields
    return resolve(make_config("two_layer", **fields), "cpu")


def train_rows(run: Run, rows: slice, device: str) -> dict[str, np.ndarray]:
    """What a sweep stores of some rows, [row, col(, step)] by name."""
    height, width = run.cells.shape
    cells = np.arange(height * width).reshape(height, width)[rows]
    wanted = measurements_of(run)
    reading = train_cells(run, cells.ravel(), torch.device(device), "losses" in wanted)
    found = {name: as_numpy(own.compute["two_layer"](reading), own.dtype) for name, own in wanted.items()}
    return {name: array.reshape(*cells.shape, *array.shape[1:]) for name, array in found.items()}


def test_rows_do_not_depend_on_the_launch():
    chosen = run_of(trace="on")
    whole = train_rows(chosen, slice(0, 3), DEVICE)
    row = train_rows(chosen, slice(1, 2), DEVICE)
    for name, array in whole.items():
        assert array.shape[:2] == (3, 5)
        np.testing.assert_array_equal(array[1:2], row[name])
    assert whole["weights_digest"].dtype == np.uint64
    assert len(np.unique(whole["weights_digest"])) == 15


@pytest.mark.parametrize("minibatch", [0, 4])
def test_cpu_bits_do_not_depend_on_where_the_memory_lies(minibatch):
    """Every new thread allocates elsewhere; arrays that lay near each other took a loop without vectors."""
    tensors, draws = case("fp32", 24, cells=5, steps=12, minibatch=minibatch, rates=(-2.0, 0.0))
    tensors, draws = [t.cpu() for t in tensors], None if draws is None else draws.cpu()
    first = descent_cpu.descend_cpu(*tensors, 12, "tanh", draws, False, True, True)
    for _ in range(200):
        assert_same(descent_cpu.descend_cpu(*tensors, 12, "tanh", draws, False, True, True), first)


@pytest.mark.parametrize("minibatch", [0, 4])
def test_a_saved_problem_trains_the_same_cells(tmp_path, minibatch):
    chosen = run_of(minibatch=minibatch, precision="fp64", init_scale=0.5)
    np.savez(tmp_path / "problem.npz", **make_problem(chosen))
    fields = {"minibatch": minibatch, "precision": "fp64", "init_scale": 0.5, "data_points": 9, "seed": 7}
    again = run_of(problem=str(tmp_path / "problem.npz"), **fields)
    for name, array in train_rows(chosen, slice(0, 3), DEVICE).items():
        np.testing.assert_array_equal(array, train_rows(again, slice(0, 3), DEVICE)[name], err_msg=name)


def test_seed_offset_and_shared_rate_axes():
    seeds = train_rows(run_of(y="seed:linear:0:2:3", x="lr:log:1e-2:1e0:5"), slice(0, 3), DEVICE)
    assert len(np.unique(seeds["first_loss"])) == 3
    one = train_rows(run_of(y="seed:linear:1:1:1", x="lr:log:1e-2:1e0:5"), slice(0, 1), DEVICE)
    np.testing.assert_array_equal(seeds["measure"][1], one["measure"][0])
    both = train_rows(run_of(y="offset:linear:0:1:2", x="lr:log:1e-1:1e0:5"), slice(0, 2), DEVICE)
    layers = train_rows(run_of(y="lr.0:log:1e-1:1e0:5", x="lr.1:log:1e-1:1e0:5"), slice(0, 5), DEVICE)
    np.testing.assert_array_equal(both["measure"][0], layers["measure"].diagonal())
    assert not np.array_equal(both["measure"][0], both["measure"][1])


GOOD = {"X": np.ones((5, 16)), "Y": np.ones((5, 1)), "W0": np.ones((16, 16)), "W1": np.ones((16, 1))}
DRAWS = {"minibatch_index": np.zeros((12, 4), int)}


@pytest.mark.parametrize(
    ("arrays", "fields", "message"),
    [
        ({k: v for k, v in GOOD.items() if k != "W1"}, {}, "has no W1"),
        (GOOD | {"X": np.ones((5, 8))}, {}, r"X is float64 \[5, 8\], expected numbers \[5, 16\]"),
        (GOOD | {"Y": np.ones(5)}, {}, r"Y is float64 \[5\]"),
        (GOOD | {"X": np.float64(1)}, {}, r"X is float64 \[\]"),
        (GOOD | {"W0": np.full((16, 16), "a")}, {}, "W0 is <U1"),
        (GOOD | {"W0": np.full((16, 16), np.nan)}, {}, "W0 has values that are not finite"),
        (GOOD, {"minibatch": 4}, "has no minibatch_index"),
        (GOOD | DRAWS, {}, "has minibatch_index, but --minibatch is 0; give --minibatch 4, or remove"),
        (GOOD | DRAWS, {"minibatch": 3}, r"minibatch_index is int64 \[12, 4\], expected .* \[12 or more, 3\]"),
        (GOOD | DRAWS, {"minibatch": 4, "steps": 13}, r"\[13 or more, 4\]"),
        (GOOD | {"minibatch_index": np.full((12, 4), 5)}, {"minibatch": 4}, r"whole numbers in \[0, 5\)"),
        (GOOD, {"y": "seed:linear:0:2:3"}, "the seed is swept"),
    ],
)
def test_problem_files_that_do_not_fit_are_named(tmp_path, arrays, fields, message):
    np.savez(tmp_path / "problem.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        load_problem(run_of(problem=str(tmp_path / "problem.npz"), **fields))
    assert "\n" not in str(caught.value)


def test_a_problem_that_is_no_npz_is_named(tmp_path):
    (tmp_path / "problem.npz").write_text("X, Y")
    with pytest.raises(ValueError, match=r"is not an \.npz"):
        make_problem(run_of(problem=str(tmp_path / "problem.npz")))


# ---- the general path


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "identity"])
def test_vmap_over_the_one_replica_network_gives_the_same_map(nonlinearity):
    """Plain vmap over `MLP` in fp64: the same labels, and losses within rounding, over a 6 x 6 grid."""
    chosen = run_of(
        y="lr.0:log:1e-2:1e4:6",
        x="lr.1:log:1e-2:1e4:6",
        steps=40,
        precision="fp64",
        nonlinearity=nonlinearity,
        trace="on",
    )
    problem = {name: torch.from_numpy(array) for name, array in make_problem(chosen).items()}
    network = MLP(nonlinearity)
    weights = {"w0": problem["W0"].repeat(36, 1, 1), "w1": problem["W1"].repeat(36, 1, 1)}
    axis = torch.from_numpy(chosen.cells.x.values)
    rates = {"w0": axis.repeat_interleave(6), "w1": axis.repeat(6)}

    def loss(weights, x, y):
        return (functional_call(network, weights, (x,)) - y).square().mean()

    step = vmap(grad_and_value(loss), in_dims=(0, None, None))
    losses = []
    for _ in range(40):
        gradients, values = step(weights, problem["X"], problem["Y"])
        losses.append(values)
        weights = {name: weights[name] - rates[name][:, None, None] * gradients[name] for name in weights}
    expected = measure(torch.stack(losses, 1))[0].reshape(6, 6).numpy()
    run = train_rows(chosen, slice(0, 6), DEVICE)
    assert (expected < 0).any()
    assert (expected > 0).any()
    np.testing.assert_array_equal(run["measure"] < 0, expected < 0)
    np.testing.assert_allclose(run["losses"].reshape(36, 40)[:, :5], torch.stack(losses, 1)[:, :5].float(), rtol=1e-6)


# ---- on a GPU: the compiled kernel at full size


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp64", "tf32x3"])
def test_compiled_kernel_at_full_size(precision):
    """Bits for any launch; labels of a 32 x 32 map of 272 points within the known noise of the CPU loop's."""
    tensors, _ = case(precision, 272, cells=1024, steps=200, problems=1, rates=(-3.0, 6.0))
    run = descend(*tensors, steps=200, precision=precision, keep_losses=True, keep_weights=True)
    order = torch.randperm(1024, device="cuda")[:333]
    part = [*tensors[:4], *(t[order].contiguous() for t in tensors[4:])]
    again = descend(*part, steps=200, precision=precision, keep_losses=True, keep_weights=True)
    assert_same(run, again, order.cpu())
    assert torch.equal(run.weights_digest_R, digest(run.weights_RP))
    on_cpu = descend(*(t.cpu() for t in tensors), steps=200, precision=precision)
    flips = ((run.measure_R.cpu() < 0) != (on_cpu.measure_R < 0)).double().mean()
    assert flips < 0.02  # precision alone changes 0.2-0.4% of labels
