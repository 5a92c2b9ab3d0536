"""A real SLURM cluster of two nodes on one machine: slurmctld and two slurmd, each in a network namespace of its own.

The namespaces hang on one bridge, so that a node can be lost. Each daemon also has its own host name, and its own
view of /etc/hosts; nothing outside the given folder and the namespaces is touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from bigbag.cli import main

ROOT = Path(__file__).parents[2]
_DAEMONS = ("slurmctld", "slurmd", "munged", "ip", "nsenter", "unshare")
_NODES = (1, 2)


def why_not() -> str:
    """Why there can be no cluster here; empty where there can."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [name for name in _DAEMONS if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: slurmctld slurmd slurm-client munge iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True)
    return "" if probe.returncode == 0 else f"no namespaces here: {probe.stderr.strip()}"


class Cluster:
    """slurmctld on 10.77.0.1, nodes node1 and node2; partition "low" (default) makes room for "high" by requeueing.

    Args:
        folder: where state, logs and sockets go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"bb{os.getpid() % 100000}"
        self.environment = {
            **os.environ,
            "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def __enter__(self) -> Cluster:
        try:
            self._make_network()
            self._write_settings()
            self._start_daemons()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for space in self._spaces:
            self._kill(space)
            self._call("ip", "netns", "del", space, check=False)

    def submit(self, *arguments: str | Path, cwd: Path, **environment: str) -> str:
        """sbatch; returns the number of the job."""
        command = ["sbatch", "--parsable", *map(str, arguments)]
        return self._inside(self._control, *command, cwd=cwd, environment=environment).strip()

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """What a command says that runs where SLURM's commands do."""
        return self._inside(self._control, *command, cwd=cwd)

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        fields = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, what: str, condition: Callable[[], bool], seconds: float = 240) -> None:
        """Wait until ``condition`` holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {seconds} s\n{self.logs()}")
            time.sleep(0.2)

    def wait_for_end(self, number: str, seconds: float = 240) -> str:
        """Wait until a job has ended; returns its state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait(f"end of job {number}", lambda: self.job(number)["JobState"] in ended, seconds)
        return self.job(number)["JobState"]

    def lose(self, node: int) -> None:
        """A node loses its power: the network goes first, so that nobody hears its processes end."""
        self._link(node, "down")
        self._kill(f"{self.name}n{node}")

    def bring_back(self, node: int) -> None:
        """A lost node starts again, with nothing of its jobs.

        Were its old step still running, slurmctld would have it ended when the node registers, and with it the new
        step of the same number, should that be there already.
        """
        self._link(node, "up")
        self._start_node(node)

    def logs(self) -> str:
        """The ends of the daemons' logs, for a failure's message."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))

    @property
    def _control(self) -> str:
        return f"{self.name}c"

    @property
    def _spaces(self) -> list[str]:
        return [*(f"{self.name}n{i}" for i in _NODES), self._control]

    def _make_network(self) -> None:
        control = self._control
        for space in self._spaces:
            self._call("ip", "netns", "add", space)
            self._call("ip", "-n", space, "link", "set", "lo", "up")
        self._call("ip", "-n", control, "link", "add", "br0", "type", "bridge")
        self._call("ip", "-n", control, "addr", "add", "10.77.0.1/24", "dev", "br0")
        self._call("ip", "-n", control, "link", "set", "br0", "up")
        for i in _NODES:
            node, port = f"{self.name}n{i}", f"port{i}"
            peer = ["type", "veth", "peer", "name", "eth0", "netns", node]
            self._call("ip", "-n", control, "link", "add", port, *peer)
            self._call("ip", "-n", control, "link", "set", port, "master", "br0", "up")
            self._call("ip", "-n", node, "addr", "add", f"10.77.0.1{i}/24", "dev", "eth0")
            self._call("ip", "-n", node, "link", "set", "eth0", "up")

    def _write_settings(self) -> None:
        folder = self.folder
        for name in ("state", "munge", "spool/node1", "spool/node2"):
            (folder / name).mkdir(parents=True)
        (folder / "munge").chmod(0o700)
        (folder / "munge/key").write_bytes(os.urandom(128))
        (folder / "munge/key").chmod(0o600)
        hosts = "".join(f"10.77.0.1{i} node{i}\n" for i in _NODES)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n10.77.0.1 control\n{hosts}")
        (folder / "cgroup.conf").write_text("# no control groups\n")
        cores = os.cpu_count()
        (folder / "slurm.conf").write_text(
            f"""ClusterName=bigbag
