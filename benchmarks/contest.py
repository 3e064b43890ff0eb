"""Shared code of the comparisons: contestants run in separate processes, in rounds, monitored from outside.

A benchmark calls `run_rounds` with its own script. In the child process, `--child` holds the setting as JSON, and the
last line of the output is a JSON object with at least `images_per_s`. A benchmark of complete commands calls
`run_in_turn` with a function that calls `run_command`.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RAY_SERVICES = ("gcs_server", "raylet", "log_monitor", "monitor.py", "dashboard", "agent")

Pair = tuple[str, str, float]
"""Two contestants, and the target for the ratio of the first to the second; 0 for no target."""


def run_rounds(
    script: str, contestants: Sequence[str], setting: Mapping[str, Any], *, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Run a script's contestants in turn, as `run_in_turn` does."""
    return run_in_turn(
        contestants,
        lambda name: run_one(script, name, setting),
        lambda run: f"{run['images_per_s']:.2f} images/s",
        rounds=rounds,
    )


def run_in_turn(
    contestants: Sequence[str],
    run: Callable[[str], dict[str, Any]],
    describe: Callable[[dict[str, Any]], str],
    *,
    rounds: int,
) -> dict[str, list[dict[str, Any]]]:
    """Run the contestants in turn, round after round, so that noise on the machine affects all of them equally.

    Args:
        contestants: Their names.
        run: Runs a contestant.
        describe: Makes the text that is printed after each run.
        rounds: Number of rounds.
    """
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in contestants:
            runs[name].append(run(name))
            print(f"round {number + 1}: {name} {describe(runs[name][-1])}", flush=True)
    return runs


def run_one(script: str, name: str, setting: Mapping[str, Any]) -> dict[str, Any]:
    """Run a contestant in a separate process; return its result, its seconds and its memory."""
    command = [sys.executable, script, "--contestants", name, "--child", json.dumps(setting)]
    environment = child_environment() | {"HF_DATASETS_CACHE": str(Path(setting["folder"]) / "datasets")}
    output, cost = run_command(name, command, environment)
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return result | cost


def child_environment() -> dict[str, str]:
    """Return an environment in which no contestant uses the network or a running cluster."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "NO_ALBUMENTATIONS_UPDATE": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    return environment


def run_command(
    name: str, command: Sequence[str], environment: Mapping[str, str], *, folder: Path | None = None
) -> tuple[str, dict[str, Any]]:
    """Run a command in its own session, and exit if it fails.

    Args:
        name: Name of the contestant, for the message.
        command: The command and its arguments.
        environment: Its environment.
        folder: Its working folder; by default the current one.

    Returns:
        Its output, and its cost: `seconds`, `peak_mb`, `ray_mb` and `processes`, the largest number of processes.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
        memory = MemoryOfTree(process.pid)
        try:
            output, _ = process.communicate()
        finally:
            memory.stop()
            process.terminate()
        seconds = time.perf_counter() - started
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{name} failed:\n{output[-2000:]}\n{errors.read()[-4000:]}")
    cost = {"peak_mb": memory.peak_mb, "ray_mb": memory.ray_mb, "processes": memory.num_processes}
    return output, {"seconds": seconds, **cost}


class MemoryOfTree:
    """Monitor of the memory of a process, all its descendants, and all processes of the session that it leads.

    Attributes:
        peak_mb: The largest sum of proportional set sizes, in which shared pages count once.
        ray_mb: The part of `peak_mb` used by Ray's own services, without its workers.
        num_processes: The largest number of processes.
    """

    def __init__(self, pid: int, *, interval_s: float = 1.0) -> None:
        self.peak_mb = self.ray_mb = 0.0
        self.num_processes = 0
        self._root, self._interval_s = pid, interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> None:
        """Stop monitoring."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        pause_s = self._interval_s
        while not self._stop.wait(pause_s):
            started = time.thread_time()
            sizes_mb = {pid: _pss_mb(pid) for pid in _tree(self._root)}
            self.num_processes = max(self.num_processes, len(sizes_mb))
            total_mb = sum(sizes_mb.values())
            if total_mb > self.peak_mb:
                self.peak_mb = total_mb
                self.ray_mb = sum(size_mb for pid, size_mb in sizes_mb.items() if _is_ray_service(pid))
            # The kernel walks all page tables, which would slow down a contestant with many processes.
            pause_s = max(self._interval_s, 50 * (time.thread_time() - started))


def memory_mb() -> float:
    """Return the current memory of this process and all its children, counting shared pages once."""
    return sum(_pss_mb(pid) for pid in _tree(os.getpid()))


def _tree(root: int) -> list[int]:
    """Return the ids of a process, of the processes of the session that it leads, and of all their descendants."""
    children: dict[int, list[int]] = {}
    tree = {root: None}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has just exited
            # The name in parentheses may contain anything; state, parent, process group and session follow it.
            _, parent, _, session = path.read_text().rpartition(")")[2].split()[:4]
            children.setdefault(int(parent), []).append(int(path.parent.name))
            if int(session) == root:
                tree[int(path.parent.name)] = None
    unvisited = list(tree)
    while unvisited:
        found = [pid for pid in children.get(unvisited.pop(), ()) if pid not in tree]
        tree |= dict.fromkeys(found)
        unvisited += found
    return list(tree)


def _pss_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # the process has just exited
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def _is_ray_service(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:4]
    except OSError:
        return False
    return any(service in Path(word).name for word in words for service in RAY_SERVICES)


def print_results(runs: Mapping[str, Sequence[Mapping[str, Any]]], pairs: Sequence[Pair]) -> None:
    """Print a table of the medians, the ratios per round, and one JSON object as the last line."""
    width = max(len(name) for name in runs) + 2
    print(
        f"{'contestant':<{width}} {'images/s':>9} {'lowest':>7} {'highest':>8} {'run s':>6} {'peak MB':>8} "
        f"{'Ray MB':>7} {'AP':>7}"
    )
    keys = ("images_per_s", "seconds", "peak_mb", "ray_mb")
    medians = {
        name: {key: statistics.median(run[key] for run in results) for key in keys} for name, results in runs.items()
    }
    aps = {name: results[-1].get("ap") for name, results in runs.items()}
    for name, results in runs.items():
        speeds, middle = [run["images_per_s"] for run in results], medians[name]
        ap = "–" if aps[name] is None else f"{aps[name]:.4f}"
        print(
            f"{name:<{width}} {middle['images_per_s']:>9.2f} {min(speeds):>7.2f} {max(speeds):>8.2f} "
            f"{middle['seconds']:>6.0f} {middle['peak_mb']:>8.0f} {middle['ray_mb']:>7.0f} {ap:>7}"
        )
    print_ratios(runs, pairs, "images_per_s", "target")
    print(
        json.dumps(
            {
                name: {
                    "images_per_s": round(middle["images_per_s"], 2),
                    "seconds": round(middle["seconds"], 1),
                    "peak_mb": round(middle["peak_mb"]),
                    "ap": aps[name],
                }
                for name, middle in medians.items()
            }
        )
    )


def print_ratios(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], pairs: Sequence[Pair], key: str, target_words: str
) -> None:
    """Print the ratio of two contestants' values in the same round: median, range and target."""
    for first, second, target in pairs:
        if first in runs and second in runs:
            ratios = [mine[key] / its[key] for mine, its in zip(runs[first], runs[second], strict=True)]
            aim = f", {target_words} {target:.2f}" if target else ""
            print(
                f"{first} / {second}: {statistics.median(ratios):.3f} "
                f"(per round {min(ratios):.3f} to {max(ratios):.3f}{aim})"
            )
