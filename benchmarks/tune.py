"""Result and cost of a search: a few short training runs on generated images, including the default.

    python benchmarks/tune.py [--trials 8] [--epochs 8] [--max-concurrent 1] [--out FOLDER] [--quick]
    python benchmarks/tune.py --nodes 4 [--workers 2] [--max-concurrent 2] [--trials 12] [--epochs 9] [--quick]

The model is small and starts from scratch, and the default has a low learning rate, as for a pretrained model, so that
the search can improve on it. Where `tune` has a space of its own, around the recipe, the search uses it.

On one node, seconds are those of the complete search; `epochs_saved` is the fraction of all epochs saved by stopping
trials early; `between_trials_s` the seconds from the end of a trial to the first step of the next (median, with
`--max-concurrent 1`); `waited_for_images` the largest part of the time of a trial's steps in which it waited for
images.

With `--nodes`, several Ray nodes with separate processes run on this machine, and each trial has several workers. A
node with workers of a trial is killed after about a third of the epochs, and the driver after about two thirds; the
same command then resumes. The benchmark checks that no trial is lost, repeated or changed, and compares the best AP
with the default (the recipe) and with a random search without stopping that trains for as many epochs. The exit code is
1 if a check fails. The last line is one JSON object.
"""

import argparse
import dataclasses
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydet import PrepareShapesConfig, TuneConfig, prepare_shapes, tune
from raydet.common.console import Console
from raydet.common.signals import ending_on_sigterm
from raydet.config import to_yaml
from raydet.training.history import EpochRecord
from raydet.tuning import records
from raydet.tuning.results import TuneResult

if TYPE_CHECKING:
    from tests.nodes import Cluster

PROJECT = Path(__file__).parents[1]
IMAGE_SIZE = 96
CPUS_PER_NODE = 3
"""CPUs announced to Ray per node, regardless of the hardware."""
SPACE = {
    "learning_rate": {"loguniform": [1e-4, 5e-3]},
    "backbone_learning_rate": {"loguniform": [1e-4, 5e-3]},
    "batch_size": {"choice": [8, 16]},
    "ema_decay": {"choice": [0.0, 0.9]},
}
HAS_OWN_SPACE = any(
    field.name == "space" and field.default is not dataclasses.MISSING for field in dataclasses.fields(TuneConfig)
)
TIMEOUT_S = 7200.0


def main() -> int:
    """Prepare images, search, print the results, and return the exit code."""
    options = _parse()
    with tempfile.TemporaryDirectory(prefix="rdb", ignore_cleanup_errors=True) as folder:
        data, out = Path(folder) / "data", options.out or str(Path(folder) / "tune")
        num_train = 80 if options.quick else 160
        prepare_shapes(
            PrepareShapesConfig(out=str(data), num_train=num_train, num_val=40, image_size=IMAGE_SIZE, max_shapes=4)
        )
        if options.nodes > 1:
            return _on_nodes(options, data, Path(out).absolute(), Path(folder))
        started = time.perf_counter()
        result = tune(_search(options, data, out), console=Console())
        seconds = time.perf_counter() - started
    for line in result.lines():
        print(line)
    print(json.dumps(_numbers(result, seconds, options.epochs)))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument(
        "--max-concurrent", type=int, help="concurrent trials; as many as the machine has room for by default"
    )
    parser.add_argument("--nodes", type=int, default=1, help="Ray nodes, with failures if more than one")
    parser.add_argument("--workers", type=int, help="workers of a trial; by default 1, and 2 with --nodes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the searches")
    parser.add_argument("--out", help="new folder of the search, which is kept; a temporary one by default")
    parser.add_argument("--quick", action="store_true", help="three tiny trials, as a smoke test")
    options = parser.parse_args()
    has_nodes = options.nodes > 1
    trials, epochs = (3, 2) if options.quick else (12, 9) if has_nodes else (8, 8)
    options.trials, options.epochs = options.trials or trials, options.epochs or epochs
    options.workers = options.workers or (2 if has_nodes else 1)
    if has_nodes:
        options.max_concurrent = options.max_concurrent or 2
    return options


