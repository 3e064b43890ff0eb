"""The Ray cluster a job runs on: connecting or starting it, sharing it out, hearing from its workers."""

import contextlib
import logging
import os
import re
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import ray
from ray._private import ray_constants, ray_logging
from ray._private.state import available_resources_per_node
from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydet.common.errors import RunError, RunStopped, UserError
from raydet.common.signals import STOPPED, ending_on_sigterm
from raydet.tables import storage

LOG_FILE = "ray.log"
IDLE_PROCESSES_KEPT = 16
"""On a node of a cluster that is started here."""
_REMARKS = logging.getLogger("ray.remarks")
"""For Ray's log. `ray` itself passes on nothing below an error once Ray has been asked to be quiet."""
_REMARKS.setLevel(logging.WARNING)
START_ATTEMPTS = 3
"""At starting a cluster on this machine."""
SECONDS_TO_ANSWER = 10.0
"""For the head of a cluster that is named."""


@dataclass(frozen=True)
class Resources:
    """What the cluster offers and how a job shares it out.

    Attributes:
        num_gpus: In the whole cluster.
        use_gpu: Whether each worker gets one.
        cpus_per_worker: Reserved for each worker.
        cpus_per_task: What a decoding task asks for.
        remark: A line for the terminal, where GPUs and workers do not go together.
    """

    num_gpus: float
    use_gpu: bool
    cpus_per_worker: float
    cpus_per_task: float
    remark: str = ""

    def describe(self, min_workers: int, max_workers: int) -> str:
        """A few words for the terminal."""
        number = f"{max_workers}" if min_workers == max_workers else f"{min_workers} to {max_workers}"
        gpu = " and 1 GPU each" if self.use_gpu else " each, no GPU"
        return f"{number} worker{'s' if max_workers > 1 else ''} with {self.cpus_per_worker:g} CPU{gpu}"


