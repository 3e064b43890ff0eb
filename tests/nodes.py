"""Several Ray nodes on this machine that can fail like machines: all processes of a node are killed together.

Each node is a separate `ray start` with its own loopback address, working folder, temporary files and ports. All nodes
require a token. The tests use absolute paths as the storage that nodes of a cluster share.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.drivers import kill_session, processes_of, started, wait_until
from tests.local_head import free_port

RAY = str(Path(sys.executable).with_name("ray"))
_SETTINGS = {
    # Frequent health checks, so that the head detects the loss of a node within seconds.
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    # A busy machine needs more time to start a node or a worker than Ray allows by default.
    "RAY_raylet_start_wait_time_s": "45",
    "RAY_worker_register_timeout_seconds": "150",
    # On nodes with few CPUs Ray would kill processes after one idle second and start new ones for the next task.
    "RAY_num_workers_soft_limit": "16",
}
_PORTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port")
_START_TIMEOUT_S = 150.0
_START_ATTEMPTS = 4
"""Ray allows some processes of a node only 15 s to start, which can be too short on a busy machine."""


@dataclass(frozen=True)
class Node:
    """One Ray node.

    Attributes:
        address: Loopback address of the node.
        folder: Working folder of its processes; their temporary files are in `folder/r`.
        process: `ray start --block`, the session leader of all processes of the node.
    """

    address: str
    folder: Path
    process: "subprocess.Popen[bytes]"

    def processes(self) -> list[psutil.Process]:
        """Return all live processes of the node, `ray start` first."""
        return processes_of(self.process.pid)

    def workers(self, title: str) -> list[psutil.Process]:
        """Return the node's Ray workers with this process title, which names their current task or actor."""
        return [process for process in self.processes() if _title(process).startswith(f"ray::{title}")]


class Cluster:
    """A head and other nodes; created by `nodes`.

    Attributes:
        folder: Parent of the nodes' folders; a short path, because socket names are limited to about 100 characters.
        nodes: Live nodes, the head first.
        address: Address of the head, for drivers.
        environment: Environment of a driver, as a user would set it.
    """

    def __init__(self, folder: Path, *, cpus: float) -> None:
        self.folder, self._cpus = folder, cpus
        self.nodes: list[Node] = []
        self._num_started = 0
        # Node addresses start at 127.0.0.2, because Ray replaces 127.0.0.1 by the machine's network address.
        self.address = ""
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            **_SETTINGS,
        }

    @property
    def head(self) -> Node:
        """The node on which drivers run."""
        return self.nodes[0]

    def add_node(self, *, gpus: int = 0) -> Node:
        """Start a node, the head if there is none yet, and wait until it has joined the cluster.

        Args:
            gpus: Number of GPUs to announce to Ray, regardless of the hardware.
        """
        for _ in range(_START_ATTEMPTS):
            node = self._start_node(gpus)
            self.nodes.append(node)
            if self._is_up(node):
                return node
            self.kill_node(node)
        raise AssertionError(Path(node.folder, "ray.out").read_text())

    def _start_node(self, gpus: int) -> Node:
        number = self._num_started + 2
        self._num_started += 1
        address, folder = f"127.0.0.{number}", self.folder / f"n{number}"
        folder.mkdir()
        role = [f"--address={self.address}"]
        if not self.nodes:
            self.address = self.environment["RAY_ADDRESS"] = f"{address}:{free_port()}"
            role = ["--head", f"--port={self.address.split(':')[1]}", "--include-dashboard=false"]
            role += ["--no-monitor", f"--ray-client-server-port={free_port()}"]
        command = [RAY, "start", *role, "--block", "--disable-usage-stats", f"--num-cpus={self._cpus:g}"]
        command += [f"--node-ip-address={address}", f"--temp-dir={folder}/r", "--object-store-memory=100000000"]
        command += ["--include-log-monitor=false", f"--num-gpus={gpus}"]
        command += [f"--{name}={free_port()}" for name in _PORTS]
        environment = {name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"}
        with Path(folder, "ray.out").open("wb") as output:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        return Node(address, folder, process)

    def kill_node(self, node: Node) -> None:
        """Kill all processes of a node together, as in a power failure."""
        kill_session(node.process)
        self.nodes.remove(node)

    def alive(self) -> dict[str, str]:
        """Return the live nodes of the cluster: address → start of the node id, as in log lines."""
        done = self.run([sys.executable, "-c", _LIST_NODES])
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def run(self, command: Sequence[str], *, timeout_s: float = 200) -> "subprocess.CompletedProcess[str]":
        """Run a driver until it exits."""
        return subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=timeout_s
        )

    @contextlib.contextmanager
    def started(self, command: Sequence[str], output: Path) -> "Iterator[subprocess.Popen[bytes]]":
        """Context manager: start a driver, and kill its remaining processes at the end of the block.

        Args:
            command: Words of the command.
            output: File for its output.
        """
        with started(command, output, env=self.environment, cwd=self.folder) as driver:
            yield driver

    def _is_up(self, node: Node) -> bool:
        log = Path(node.folder, "ray.out")
        wait_until(
            lambda: b"Ray runtime started" in log.read_bytes() or _has_failed(node),
            log.read_text,
            timeout_s=_START_TIMEOUT_S,
        )
        return not _has_failed(node)


def _has_failed(node: Node) -> bool:
    """Return True if a starting node or its raylet has exited; `ray start` would wait for the raylet forever."""
    logs = node.folder.glob("r/session_latest/logs/raylet.out")
    return node.process.poll() is not None or any(b"Check failed" in log.read_bytes() for log in logs)


_LIST_NODES = """
import json
import ray
ray.init(log_to_driver=False, logging_level="ERROR")
print(json.dumps([(node["NodeManagerAddress"], node["NodeID"][:8]) for node in ray.nodes() if node["Alive"]]))
"""


@contextlib.contextmanager
def nodes(num_nodes: int, *, cpus: float, folder: Path) -> Iterator[Cluster]:
    """Context manager: run a cluster while the block runs, and kill all its processes afterwards.

    Args:
        num_nodes: Number of nodes, including the head.
        cpus: CPUs of each node.
        folder: Empty folder with a short path.
    """
    cluster = Cluster(folder, cpus=cpus)
    try:
        for _ in range(num_nodes):
            cluster.add_node()
        yield cluster
    finally:
        for node in cluster.nodes:
            kill_session(node.process)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
