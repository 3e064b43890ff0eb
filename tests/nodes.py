"""Several Ray nodes on this machine that can be lost as machines are: all processes of one at once, without a goodbye.

Each node is a `ray start` of its own with an address of loopback, a working folder, temporary files and ports of its
own, and all of them ask for a token. What users share on a cluster, the tests share by absolute paths.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.local_head import free_port

RAY = str(Path(sys.executable).with_name("ray"))
_SETTINGS = {
    # The head asks every half a second whether a node still lives, so that a loss shows in seconds.
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    # A busy machine needs longer than Ray grants to bring up a node or a worker.
    "RAY_raylet_start_wait_time_s": "45",
    "RAY_worker_register_timeout_seconds": "150",
    # On nodes of few CPUs Ray would end every process that idles for a second, and start another for the next task.
    "RAY_num_workers_soft_limit": "16",
}
_PORTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port")
_START_TIMEOUT_S = 150.0
_START_ATTEMPTS = 4
"""Ray gives some processes of a node 15 s to come up, which a busy machine may not grant them."""


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        address: Its own on loopback.
        folder: Where its processes run, beside their temporary files in `folder/r`.
        process: `ray start --block`, the leader of a session that all of the node's processes belong to.
    """

    address: str
    folder: Path
    process: "subprocess.Popen[bytes]"

    def processes(self) -> list[psutil.Process]:
        """All processes of the node that live, the one that starts the others first."""
        return processes_of(self.process.pid)

    def workers(self, title: str) -> list[psutil.Process]:
        """The workers of the node that say of themselves, as Ray has them do, what they are at."""
        return [process for process in self.processes() if _title(process).startswith(f"ray::{title}")]


class Cluster:
    """A head and other nodes; made by `nodes`.

    Attributes:
        folder: Of the nodes' own folders; short, as names of sockets are limited to about a hundred characters.
        nodes: Those that live, the head first.
        address: Of the head, for drivers.
        environment: Of a driver, as a user would set it.
    """

    def __init__(self, folder: Path, *, cpus: float) -> None:
        self.folder, self._cpus = folder, cpus
        self.nodes: list[Node] = []
        self._num_started = 0
        # Later ones than 127.0.0.1, which Ray takes for a machine's address on its network.
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
        """The node that drivers run on."""
        return self.nodes[0]

    def add_node(self, *, gpus: int = 0) -> Node:
        """Starts a node, the head if there is none, and waits until the cluster counts it.

        Args:
            gpus: That it promises to Ray, whatever this machine has.
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
        """Ends all processes of a node at once, as when its power goes."""
        kill_session(node.process)
        self.nodes.remove(node)

    def alive(self) -> dict[str, str]:
        """The nodes that the cluster counts: address → the beginning of the id that log lines have."""
        done = self.run([sys.executable, "-c", _LIST_NODES])
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def run(self, command: Sequence[str], *, timeout_s: float = 200) -> "subprocess.CompletedProcess[str]":
        """Runs a driver to its end."""
        return subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=timeout_s
        )

    @contextlib.contextmanager
    def started(self, command: Sequence[str], output: Path) -> "Iterator[subprocess.Popen[bytes]]":
        """Starts a driver; whatever is left of it at the end of the `with` is killed.

        Args:
            command: Its words.
            output: The file for what it prints.
        """
        with output.open("wb") as file:
            driver = subprocess.Popen(
                command, env=self.environment, cwd=self.folder, stdout=file, stderr=file, start_new_session=True
            )
        try:
            yield driver
        finally:
            kill_session(driver)

    def _is_up(self, node: Node) -> bool:
        log = Path(node.folder, "ray.out")
        wait_until(
            lambda: b"Ray runtime started" in log.read_bytes() or _has_failed(node),
            log.read_text,
            timeout_s=_START_TIMEOUT_S,
        )
        return not _has_failed(node)


def _has_failed(node: Node) -> bool:
    """Whether a node that is being started has ended, or its raylet, for which `ray start` would wait on and on."""
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
    """A cluster for the time of a `with`; nothing of it is left, whatever happens inside.

    Args:
        num_nodes: The head counted.
        cpus: Of each node.
        folder: An empty one with a short path.
    """
    cluster = Cluster(folder, cpus=cpus)
    try:
        for _ in range(num_nodes):
            cluster.add_node()
        yield cluster
    finally:
        for node in cluster.nodes:
            kill_session(node.process)


def processes_of(leader: int) -> list[psutil.Process]:
    """The processes of a session that live, by its leader's id."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return sorted(found, key=lambda process: process.pid != leader)


def kill_session(leader: "subprocess.Popen[bytes]") -> None:
    """Kills a process that leads a session, and all that are in it, until none is left."""
    own = processes_of(leader.pid)
    while own:
        # Groups first: one call each, so that hardly any process sees another one die.
        for group in {_group(process.pid) for process in own} - {None, os.getpgrp()}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(group or 0), signal.SIGKILL)
        for process in own:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(own, timeout=10)
        own = processes_of(leader.pid)
    leader.wait()


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def wait_until(is_so: Callable[[], bool], explain: Callable[[], str], *, timeout_s: float = 150) -> None:
    """Looks again and again; fails with what `explain` says when it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.02)
