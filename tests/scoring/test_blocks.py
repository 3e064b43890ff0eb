"""Blocks hold the views of consecutive images at the model's size, and end by number or by bytes."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydet import PredictConfig
from raydet.engines.loading import load_engine
from raydet.engines.views import crop, planned_views
from raydet.images.collection import open_collection
from raydet.images.decode import decode
from raydet.models.geometry import ResizeRule, resize
from raydet.scoring.blocks import blocks_of, images_in, planes_in
from raydet.scoring.plan import OWN_TABLE, ScoringPlan, Work
from raydet.tables.output_folder import OutputFolder
from raydet.tables.schema import build_schema
from tests.small_sets import save_image

RULE = ResizeRule(mode="keep_aspect", shortest=40, longest=60)


def work_on(data: Path, **options: Any) -> Work:
    images = open_collection(str(data), index_uri=None)
    config = PredictConfig(checkpoint="c", data=str(data), out="o", batch_size=4, **options)
    return Work(
        config=config,
        folder=OutputFolder("o", "predict"),
        model_fingerprint="",
        images=images,
        plan=ScoringPlan.of(config, images.num_rows, 4),
        schemas={OWN_TABLE: build_schema("detections", ())},
        load_engine=load_engine,
    )


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"tile": 64, "tile_overlap": 0.1}])
def test_views_are_cut_and_resized_as_an_engine_would(tmp_path: Path, options: dict[str, Any]) -> None:
    for number in range(5):
        save_image(tmp_path / f"{number}.png", (90 + number, 70), seed=number)
    (tmp_path / "3.png").write_bytes(b"\x89PNG broken")
    work = work_on(tmp_path, **options)
    ((block, stats),) = blocks_of(work, range(5), RULE)
    assert block["path"].to_pylist() == [f"{number}.png" for number in range(5)]
    assert [error is None for error in block["error"].to_pylist()] == [True, True, True, False, True]
    assert block["height"].to_pylist() == [70, 70, 70, None, 70]
    assert {"read", "decode", "prepare"} == set(stats.seconds)
    sizes_hw, pixels = images_in(block)
    assert sizes_hw == [(70, 90), (70, 91), (70, 92), (70, 94)]
    for number, size_hw, flat in zip((0, 1, 2, 4), sizes_hw, pixels, strict=True):
        image = decode((tmp_path / f"{number}.png").read_bytes(), max_pixels=10**6)
        views = planned_views(size_hw, work.config)
        planes = planes_in(flat, size_hw, work.config, RULE)
        assert len(views) == len(planes) == (1 if not options else 2 if "flip" in options else len(views))
        for view, found in zip(views, planes, strict=True):
            expected = resize(crop(image, view), RULE.target_size_hw(view.size_hw), RULE.resample)
            np.testing.assert_array_equal(found, expected.transpose(2, 0, 1))


@pytest.mark.parametrize(("rule", "options"), [(None, {}), (RULE, {"resize_on": "device", "flip": True})])
def test_images_that_the_decoder_does_not_resize_stay_as_they_are(
    tmp_path: Path, rule: ResizeRule | None, options: dict[str, Any]
) -> None:
    save_image(tmp_path / "0.png", (30, 20), seed=1)
    ((block, _),) = blocks_of(work_on(tmp_path, **options), range(1), rule)
    ((size_hw,), (flat,)) = images_in(block)
    expected = decode((tmp_path / "0.png").read_bytes(), max_pixels=10**6)
    np.testing.assert_array_equal(flat.reshape(*size_hw, 3), expected)


def test_blocks_of_large_images_are_shorter_but_hold_whole_batches(shapes: Path) -> None:
    work = work_on(shapes / "train")
    rule = ResizeRule(mode="fixed", size_hw=(64, 64))

    def lengths(most_images: int, start: int = 0, **limit: int) -> list[int]:
        changed = dataclasses.replace(work, plan=dataclasses.replace(work.plan, images_per_block=most_images))
        return [block.num_rows for block, _ in blocks_of(changed, range(start, 24), rule, **limit)]

    assert lengths(64) == [24] and lengths(8) == [8, 8, 8] and lengths(8, start=16) == [8]
    assert lengths(64, most_bytes=5 * 3 * 64 * 64) == [8, 8, 8]
    assert lengths(64, most_bytes=1) == [1] * 24
    work = dataclasses.replace(work, config=dataclasses.replace(work.config, resize_on="device"))
    rule = ResizeRule(mode="fixed", size_hw=(640, 640))
    assert lengths(64, most_bytes=5 * 3 * 64 * 64) == [8, 8, 8]  # the images are 64 × 64


def test_decode_processes_import_neither_torch_nor_ray() -> None:
    code = "import sys, raydet.scoring.blocks; sys.exit(bool({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_plan_fills_batches_and_gives_each_worker_several_files(shapes: Path) -> None:
    config = PredictConfig(checkpoint="c", data=str(shapes), out="o", batch_size=24, num_workers=2)
    plan = ScoringPlan.of(config, 100_000, 24)
    assert (plan.rows_per_file % 24, plan.images_per_block, plan.rows_of(plan.num_chunks - 1).stop) == (0, 72, 100_000)
    assert 1024 <= plan.rows_per_file < 1024 + 24
    assert ScoringPlan.of(config, 3200, 24).num_chunks >= 2 * 12
    flipped = ScoringPlan.of(dataclasses.replace(config, flip=True), 100, 24)
    assert flipped.images_per_batch == 12
