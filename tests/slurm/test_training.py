"""launch/slurm/train.sbatch on a real cluster: pre-emption, a lost node, a warning signal; always the same results."""

import json
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def runs(config: Path) -> Path:
    return Path(yaml.safe_load(config.read_text())["out"])


def steps(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
    return [line["step"] for line in lines if line["kind"] == "train"]


class Run:
    """A submitted job and the run's folder."""

    def __init__(self, cluster, job, digits, python, name: str) -> None:
        self.cluster, self.folder = cluster, runs(digits) / name
        self.output = digits.parent / f"{name}.out"
        arguments = [f"--output={self.output}", *job, "--config", digits, f"name={name}"]
        self.number = cluster.submit(*arguments, cwd=ROOT, **python)

    def wait_for_step(self, step: int) -> None:
        self.cluster.wait(f"step {step}\n{self.text()}", lambda: step in steps(self.folder))
        assert not (self.folder / "results.json").exists(), "the run was over before it could be disturbed"

    def finish(self) -> bytes:
        state = self.cluster.wait_for_end(self.number)
        assert state == "COMPLETED", f"{state}\n{self.text()}\n{self.cluster.logs()}"
        assert steps(self.folder) == list(range(120)), "each step once, none left out"
        return (self.folder / "results.json").read_bytes()

    def restarts(self) -> int:
        return int(self.cluster.job(self.number)["Restarts"])

    def text(self) -> str:
        return self.output.read_text() if self.output.is_file() else ""


@pytest.fixture(scope="module")
def start(cluster, job, digits, python):
    return lambda name: Run(cluster, job, digits, python, name)


@pytest.fixture(scope="module")
def undisturbed(start) -> bytes:
    """results.json of a run that nobody disturbs."""
    run = start("undisturbed")
    results = run.finish()
    assert run.restarts() == 0
    assert json.loads(results)["test"]["num_bags"] == 6
    return results


def test_a_pre_empted_job_saves_and_comes_back(cluster, start, undisturbed, tmp_path):
    run = start("preempted")
    run.wait_for_step(20)
    urgent = cluster.submit(
        "--partition=high", "--nodes=2", "--ntasks=2", "--exclusive", "--wrap=sleep 1", cwd=tmp_path
    )
    assert cluster.wait_for_end(urgent) == "COMPLETED"
    assert run.finish() == undisturbed
    assert run.restarts() == 1
    assert "asked to leave: a checkpoint is written" in run.text()


def test_a_job_whose_time_is_nearly_up_saves_and_comes_back(cluster, start, undisturbed):
    run = start("warned")
    run.wait_for_step(20)
    cluster.run("scancel", "--signal=USR1", run.number)
    assert run.finish() == undisturbed
    assert run.restarts() == 1


def test_a_lost_node_requeues_the_job(cluster, start, undisturbed):
    run = start("lost")
    run.wait_for_step(20)
    cluster.lose(2)
    cluster.wait("node2 down", lambda: "down" in cluster.run("sinfo", "-h", "-n", "node2", "-o", "%T"))
    cluster.bring_back(2)
    assert run.finish() == undisturbed
    assert run.restarts() == 1


def test_an_error_ends_the_job(cluster, job, digits, python):
    output = digits.parent / "error.out"
    arguments = [f"--output={output}", *job, "--config", digits, "name=error", "model.att_dim=0.5"]
    number = cluster.submit(*arguments, cwd=ROOT, **python)
    assert cluster.wait_for_end(number) == "FAILED"
    assert cluster.job(number)["Restarts"] == "0"
    assert "att_dim" in output.read_text()
