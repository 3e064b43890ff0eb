"""Seconds, memory and processes of complete commands, compared with plain scripts that do the same.

    python benchmarks/start_up.py [--bccd FOLDER] [--rounds 3] [--contestants raydet_predict script_predict] [--quick]

- raydet_predict: `raydet predict` on 100 images of 640 × 480 with `rt_detr_v2_small` (random weights) at 256 pixels.
- script_predict: `plain_predict.py`, transformers' model and image processor in a loop, with the same batches.
- raydet_train: `raydet train` of the same model on 104 images, 3 epochs in batches of 8, validated on 16 images.
- trainer: `guide_trainer.py`, the script of the Hugging Face guide, with the same model, images, batches and epochs.

The images are the first ones of BCCD if `--bccd` names its folder, generated ones otherwise. All four run one after the
other in each round, each with an empty HOME and TMPDIR. `peak_mb` is the largest sum of the proportional set sizes of
all processes of a command, including Ray's, in which shared pages count once; `processes` is the largest number of
them. All values are medians. The last line is one JSON object.
"""

import argparse
import json
import multiprocessing
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.coco_folder import generate, prepare_first
    from benchmarks.contest import Pair, child_environment, print_ratios, run_command, run_in_turn
else:  # a script imports its neighbours without the package name
    from coco_folder import generate, prepare_first
    from contest import Pair, child_environment, print_ratios, run_command, run_in_turn

HERE = Path(__file__).parent
CONTESTANTS = ("raydet_predict", "script_predict", "raydet_train", "trainer")
PAIRS: "tuple[Pair, ...]" = (("raydet_predict", "script_predict", 1.4), ("raydet_train", "trainer", 1.6))
LARGEST_TRAIN_MB = 2_500
IMAGE_SIZE, BATCH_SIZE = 256, 8
NUM_VAL = 16


def main() -> None:
    """Run the commands in rounds and print the results."""
    options = _parse()
    # So that `timeout` also stops the command.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="rdb", ignore_cleanup_errors=True) as folder:
        # In another process, whose memory the commands do not share.
        arguments = (options.bccd, Path(folder), options.train_images, options.predict_images)
        preparation = multiprocessing.get_context("spawn").Process(target=_prepare, args=arguments)
        preparation.start()
        preparation.join()
        if preparation.exitcode:
            sys.exit("the preparation failed")
        runs = run_in_turn(
            options.contestants,
            lambda name: _run(name, Path(folder), options.epochs),
            lambda run: f"{run['seconds']:.1f} s, {run['peak_mb']:.0f} MB, {run['processes']} processes",
            rounds=options.rounds,
        )
    _print_results(runs)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bccd", type=Path, help="folder with BCCD's images/ and instances_*.json")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--rounds", type=int, help="number of rounds; default: 3, or 1 with --quick")
    parser.add_argument("--train-images", type=int, help="training images; default: 104, or 24 with --quick")
    parser.add_argument("--predict-images", type=int, help="images to score; default: 100, or 24 with --quick")
    parser.add_argument("--epochs", type=int, help="epochs of training; default: 3, or 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="finishes within three minutes on two cores")
    options = parser.parse_args()
    if options.bccd and not (options.bccd / "instances_train.json").is_file():
        parser.error(f"no BCCD in {options.bccd}")
    for name, short, full in (
        ("rounds", 1, 3),
        ("train_images", 24, 104),
        ("predict_images", 24, 100),
        ("epochs", 1, 3),
    ):
        if getattr(options, name) is None:
            setattr(options, name, short if options.quick else full)
    return options


def _prepare(bccd: Path | None, folder: Path, num_train: int, num_predict: int) -> None:
    """Write the images tables `train` and `val`, the folder `images`, and the model folder `model`."""
    from raydet.models.loading import build_detector
    from raydet.tables.table import open_table

    num_images = {"train": num_train, "val": NUM_VAL}
    data = bccd or folder / "generated"
    if bccd is None:
        data.mkdir()
        generate(data, {**num_images, "train": max(num_train, num_predict)})
    prepare_first(data, folder, num_images)
    (folder / "images").mkdir()
    for image in json.loads((data / "instances_train.json").read_bytes())["images"][:num_predict]:
        shutil.copy(data / "images" / image["file_name"], folder / "images")
    categories = open_table(str(folder / "train"), "images").categories
    build_detector("rt_detr_v2_small", categories, image_size=IMAGE_SIZE, seed=0).save(str(folder / "model"))


def _run(name: str, folder: Path, epochs: int) -> dict[str, Any]:
    """Run a command with an empty HOME and TMPDIR, and return its cost."""
    # A short path: Ray puts sockets below TMPDIR, and their names are limited to about 100 characters.
    with tempfile.TemporaryDirectory(prefix="rdh", ignore_cleanup_errors=True) as home:
        _, cost = run_command(
            name,
            _command(name, folder, f"{home}/out", epochs),
            {**child_environment(), "HOME": home, "TMPDIR": home, "HF_HOME": f"{home}/hf"},
            folder=Path(home),
        )
    return cost


def _command(name: str, folder: Path, out: str, epochs: int) -> list[str]:
    raydet = [sys.executable, "-m", "raydet"]
    model, steps = f"{folder}/model", [f"--epochs={epochs}", f"--batch-size={BATCH_SIZE}"]
    if name == "raydet_predict":
        return [*raydet, "predict", f"--checkpoint={model}", f"--data={folder}/images", f"--out={out}"]
    if name == "script_predict":
        return [sys.executable, str(HERE / "plain_predict.py"), model, f"{folder}/images", out]
    if name == "raydet_train":
        data = [f"--train-data={folder}/train", f"--val-data={folder}/val"]
        return [*raydet, "train", f"--model={model}", *data, f"--out={out}", *steps]
    data = [f"--train={folder}/train/*.parquet", f"--val={folder}/val/*.parquet"]
    return [sys.executable, str(HERE / "guide_trainer.py"), f"--model={model}", *data, f"--out={out}", *steps]


def _print_results(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    print(
        f"\n{'command':<16} {'seconds':>8} {'lowest':>7} {'highest':>8} {'peak MB':>8} {'Ray MB':>7} {'processes':>10}"
    )
    medians = {name: {key: statistics.median(run[key] for run in own) for key in own[0]} for name, own in runs.items()}
    for name, middle in medians.items():
        seconds = [run["seconds"] for run in runs[name]]
        print(
            f"{name:<16} {middle['seconds']:>8.1f} {min(seconds):>7.1f} {max(seconds):>8.1f} "
            f"{middle['peak_mb']:>8.0f} {middle['ray_mb']:>7.0f} {middle['processes']:>10.0f}"
        )
    print_ratios(runs, PAIRS, "seconds", "target at most")
    if "raydet_train" in medians:
        print(f"raydet_train: {medians['raydet_train']['peak_mb']:.0f} MB, target at most {LARGEST_TRAIN_MB}")
    print(
        json.dumps(
            {
                name: {
                    "seconds": round(middle["seconds"], 1),
                    "peak_mb": round(middle["peak_mb"]),
                    "processes": round(middle["processes"]),
                }
                for name, middle in medians.items()
            }
        )
    )


if __name__ == "__main__":
    main()
