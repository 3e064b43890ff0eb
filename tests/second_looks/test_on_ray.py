"""`crops` on a Ray cluster."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from raydet import UserError, crops
from tests.second_looks.scored import assert_rows, config_of, crops_by_hand
from tests.small_sets import rows_of

pytestmark = pytest.mark.slow


@pytest.mark.timeout(180)
def test_actors_write_the_same_rows(data: Path, models: Any, tmp_path: Path, ray_cluster: None) -> None:
    options: dict[str, Any] = {"rows_per_file": 2, "num_workers": 2, "cpus_per_worker": 0.5, "threads_per_worker": 1}
    there = crops(config_of(data, tmp_path / "there", models("vit"), "image-classification", **options))
    assert there.num_crops == 18
    rows = rows_of(there.out, "crops")
    assert_rows(rows, crops_by_hand(data))
    assert len({row["label"] for row in rows}) > 1


def test_a_model_without_weights_for_the_task_ends_the_run(
    data: Path, models: Any, tmp_path: Path, ray_cluster: None
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models("dinov2"), folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "architectures": ["Dinov2ForImageClassification"]}))
    with pytest.raises(UserError, match="no weights for image-classification"):
        crops(config_of(data, tmp_path / "out", str(folder), "image-classification"))