def _search(options: argparse.Namespace, data: Path, out: str, **changes: Any) -> TuneConfig:
    workers = {} if options.workers == 1 else {"num_workers": options.workers, "cpus_per_worker": 1}
    if options.nodes > 1:
        workers["threads_per_worker"] = 1
    train_config: dict[str, Any] = {
        "train_data": str(data / "train"),
        "val_data": str(data / "val"),
        "model": "rt_detr_v2_tiny" if options.quick and options.nodes > 1 else "rt_detr_v2_small",
        "image_size": IMAGE_SIZE,
        "epochs": options.epochs,
        "validate_batch_size": 20,
        "log_images": 0,
        **workers,
    }
    values: dict[str, Any] = {
        "out": out,
        "num_trials": options.trials,
        "max_concurrent": options.max_concurrent,
        "grace_epochs": max(1, options.epochs // 4),
        "reduction_factor": 2,
        "seed": options.seed,
    }
    if not HAS_OWN_SPACE:
        own = {"batch_size": 16, "learning_rate": 1e-4, "backbone_learning_rate": 1e-4, "augmentation": "flip"}
        train_config |= own
        values["space"] = SPACE
    return TuneConfig(train_config=train_config, **{**values, **changes})


# One node.


def _numbers(result: TuneResult, seconds: float, epochs: int) -> dict[str, dict[str, float | int | None]]:
    peak_kb = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    trained = sum(len(trial.history) for trial in result.trials)
    states = [trial.state for trial in result.trials]
    return {
        "default": {"ap": result.default_value},
        "best": {
            "ap": result.value,
            "seconds": round(seconds, 1),
            "peak_mb": round(peak_kb / 1024),
            "trials": len(result.trials),
            "stopped": states.count("stopped"),
            "failed": states.count("failed"),
            "epochs_saved": round(1 - trained / (epochs * len(result.trials)), 3),
            "between_trials_s": _between_trials_s(result),
            "waited_for_images": round(max(_waited_for_images(trial.history) for trial in result.trials), 3),
        },
    }


def _between_trials_s(result: TuneResult) -> float | None:
    """Return the seconds from the end of a trial to the first step of the next one, median; None if trials overlap."""
    spans = []
    for trial in result.trials:
        first, last = trial.history[0], trial.history[-1]
        validation_s = (last.validation and last.validation.seconds) or 0.0
        spans.append(
            (
                datetime.fromisoformat(first.ended).timestamp() - first.seconds,
                datetime.fromisoformat(last.ended).timestamp() + validation_s,
            )
        )
    spans.sort()
    gaps = [start - end for (_, end), (start, _) in itertools.pairwise(spans)]
    return round(statistics.median(gaps), 1) if gaps and min(gaps) > 0 else None


def _waited_for_images(history: Sequence[EpochRecord]) -> float:
    later = history[1:] or history  # the first epoch starts before its images are there
    return sum(one.step_s["data"] for one in later) / sum(sum(one.step_s.values()) for one in later)


# Several nodes, with failures.


def _on_nodes(options: argparse.Namespace, data: Path, out: Path, folder: Path) -> int:
    sys.path.insert(0, str(PROJECT))
    from tests.nodes import nodes

    (folder / "c").mkdir()
    # SIGTERM, like an error, kills the nodes.
    with ending_on_sigterm(), nodes(options.nodes, cpus=CPUS_PER_NODE, folder=folder / "c") as cluster:
        started = time.perf_counter()
        # Stopping saves about half of the epochs.
        expected = options.trials * options.epochs / 2
        faults = _disturbed_search(cluster, _search(options, data, str(out / "asha")), folder, expected=expected)
        seconds = time.perf_counter() - started
        trials = records.load(str(out / "asha"))
        num_epochs = sum(len(trial.history) for trial in trials)
        # Trials that all finish, so that a whole number of them comes closest to as many epochs.
        again = _search(
            options,
            data,
            str(out / "random"),
            search="random",
            scheduler="none",
            num_trials=max(1, round(num_epochs / options.epochs)),
        )
        _run(cluster, again, folder / "random")
    random = records.load(str(out / "random"))
    result: dict[str, dict[str, Any]] = {
        "asha": {"ap": _best_ap(trials), "trials": len(trials), "epochs": num_epochs, "seconds": round(seconds)},
        "recipe": {"ap": _best_ap(trials[:1]), "epochs": len(trials[0].history)},
        "random": {
            "ap": _best_ap(random),
            "trials": len(random),
            "epochs": sum(len(trial.history) for trial in random),
        },
        "states": {state: sum(trial.state == state for trial in trials) for state in ("finished", "stopped", "failed")},
        "faults": faults,
    }
    print(f"{'search':10}{'AP':>8}{'trials':>8}{'epochs':>8}")
    for name in ("asha", "recipe", "random"):
        print(f"{name:10}{result[name]['ap']:8.4f}{result[name].get('trials', 1):8}{result[name]['epochs']:8}")
    for what in faults["wrong"]:
        print(f"WRONG: {what}")
    print(json.dumps(result))
    return 1 if faults["wrong"] else 0


def _disturbed_search(cluster: "Cluster", config: TuneConfig, folder: Path, *, expected: float) -> dict[str, Any]:
    """Run a search that loses a node and its driver, and return what happened and what is wrong afterwards.

    `expected` is the number of epochs of all trials together.
    """
    from tests.drivers import wait_until

    output = folder / "first"
    with cluster.started(_command(config, output), output) as driver:

        def wait_for(epochs: float) -> bool:
            """Wait for this number of epochs over all trials; return False if the search ends before."""
            wait_until(
                lambda: driver.poll() is not None or _num_epochs(config) >= epochs,
                output.read_text,
                timeout_s=TIMEOUT_S,
            )
            return driver.poll() is None

        lost: dict[str, int | None] = {"node": None, "driver": None}
        if wait_for(expected / 3):
            at_work = [node for node in cluster.nodes[1:] if node.workers("RayTrainWorker")]
            cluster.kill_node((at_work or cluster.nodes)[-1])
            lost["node"] = _num_epochs(config)
        if wait_for(2 * expected / 3):
            driver.kill()
            driver.wait()
            lost["driver"] = _num_epochs(config)
    before = records.load(config.out)
    ended = {trial.number for trial in before if trial.state != "unfinished"}
    files = _times(config, ended)
    _run(cluster, config, folder / "second")
    after = records.load(config.out)
    wrong = _wrong(config, before, after)
    if _times(config, ended) != files:
        wrong.append("a trial that had ended was written again")
    wrong += [f"the {what} was not killed: the search ended too early" for what, when in lost.items() if when is None]
    return {"epochs_at_loss": lost, "ended_before": len(ended), "wrong": wrong}


def _wrong(config: TuneConfig, before: Sequence[records.Trial], after: Sequence[records.Trial]) -> list[str]:
    """Return what is wrong with the trials of a resumed search."""
    wrong = []
    if [trial.number for trial in after] != list(range(config.num_trials)):
        wrong.append(f"{len(after)} trials instead of {config.num_trials}")
    drawn = [json.dumps(trial.parameters, sort_keys=True) for trial in after if trial.source == "search"]
    if len(set(drawn)) < len(drawn):
        wrong.append("two trials have the same parameters")
    for trial in after:
        if trial.state not in ("finished", "stopped"):
            wrong.append(f"{trial.name} is {trial.state}: {trial.error}")
        if [record.epoch for record in trial.history] != list(range(1, len(trial.history) + 1)):
            wrong.append(f"{trial.name} has the epochs {[record.epoch for record in trial.history]}")
    for old, new in zip(before, after, strict=False):
        if old.parameters != new.parameters:
            wrong.append(f"{new.name} has other parameters than before")
        if old.history != new.history[: len(old.history)]:
            wrong.append(f"{new.name} has another history than before")
    return wrong


def _command(config: TuneConfig, output: Path) -> list[str]:
    file = output.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    return [sys.executable, "-m", "raydet", "tune", f"--config={file}"]


def _run(cluster: "Cluster", config: TuneConfig, output: Path) -> None:
    done: subprocess.CompletedProcess[str] = cluster.run(_command(config, output), timeout_s=TIMEOUT_S)
    if done.returncode:
        sys.exit(f"tune failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _num_epochs(config: TuneConfig) -> int:
    return sum(len(trial.history) for trial in records.load(config.out))


def _times(config: TuneConfig, numbers: set[int]) -> dict[str, int]:
    """Return the times of the last change of all files of some trials."""
    folders = [Path(config.out, records.TRIALS_FOLDER, f"trial-{number:04d}") for number in sorted(numbers)]
    return {str(path): path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}


def _best_ap(trials: Sequence[records.Trial]) -> float:
    return max((trial.score("AP") or 0.0 for trial in trials), default=0.0)


if __name__ == "__main__":
    sys.exit(main())