SlurmctldHost=control(10.77.0.1)
SlurmUser=root
AuthType=auth/munge
# A requeued job may start once its credential has run out: 5 s is the least that slurmctld accepts.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=5
SlurmdTimeout=10
{"".join(f"NodeName=node{i} NodeAddr=10.77.0.1{i} CPUs={cores} RealMemory=4000{chr(10)}" for i in _NODES)}\
PartitionName=low Nodes=node[1-2] Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=node[1-2] MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""
        )

    def _start_daemons(self) -> None:
        munge, folder = self.folder / "munge", self.folder
        files = [f"--{name}-file={munge / name}" for name in ("key", "log", "seed", "pid")]
        self._inside(self._control, "munged", "--force", f"--socket={folder}/munge.sock", *files)
        self._start(self._control, "control", "slurmctld -i")
        for i in _NODES:
            self._start_node(i)
        self.wait(
            "both nodes idle", lambda: self.run("sinfo", "-h", "-p", "low", "-o", "%D %T").split() == ["2", "idle"], 60
        )

    def _start_node(self, node: int) -> None:
        self._start(f"{self.name}n{node}", f"node{node}", f"slurmd -N node{node}")

    def _link(self, node: int, state: str) -> None:
        self._call("ip", "-n", f"{self.name}n{node}", "link", "set", "eth0", state)

    def _kill(self, space: str) -> None:
        pids = self._call("ip", "netns", "pids", space, check=False).split()
        if pids:
            self._call("kill", "-9", *pids, check=False)

    def _start(self, space: str, host: str, daemon: str) -> None:
        script = f"hostname {host} && mount --bind {self.folder}/hosts /etc/hosts && exec {daemon}"
        self._inside(space, "unshare", "--uts", "--mount", "sh", "-c", script)

    def _inside(self, space: str, *command: str, cwd: Path | None = None, environment: dict | None = None) -> str:
        return self._call("nsenter", f"--net=/run/netns/{space}", *command, cwd=cwd, environment=environment)

    def _call(self, *command: str, cwd: Path | None = None, environment: dict | None = None, check: bool = True) -> str:
        done = subprocess.run(
            command,
            env={**self.environment, **(environment or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}")
        return done.stdout


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Both nodes idle; skips where there can't be one."""
    reason = why_not()
    if reason:
        pytest.skip(f"SLURM: {reason}")
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """A packed set of small digit slides, and the config of a run on them; `name` is for the test to set."""
    folder = tmp_path_factory.mktemp("digits")
    source = {
        "name": "digits",
        "num_train": 12,
        "num_val": 6,
        "num_test": 6,
        "min_instances": 100,
        "max_instances": 200,
    }
    settings = {
        "name": "unnamed",
        "out": str(folder / "runs"),
        "data": {
            "shards": str(folder / "shards"),
            "source": {**source, "witness_rate": [0.03, 0.05], "large_fraction": 1.0},
            "num_workers": 0,
        },
        "model": {
            "name": "ABMIL",
            "att_dim": 8,
            "feat_ext": {"name": "MLP", "linear_sizes": [8], "activations": ["relu"]},
        },
        "optim": {"lr": 0.01},
        "train": {"epochs": 40, "batch_bags": 4},
        "engine": {"threads": 1},
        "report": {"num_slides": 1},
    }
    config = folder / "digits.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert main(["pack", "--config", str(config)]) == 0
    return config


@pytest.fixture(scope="session")
def job() -> list[str | Path]:
    """sbatch's arguments for launch/slurm/train.sbatch on this cluster: two nodes, one rank each, no GPU."""
    resources = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=30"]
    return [*resources, ROOT / "launch/slurm/train.sbatch"]


@pytest.fixture(scope="session")
def python() -> dict[str, str]:
    """What launch/slurm/*.sbatch read from the environment."""
    return {"PYTHON": sys.executable}