@contextlib.contextmanager
def session(log_uri: str, address: str | None = None) -> Iterator[None]:
    """Connects to a cluster, or starts one on this machine, for the time of a `with`; SIGTERM ends what is inside.

    Inside another session it changes nothing, so that jobs can be strung together on one cluster.

    Args:
        log_uri: Folder for `ray.log`, with what Ray itself has to say; where it is not local, that is dropped.
        address: Of the cluster; "local" starts one. By default RAY_ADDRESS says it, and without that one is started.

    Raises:
        RunError: There is no such cluster, or none can be started.
        RunStopped: SIGTERM has come, as `ray job stop` sends it.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with _chatter_to(log_uri), ending_on_sigterm():
        _connect(address)
        try:
            with ending_on_sigterm():  # once more: Ray has put its own handler in place
                yield
        finally:
            ray.shutdown()


def _connect(address: str | None) -> None:
    named = address or f"RAY_ADDRESS {os.environ.get('RAY_ADDRESS')}"
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        # Ray ends processes that idle for a second when there are more than CPUs. Stages that ask for a fraction of
        # one are many, and a new process needs seconds of work before its first task.
        options["_system_config"] = {"num_workers_soft_limit": IDLE_PROCESSES_KEPT}
    else:
        _refuse_silence(address, named)
    attempts_left = START_ATTEMPTS if address == "local" else 1
    ray_logging.stdout_deduplicator.skip_re = cast("re.Pattern[str]", _IntoTheLog())
    while True:
        attempts_left -= 1
        try:
            with _on_loopback() if address == "local" else contextlib.nullcontext():
                ray.init(**options)
            return
        except SystemExit:  # Ray's own handler of SIGTERM
            raise RunStopped(STOPPED) from None
        except Exception as error:  # Ray raises plain ones, too
            reason = " ".join(str(error).split())[:300]
            if not attempts_left:
                is_own = address == "local"
                what = "Ray did not start on this machine" if is_own else f"cannot connect to Ray at {named}"
                raise RunError(f"{what}: {reason}") from error
            # Its processes have some seconds each to come up, which a busy machine may not grant them.
            _REMARKS.warning("Ray did not start, trying again: %s", reason)
            ray.shutdown()


def _refuse_silence(address: str, named: str) -> None:
    """Makes sure that something answers at HOST:PORT, for which Ray itself would wait more than five minutes."""
    host, colon, port = address.removeprefix("ray://").partition("/")[0].rpartition(":")
    if "://" in host or not colon or not port.isdecimal():
        return  # auto, or the folder of a session: Ray knows where it is
    deadline = time.monotonic() + SECONDS_TO_ANSWER
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_ANSWER).close()
            return
        except (OSError, OverflowError, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"cannot connect to Ray at {named}: {getattr(error, 'strerror', None) or error}; is the head "
                    "running, and is this the port that its `ray start --port` names (6379 by default)?"
                ) from None
            time.sleep(0.5)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A cluster that is started inside listens on 127.0.0.1 alone, and its token can be read by this user alone.

    Ray takes 127.0.0.1 for an oversight and puts the machine's own address in its place, and then its processes listen
    on all addresses, unless clusters of several machines are switched off, as they are on Windows and macOS.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # for the processes of the cluster
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR]
        with contextlib.suppress(OSError):
            (Path.home() / ".ray" / "auth_token").chmod(0o600)


class _LogHandler(logging.StreamHandler[TextIO]):
    """Writes what can be written: a full disk is told of once, by the run, and not by a traceback for every line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Nothing."""


class _IntoTheLog:
    """In the place of a pattern of lines not to print: what Ray remarks on its processes and nodes goes to its log."""

    def search(self, line: str) -> bool:
        """Says of every line that it is not to be printed."""
        _REMARKS.warning(line)
        return True


@contextlib.contextmanager
def _chatter_to(log_uri: str) -> Iterator[None]:
    """Sends what Ray's processes, its C++ part and its loggers print to a file; Python's own stderr stays a screen."""
    path = os.devnull
    if storage.is_local(log_uri):
        storage.make_folder(log_uri)
        path = storage.resolve(storage.join(log_uri, LOG_FILE))[1]
    screen = os.dup(2)
    python_stderr = sys.stderr
    with Path(path).open("a") as log, os.fdopen(screen, "w", closefd=False) as stderr, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"ray\.")
        # What Ray Data will have instead for the number of retries is not there yet.
        warnings.filterwarnings("ignore", message="`ray_remote_args_fn` is deprecated")
        handler = _LogHandler(log)
        handler.setLevel(logging.INFO)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        for name in ("ray", "ray.data", "ray.train", "ray.tune"):
            logging.getLogger(name).handlers = [handler]
            logging.getLogger(name).propagate = False
        os.dup2(log.fileno(), 2)
        if python_stderr.isatty() or python_stderr is sys.__stderr__:
            sys.stderr = stderr
        try:
            yield
        finally:
            os.dup2(screen, 2)
            sys.stderr = python_stderr
    os.close(screen)


def resources_of_nodes() -> list[dict[str, float]]:
    """What each node that is alive offers in all, by Ray's names (CPU, GPU, memory, …)."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def share_out(*, min_workers: int, max_workers: int, use_gpu: bool | None, cpus_per_worker: float | None) -> Resources:
    """Divides the cluster between the workers that compute and the tasks that decode.

    Half of the CPUs go to the workers, unless told otherwise, so that decoding can never be starved of all of them;
    fractions keep two CPUs from a deadlock.
    """
    nodes = resources_of_nodes()
    total_cpus = sum(node.get("CPU", 0.0) for node in nodes)
    largest_node = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
    num_gpus = sum(node.get("GPU", 0.0) for node in nodes)
    # One node with CPUs that nobody else lent us is this machine; to a cluster nodes may yet be added.
    if len(nodes) == 1 and total_cpus and os.environ.get("RAY_ADDRESS", "") in ("", "local"):
        _refuse_what_is_not_there(min_workers, use_gpu, cpus_per_worker, total_cpus, num_gpus)
    if cpus_per_worker is None:
        cpus_per_worker = max(min(total_cpus / 2 / max_workers, max(largest_node / 2, 0.5)), 0.1)
        if use_gpu or (use_gpu is None and num_gpus >= min_workers):
            # A worker must fit onto a node with a GPU, beside those for the node's other GPUs.
            room = [node.get("CPU", 0.0) / node["GPU"] for node in nodes if node.get("GPU", 0.0) >= 1]
            cpus_per_worker = min([cpus_per_worker, *(max(share / 2, 0.1) for share in room)])
        if cpus_per_worker > 1:
            cpus_per_worker = float(int(cpus_per_worker))
    left = total_cpus - cpus_per_worker * max_workers
    return Resources(
        num_gpus=num_gpus,
        use_gpu=num_gpus >= min_workers if use_gpu is None else use_gpu,
        cpus_per_worker=cpus_per_worker,
        cpus_per_task=1.0 if left >= 4 else 0.5,
        remark=_remark(min_workers, use_gpu, num_gpus),
    )


