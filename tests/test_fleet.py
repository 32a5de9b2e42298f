"""One sweep over the nodes of a Ray cluster that come and go, and over jobs of SLURM."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny import arrays, assert_equal_bits, sweep

from engine import fleet
from engine.config import make_config
from engine.leases import FOLDER
from engine.outcome import DONE
from engine.store import open_store

AXES = {"y": "lr.0:log:1e-1:1e5:24", "x": "lr.1:log:1e-1:1e5:16", "steps": 500}
FLAGS = ["--network", "two_layer", "--device", "cpu", "--rows-per-launch", "1", "--quiet", "--lease-seconds", "2"]
FLAGS += [word for name, value in AXES.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same sweep by one process."""
    return arrays(sweep(make_config("two_layer", **AXES), tmp_path_factory.mktemp("alone") / "s"))


# Ray's and submitit's own processes and sockets outlive the objects that hold them
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_nodes_of_a_ray_cluster_join_and_are_lost_and_the_store_is_that_of_one(tmp_path, alone):
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="needs ray (the extra `fleet`)")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    path = tmp_path / "s"
    node = cluster.add_node(num_cpus=1)
    # Ray starts nodes in the main thread only, so the command has another
    with ThreadPoolExecutor() as pool:
        words = ["--ray", cluster.address, "--at-most", "2", "--store", str(path), *FLAGS]
        command = pool.submit(fleet.main, words)
        while not path.exists() or not (open_store(path).status == DONE).any():
            assert not command.done(), command.result()
            time.sleep(0.05)
        node.kill_all_processes(check_alive=False, allow_graceful=False)
        assert not (open_store(path).status == DONE).all(), "the first node was not lost before the end"
        cluster.add_node(num_cpus=1)
        command.result()
    cluster.shutdown()
    assert_equal_bits(arrays(open_store(path)), alone)
    assert not (path / FOLDER).exists()


def test_jobs_of_slurm_make_the_store_of_one_and_a_preempted_one_is_queued_as_it_was(tmp_path, alone):
    pytest.importorskip("submitit", reason="needs submitit (the extra `fleet`)")
    path = tmp_path / "s"
    drawn: list[Path] = []

    def finish(store: Path, tracked: bool) -> dict:
        drawn.append(store)
        return {}

    fleet.main(["--slurm", "local", "--at-most", "2", "--store", str(path), *FLAGS], finish=finish)
    assert_equal_bits(arrays(open_store(path)), alone)
    assert drawn == [path]
    order = fleet.Order(os.getcwd(), FLAGS, 2)
    again = fleet.Work().checkpoint(order)
    assert isinstance(again.function, fleet.Work)
    assert again.args == (order,)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "got no scheduler; expected --ray ADDRESS or --slurm PARTITION"),
        (["--ray", "auto", "--slurm", "gpu"], "got --ray and --slurm"),
        (["--ray", "auto", "--at-most", "0"], "at_most is 0; expected at least 1"),
        (["--slurm", "local", "--y", "lr:log:1:2"], "axis"),
    ],
)
def test_what_cannot_be_done_is_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        fleet.main(words)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
