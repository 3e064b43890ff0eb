"""Shared code of the comparisons: contestants run in separate processes, in rounds, monitored from outside.

A benchmark calls `run_rounds` with its own script. In the child process, `--child` holds the setting as JSON, and the
last line of the output is a JSON object with at least `images_per_s`.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RAY_SERVICES = ("gcs_server", "raylet", "log_monitor", "monitor.py", "dashboard", "agent")

Pair = tuple[str, str, float]
"""Two contestants, and the target for the ratio of the first to the second; 0 for no target."""


def run_rounds(
    script: str, contestants: Sequence[str], setting: Mapping[str, Any], *, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Run the contestants in turn, round after round, so that noise on the machine affects all of them equally."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in contestants:
            runs[name].append(run_one(script, name, setting))
            print(f"round {number + 1}: {name} {runs[name][-1]['images_per_s']:.2f} images/s", flush=True)
    return runs


def run_one(script: str, name: str, setting: Mapping[str, Any]) -> dict[str, Any]:
    """Run a contestant in a separate process; return its result, its seconds and its memory."""
    command = [sys.executable, script, "--contestants", name, "--child", json.dumps(setting)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "NO_ALBUMENTATIONS_UPDATE": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(Path(setting["folder"]) / "datasets")}
    environment |= {"PYTHONWARNINGS": "ignore", "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        memory = MemoryOfTree(process.pid)
        try:
            output, _ = process.communicate()
        finally:
            memory.stop()
            process.terminate()
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{name} failed:\n{errors.read()[-4000:]}")
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return {**result, "seconds": time.perf_counter() - started, "peak_mb": memory.peak_mb, "ray_mb": memory.ray_mb}


class MemoryOfTree:
    """Monitor of the memory of a process and all its children.

    Attributes:
        peak_mb: The largest sum of proportional set sizes, in which shared pages count once.
        ray_mb: The part of `peak_mb` used by Ray's own services, without its workers.
    """

    def __init__(self, pid: int, *, interval_s: float = 1.0) -> None:
        self.peak_mb = self.ray_mb = 0.0
        self._root, self._interval_s = pid, interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> None:
        """Stop monitoring."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            sizes_mb = {pid: _pss_mb(pid) for pid in _tree(self._root)}
            total_mb = sum(sizes_mb.values())
            if total_mb > self.peak_mb:
                self.peak_mb = total_mb
                self.ray_mb = sum(size_mb for pid, size_mb in sizes_mb.items() if _is_ray_service(pid))


def memory_mb() -> float:
    """Return the current memory of this process and all its children, counting shared pages once."""
    return sum(_pss_mb(pid) for pid in _tree(os.getpid()))


def _tree(root: int) -> list[int]:
    """Return the ids of a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has just exited
            # The name in parentheses may contain anything; state and parent follow it.
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    tree = [root]
    for pid in tree:
        tree += children.get(pid, [])
    return tree


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
    print_ratios(runs, pairs)
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


def print_ratios(runs: Mapping[str, Sequence[Mapping[str, Any]]], pairs: Sequence[Pair]) -> None:
    """Print the median over the rounds of the ratio of each pair that took part."""
    for first, second, target in pairs:
        if first in runs and second in runs:
            ratios = [
                mine["images_per_s"] / its["images_per_s"] for mine, its in zip(runs[first], runs[second], strict=True)
            ]
            aim = f", target {target:.2f}" if target else ""
            print(
                f"{first} / {second}: {statistics.median(ratios):.3f} "
                f"(per round {min(ratios):.3f} to {max(ratios):.3f}{aim})"
            )
