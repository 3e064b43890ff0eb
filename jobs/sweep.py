r"""Sweep, then train: many short trials find good training options, and one long run uses them.

    ray job submit … -- python jobs/sweep.py --config jobs/configs/tune.yaml --epochs 60 \
        --train-data s3://…/train --val-data s3://…/val --out s3://…/sweep

OUT/search holds the trials, OUT/train the long run. The same command again resumes whichever was interrupted.
"""

import argparse

import raydet
from raydet.cli.main import run_function
from raydet.config.options import load_file
from raydet.tables import storage


def sweep() -> None:
    parser = argparse.ArgumentParser()
    for name in ("config", "train-data", "val-data", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--epochs", type=int, required=True)
    options = parser.parse_args()
    data = {"train_data": options.train_data, "val_data": options.val_data}
    search = load_file(raydet.TuneConfig, options.config, **data, out=storage.join(options.out, "search"))
    found = raydet.tune(search)
    print(*found.lines(), sep="\n", flush=True)
    # Trials are too short to be the result: their learning rate decays within a few epochs. The long run starts again
    # with the same options, rather than from the best trial's weights, so that its schedule covers all epochs.
    final = {"epochs": options.epochs, "out": storage.join(options.out, "train"), **data}
    print(*raydet.train(load_file(raydet.TrainConfig, found.config_file, **final)).lines(), sep="\n")


run_function(sweep)