def _remark(num_workers: int, use_gpu: bool | None, num_gpus: float) -> str:
    if use_gpu and num_gpus < num_workers:
        return (
            f"--use-gpu with {num_workers} workers needs as many GPUs, the cluster has {num_gpus:g}: they wait "
            "until it has grown"
        )
    if use_gpu is None and 0 < num_gpus < num_workers:
        return (
            f"no GPU is used: {num_workers} workers would need as many, the cluster has {num_gpus:g}; lower "
            "--num-workers to use them"
        )
    return ""


def workers_that_fit(resources: Resources) -> int:
    """Workers that the nodes that are alive have room for, with as many CPUs left as one decoding task asks for.

    What other jobs hold counts as room: Ray says what is taken but not by whom, and this job's own workers, just lost
    or still running, are among those that hold it. Where others do, workers wait for them, as all jobs do for CPUs.
    """
    nodes = resources_of_nodes()
    total_cpus = sum(node.get("CPU", 0.0) for node in nodes)
    fitting = 0
    for node in nodes:
        by_cpus = int(node.get("CPU", 0.0) / resources.cpus_per_worker + 1e-9)
        fitting += min(by_cpus, int(node.get("GPU", 0.0))) if resources.use_gpu else by_cpus
    while fitting and total_cpus - fitting * resources.cpus_per_worker < resources.cpus_per_task - 1e-9:
        fitting -= 1
    return fitting


def cpus_for_tasks(resources: Resources) -> float:
    """CPUs that a decoding task may ask for beside workers that hold theirs; 0 where no node has as many left.

    All workers may fit onto fewer nodes than they were shared out over, as when one was lost: tasks that ask for what
    the workers hold would wait for ever, and the workers for them.
    """
    free = max((node.get("CPU", 0.0) for node in available_resources_per_node().values()), default=0.0)
    return resources.cpus_per_task if free >= resources.cpus_per_task - 1e-9 else 0.0


def note_own_group(uri: str) -> None:
    """Writes down, in a worker of a training, where `free_noted_group` finds what it holds of the cluster."""
    group = ray.util.get_current_placement_group()
    if group is not None:
        storage.write_bytes(uri, group.id.hex().encode())


def free_noted_group(uri: str) -> None:
    """Gives back what the workers of a training hold whose own process has ended.

    Of a process that was killed or lost Ray itself would do so at the end of the job alone, and for a trial that is the
    end of the whole search; Ray Train's cleaner does it only where there is a dashboard, and does not outlive its node.
    What is given back already, or is of another cluster, is no matter.
    """
    if storage.exists(uri):
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(storage.read_bytes(uri).decode()))))


def _refuse_what_is_not_there(
    num_workers: int, use_gpu: bool | None, cpus_per_worker: float | None, total_cpus: float, num_gpus: float
) -> None:
    if use_gpu and num_gpus < num_workers:
        raise UserError(
            f"--use-gpu with {num_workers} workers needs as many GPUs, this machine has {num_gpus:g}; lower "
            "--num-workers, or leave --use-gpu out"
        )
    if cpus_per_worker and cpus_per_worker * num_workers > total_cpus - 0.5:
        raise UserError(
            f"{num_workers} workers of {cpus_per_worker:g} CPUs leave none of this machine's {total_cpus:g} to decode "
            "with; lower --cpus-per-worker or --num-workers"
        )


def open_board() -> Any:
    """A board on the node of this process, with which it ends anyway; on another it could be lost."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


@ray.remote(num_cpus=0)
class Board:
    """A notice board: workers pin entries to it and show how far they are; the driver reads it and may ask to stop."""

    def __init__(self) -> None:
        self._entries: list[Any] = []
        self._progress: dict[str, Any] = {}
        self._is_to_stop = False

    def pin(self, entry: Any) -> None:
        """Adds an entry that stays."""
        self._entries.append(entry)

    def show(self, progress: dict[str, Any] | None = None) -> bool:
        """Says how far the work is; only the newest counts. Returns whether the driver asks to stop."""
        if progress is not None:
            self._progress = progress
        return self._is_to_stop

    def ask_to_stop(self) -> bool:
        """Has the workers save what they have and end; returns whether they have shown any progress yet."""
        self._is_to_stop = True
        return bool(self._progress)

    def read(self, start: int) -> tuple[list[Any], dict[str, Any]]:
        """The entries from number `start` on, and how far the work is."""
        return self._entries[start:], self._progress
