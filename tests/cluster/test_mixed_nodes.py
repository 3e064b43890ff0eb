"""Scoring on a cluster with a CPU node, which decodes, and a GPU node, which runs the model."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from raydet import PrepareShapesConfig, prepare_shapes
from raydet.models.loading import build_detector
from raydet.tables.table import open_table
from tests.nodes import nodes

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(400)]

# The GPU exists in name only: the actor hides it from the model after Ray has placed it, and runs on the CPU.
SCRIPT = """
import sys
from pathlib import Path

import ray

from raydet import PredictConfig, predict
from raydet.scoring import decoders, stream

data, checkpoint, out, seen, use_gpu = sys.argv[1:]


def note(stage):
    Path(seen, f"{stage} {ray.util.get_node_ip_address()}").touch()


class Decoder(decoders.Decoder):
    def decode(self, *arguments):
        note("decode")
        return super().decode(*arguments)


class Model(stream.ScoringActor):
    def __init__(self, *arguments):
        context = ray.get_runtime_context()
        assert bool(context.get_accelerator_ids()["GPU"]) == (use_gpu == "True")
        note("model")
        type(context).get_accelerator_ids = lambda self: {}
        decoders.Decoder = Decoder
        super().__init__(*arguments)


stream.ScoringActor = Model
predict(PredictConfig(
    data=data, checkpoint=checkpoint, out=out, use_gpu=use_gpu == "True", batch_size=4, threads_per_worker=1))
"""


def rows(out: Path) -> list[Any]:
    return sorted((row["image_id"], row["detections"]) for row in open_table(str(out), "detections").read().to_pylist())


def test_the_model_runs_where_the_gpu_is_and_others_decode(tmp_path: Path) -> None:
    prepare_shapes(PrepareShapesConfig(out=f"{tmp_path}/data", num_train=200, num_val=1, image_size=64))
    categories = open_table(f"{tmp_path}/data/train", "images").categories
    build_detector("rt_detr_v2_tiny", categories, image_size=64, seed=3).save(f"{tmp_path}/checkpoint")
    with (
        tempfile.TemporaryDirectory(prefix="rdm", ignore_cleanup_errors=True) as folder,
        nodes(1, cpus=2, folder=Path(folder)) as cluster,
    ):
        with_gpu = cluster.add_node(gpus=1)
        for use_gpu in (True, False):
            out, seen = tmp_path / f"out-{use_gpu}", tmp_path / f"seen-{use_gpu}"
            seen.mkdir()
            words = [f"{tmp_path}/data/train", f"{tmp_path}/checkpoint", str(out), str(seen), str(use_gpu)]
            done = cluster.run([sys.executable, "-c", SCRIPT, *words])
            assert done.returncode == 0, done.stderr
        places = {path.name for path in (tmp_path / "seen-True").iterdir()}
        assert f"decode {cluster.head.address}" in places
        assert {place for place in places if place.startswith("model")} == {f"model {with_gpu.address}"}
        assert len(rows(tmp_path / "out-True")) == 200
        assert rows(tmp_path / "out-True") == rows(tmp_path / "out-False")
