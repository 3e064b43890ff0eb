r"""Sweep, then train: many short trials find good training options, and one long run uses them.

    ray job submit … -- python jobs/sweep.py --search jobs/configs/tune.yaml --epochs 60 \
        --train-data s3://…/train --val-data s3://…/val --out s3://…/sweep

Submit the same command again to resume whichever of the two was interrupted.
"""

from dataclasses import dataclass

import raydet
from raydet.cli.main import run_function
from raydet.config.fields import option
from raydet.config.options import load_file
from raydet.tables import storage


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A search over training options, then one long run with the best of them."""

    search: str = option("config file of `raydet tune`")
    train_data: str = option("images table to train on")
    val_data: str = option("images table for validation")
    epochs: int = option("epochs of the long run")
    out: str = option("folder or URI; the trials are in OUT/search, the long run in OUT/train")


def sweep(options: Sweep) -> None:
    data = {"train_data": options.train_data, "val_data": options.val_data}
    found = raydet.tune(load_file(raydet.TuneConfig, options.search, **data, out=storage.join(options.out, "search")))
    print(*found.lines(), sep="\n", flush=True)
    # Trials are too short to be the result: their learning rate decays within a few epochs. The long run starts again
    # with the same options, rather than from the best trial's weights, so that its schedule covers all epochs.
    final = {"epochs": options.epochs, "out": storage.join(options.out, "train"), **data}
    print(*raydet.train(load_file(raydet.TrainConfig, found.config_file, **final)).lines(), sep="\n")


run_function(sweep, Sweep)
