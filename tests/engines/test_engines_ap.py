"""AP of a trained detector with each engine."""

import json
from pathlib import Path

import pytest

from raydet import EvaluateConfig, PredictConfig, PrepareCocoConfig, TrainConfig, evaluate, predict, prepare_coco, train
from raydet.config.options import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), pytest.mark.usefixtures("ray_cluster")]

RECIPE = str(Path(__file__).parents[2] / "jobs" / "configs" / "small.yaml")


@pytest.fixture(scope="module")
def trained(test_data: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[str, str]:
    """A checkpoint trained on BCCD until it detects most cells, and the validation table."""
    folder = tmp_path_factory.mktemp("trained")
    for split in ("train", "val"):
        annotations = str(test_data / "bccd" / f"instances_{split}.json")
        images = str(test_data / "bccd" / "images")
        prepare_coco(PrepareCocoConfig(images=images, annotations=annotations, out=str(folder / split)))
    config = load_file(
        TrainConfig,
        RECIPE,
        train_data=str(folder / "train"),
        val_data=str(folder / "val"),
        out=str(folder / "run"),
        epochs=16,
        validate_every=16,
        augmentation="flip",
    )
    return train(config).checkpoint, str(folder / "val")


@pytest.fixture(scope="module")
def ap_of_torch(trained: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> float:
    return _ap(trained, tmp_path_factory.mktemp("torch"))


def _ap(trained: tuple[str, str], folder: Path, **options: object) -> float:
    checkpoint, data = trained
    config = PredictConfig(checkpoint=checkpoint, data=data, out=str(folder / "d"), **options)  # type: ignore[arg-type]
    result = predict(config)
    assert json.loads(Path(result.out, ".job.json").read_text())["num_images"] == 87
    ap = evaluate(EvaluateConfig(truth=data, detections=result.out)).result.AP
    assert ap is not None
    print(f"AP {ap:.4f} with {options or 'torch, fp32'}")
    return ap


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"engine": "openvino"}, 0.002),
        ({"engine": "onnx"}, 0.002),
        ({"channels_last": False}, 0.002),
        ({"batch_size": 3, "num_workers": 2}, 0.002),
        ({"resize_on": "device"}, 0.001),
        # With eight significant bits, scores change by a few hundredths, and so does the order of some detections.
        ({"precision": "bf16"}, 0.01),
        ({"engine": "openvino", "precision": "bf16"}, 0.01),
    ],
    ids=["openvino", "onnx", "plain", "other batches", "device resize", "bf16", "openvino bf16"],
)
def test_the_ap_is_that_of_torch(
    trained: tuple[str, str], ap_of_torch: float, tmp_path: Path, options: dict[str, object], tolerance: float
) -> None:
    assert ap_of_torch > 0.2
    assert _ap(trained, tmp_path, **options) == pytest.approx(ap_of_torch, abs=tolerance)
