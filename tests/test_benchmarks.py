"""The benchmarks compare like with like: every peer trains the same network; rows and ratios are right."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_command import fails

from benchmarks import (
    attention_tiles,
    elementwise,
    fractal,
    invariance,
    operators,
    peers,
    power,
    profile_step,
    random_runs,
    slots,
    text,
    throughput,
    timing,
    tune,
)
from engine import provenance
from engine.checkpoint.model import shapes_of
from engine.config import make_config, resolve
from engine.models import rotary_tables
from engine.models.gpt import GPTConfig, initial_weights
from engine.tokenizer import ByteTokenizer
from kernels.attention import qkv_attention_reference

CPU = torch.device("cpu")
STEPS = 8


def losses(peer: str, precision: str) -> np.ndarray:
    """Losses [S, R] of a small GPT trained by a peer on the CPU."""
    replicas = 1 if peer in throughput.SEQUENTIAL else 3
    options = peers.Options(peer, 2, 320, replicas, context=16, batch=4, precision=precision, device="cpu")
    run = peers.build(options)
    run.advance(STEPS)
    run.wait()
    return run.losses(STEPS)


@pytest.fixture(scope="module")
def ours() -> dict[str, np.ndarray]:
    return {precision: losses("ours", precision) for precision in ("fp32", "bf16")}


# fp32: sums in another order. bf16: roundings of activations differ, and losses have moved by 0.4 meanwhile.
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 5e-3)])
@pytest.mark.parametrize("peer", ["eager", "sequential", "vmap", "jax"])
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # attention under vmap on a CPU
def test_every_peer_trains_the_network_that_we_train(peer, precision, tolerance, ours):
    if peer == "jax":
        pytest.importorskip("jax")
        pytest.importorskip("optax")
    theirs = losses(peer, precision)
    np.testing.assert_allclose(theirs, ours[precision][:, : theirs.shape[1]], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", random_runs.PUBLISHED)
def test_the_sequential_loop_of_a_published_shape_trains_what_we_train(name, monkeypatch):
    shape = random_runs.PUBLISHED[name](16)
    kv_heads = {"kv_heads": 2} if hasattr(shape, "kv_heads") else {}
    small = replace(shape, depth=1, width=32, heads=4, mlp_width=48, vocabulary=320, **kv_heads)
    monkeypatch.setitem(random_runs.PUBLISHED, name, lambda context: small)
    found = {}
    for peer in ("eager", "sequential", "ours"):
        options = peers.Options(peer, replicas=1, context=16, batch=4, precision="fp32", device="cpu", network=name)
        run = peers.build(options)
        run.advance(STEPS)
        found[peer] = run.losses(STEPS)
    for peer in ("eager", "sequential"):
        np.testing.assert_allclose(found[peer], found["ours"], rtol=0, atol=1e-5)  # sums in another order


@pytest.mark.parametrize(("name", "millions"), [("gpt2-124m", 124.4), ("qwen2.5-0.5b", 494.0), ("llama-1b", 1235.8)])
def test_published_shapes_have_their_published_sizes(name, millions):
    shape = random_runs.PUBLISHED[name](1024)
    assert sum(int(np.prod(sizes)) for sizes in shapes_of(shape).values()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_torchs_fused_attention_is_ours():
    qkv, (cos, sin) = torch.randn(2, 16, 6 * 8), rotary_tables(16, 8, 1e4)
    expected = qkv_attention_reference(qkv, cos, sin, 4, 1)
    torch.testing.assert_close(peers.fused_attention(qkv, cos, sin, 4, 1), expected)


def test_the_replicas_of_the_comparison_differ(ours):
    first, last = ours["fp32"][0], ours["fp32"][-1]
    assert (first == first[0]).all() and np.ptp(last) > 0.1


@pytest.mark.parametrize(("name", "milliseconds"), [("d4", 0.085), ("d8", 0.51), ("d12", 2.20), ("d20", 9.26)])
def test_roofline_of_the_networks(name, milliseconds):
    assert throughput.roofline_ms(throughput.CASES[name].shape, throughput.FIXED) == pytest.approx(
        milliseconds, rel=0.01
    )


def test_rows_keep_failures_and_compare_with_the_best_of_each_peer():
    def result(ms: float) -> dict:
        return {"step_ms": ms, "peak_bytes": 2**30, "setup_s": 1.0, "first_loss": 8.3, "last_loss": 8.2}

    ceilings = {"flops": 700e12, "bytes": 3e12}
    measured = [
        ("sequential", 1, result(0.8)),
        ("jax", 64, result(64 * 0.3)),
        ("jax_cudnn", 64, result(64 * 0.2)),
        ("vmap", 64, {"error": "not done after 1 s"}),
        ("ours", 64, result(64 * 0.1)),
    ]
    rows = throughput.with_ratios([throughput.row_of("d4", *each, ceilings) for each in measured])
    assert len({tuple(row) for row in rows}) == 1  # one header for all
    ours = rows[-1]
    assert ours["vs_sequential"] == pytest.approx(8) and ours["vs_jax"] == pytest.approx(2)
    assert ours["vs_vmap"] == "" and rows[3]["error"] == "not done after 1 s"
    assert ours["tokens_per_s"] == pytest.approx(1024 / 0.1e-3)
    throughput.table_of("d4", throughput.rounded(rows))


def test_plot_and_plan(tmp_path):
    ceilings = {"flops": 700e12, "bytes": 3e12}
    result = {"step_ms": 6.4, "peak_bytes": 2**30, "setup_s": 1.0, "first_loss": 8.3, "last_loss": 8.2}
    rows = [throughput.row_of("d4", "ours", 64, result, ceilings)]
    throughput.draw({"d4": throughput.with_ratios(rows)}, tmp_path / "made" / "plot.png")
    assert (tmp_path / "made" / "plot.png").stat().st_size > 0
    work = throughput.plan(throughput.Options(networks="d8", peers="eager,vmap", replicas="2,4"))
    assert work == {"d8": [("eager", 1), ("vmap", 32), ("ours", 2), ("ours", 4)]}
    with pytest.raises(ValueError, match="--networks names 'd5', expected some of d4, d8, d12, d20"):
        throughput.plan(throughput.Options(networks="d5"))


def check_subjects(run, network, norms):
    """A subject is measured in every slot it has, and a second time in a used one."""
    corpus = invariance.masked_corpus(run, network.vocabulary)
    (alone,) = invariance.train(run, network, corpus, 1, [invariance.subject(run, 10)], CPU)
    assert np.isfinite(alone.losses).all() and len(alone.norms) == (10 if norms else 0)
    assert np.isfinite(alone.norms).all()
    # a CPU's bits are the same at the same width only
    again = list(invariance.train(run, network, corpus, 1, invariance.neighbours(run, 1, 10), CPU))
    assert [invariance.difference(alone, other) for other in again] == ["", ""]
    beside = list(invariance.train(run, network, corpus, 5, invariance.neighbours(run, 5, 10), CPU))
    assert sorted(other.slot for other in beside) == [0, 1, 2, 4]
    for other in beside:
        np.testing.assert_allclose(other.losses, alone.losses, rtol=1e-4)


@pytest.mark.parametrize("form", invariance.FORMS)
def test_a_subject_is_found_in_every_slot_and_has_its_bits_again_in_a_used_one(form):
    shape = {"depth": 1, "vocabulary": 320, "context": 16, "precision": "fp32"} | invariance.FORMS[form]
    shape |= {} if "y" in shape else {"batch": 8}
    run = resolve(make_config(**({"x": "tokens:log:2048:4096:2"} | shape)), "cpu")
    check_subjects(run, random_runs.network_of(run, CPU), norms=form == "clip")


@pytest.mark.parametrize(("name", "form"), [*zip(random_runs.SMALL, ["clip", "muon"] * 3, strict=True)])
def test_every_family_of_checkpoints_is_compared_alike(name, form, monkeypatch):
    monkeypatch.setattr(invariance, "CONTEXT", 16)
    run = invariance.run_of(name, "fp32", form, "cpu")
    network = random_runs.random_network(random_runs.small_network(name, 16, 32, 320), CPU)
    check_subjects(run, network.grouped_for(run), norms=form == "clip")


def test_one_changed_bit_is_a_difference():
    alone = invariance.Measured(0, np.float32([3, 2]), np.float32([1, 1]), 2.0, 7)
    assert invariance.difference(alone, alone._replace(slot=5)) == ""
    changed = np.nextafter(alone.losses, np.float32([3, 9]), dtype=np.float32)
    assert invariance.difference(alone, alone._replace(losses=changed)).startswith("losses, step 1")
    assert invariance.difference(alone, alone._replace(norms=alone.norms[:1])).startswith("norms: 1 steps")
    assert invariance.difference(alone, alone._replace(digest=8)).startswith("weights digest")


def test_slots_are_counted_and_their_time_adds_up():
    row = slots.measure(slots.Options(1, 320, 4, 4, 8, steps=40, span=20, batch=2, device="cpu"))
    assert row["runs"] == 4 * 8 and row["micro_steps"] >= 40
    assert 0.9 < row["busy"] <= 1
    parts = row["steps_s"] + row["held_out_s"] + row["rest_s"]
    assert parts == pytest.approx(row["total_s"], abs=0.01) and row["held_out_s"] > 0


def test_text_is_timed_and_compared(tmp_path):
    from engine.checkpoint import save_model

    config = GPTConfig(depth=1, width=16, heads=1, kv_heads=1, context=64, vocabulary=320)
    weights = {name: 10 * weight for name, weight in initial_weights(config, 0).items()}
    save_model(str(tmp_path / "m"), config, weights, ByteTokenizer())
    rows = text.measure(text.Options(model=str(tmp_path / "m"), tokens=8, replicas=3, device="cpu"))
    assert [row["replicas"] for row in rows] == [1, 1, 1, 3]
    assert [row["agree"] for row in rows] == [8, "", 8, 8]
    assert all(row["tokens"] == 8 and row["tokens_per_second"] > 0 for row in rows)
    assert text.agreeing([1, 2, 3], [1, 5, 3]) == 1


@pytest.mark.parametrize(
    "benchmark",
    [fractal, invariance, peers, power, profile_step, slots, text, throughput, tune],
    ids=lambda module: module.__name__.split(".")[1],
)
def test_without_a_gpu_a_benchmark_is_one_line(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "GPU" in fails(capsys, benchmark.main, "benchmark.py", [])


@pytest.mark.parametrize("module", [operators, elementwise, attention_tiles], ids=["operators", "elementwise", "tiles"])
def test_without_a_gpu_kernels_are_not_timed(module, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = (lambda: timing.run_benchmarks(module.BENCHMARKS, module.NAMES)) if hasattr(module, "NAMES") else module.main
    assert "GPU" in fails(capsys, run, "benchmark.py", [])


@pytest.mark.parametrize(
    ("benchmark", "words", "says"),
    [
        (slots, ["--slots", "0", "--device", "cpu"], "slots is 0, expected more than 0; change --slots"),
        (slots, ["--rows", "-1", "--device", "cpu"], "rows is -1"),
        (slots, ["--device", "tpu"], "device is 'tpu'; expected auto, cpu or cuda"),
        (text, ["--tokens", "0", "--device", "cpu"], "tokens is 0, expected more than 0; change --tokens"),
        (text, ["--model", "nowhere", "--device", "cpu"], "nowhere does not exist"),
        (peers, ["--replicas", "0", "--device", "cpu"], "replicas is 0"),
        (peers, ["--precision", "fp16", "--device", "cpu"], "precision is 'fp16', expected bf16 or fp32"),
        (peers, ["--peer", "flax"], "peer is 'flax'"),
        (profile_step, ["--replicas", "0"], "replicas is 0"),
        (invariance, ["--steps", "0"], "steps is 0"),
        (throughput, ["--replicas", "4,0"], "--replicas is '4,0', expected whole numbers above 0"),
        (throughput, ["--seconds", "0"], "seconds is 0"),
        (fractal, ["--ours", "0"], "argument --ours: got '0', expected a whole number above 0"),
        (fractal, ["--jax", "500"], "argument --jax: got '500', expected 0, at most 256, or a multiple of 256"),
        (fractal, ["--precisions", "fp8"], "argument --precisions: invalid choice: 'fp8'"),
    ],
)
def test_what_cannot_be_measured_is_one_line(benchmark, words, says, capsys):
    assert says in fails(capsys, benchmark.main, "benchmark.py", words)


def test_rows_measured_outside_a_checkout_are_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("COMMIT", raising=False)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "engine" / "provenance.py"))
    (tmp_path / "engine").mkdir()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
    path = timing.append_rows("rows.csv", [{"ms": 1}])
    timing.append_rows("rows.csv", [{"ms": 2}])
    rows = list(csv.DictReader(path.read_text("utf-8").splitlines()))
    assert [(row["gpu"], row["commit"], row["ms"]) for row in rows] == [("a GPU", "", "1"), ("a GPU", "", "2")]


def test_where_rows_cannot_be_written_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "none" / "results")
    with pytest.raises(ValueError, match="which cannot be written; run a copy of this project"):
        timing.ready()
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
    timing.ready()
    with pytest.raises(ValueError, match="asks no-such-program, which is not installed"):
        timing.ready("no-such-program")
