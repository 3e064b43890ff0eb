"""The comparison with published figures, on a small model with 91 labels and a small set with COCO's 80 ids."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from benchmarks.published_checkpoints import TOLERANCE, main
from raydet.models.loading import build_detector
from raydet.tables.schema import Category
from tests.models.published import COCO_91, UNUSED_IDS
from tests.small_sets import save_image

USED_IDS = (1, 12, 63, 90)
"""Labels that the model gives: two of the truth, one that COCO does not use, one without a box."""


def _coco_set(folder: Path) -> Path:
    """Write images of one box each, near the middle, and COCO JSON with 80 classes."""
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(1, 25):
        width, height = (int(side) for side in generator.integers(60, 120, 2))
        save_image(folder / "images" / f"{number:03d}.jpg", (width, height), seed=number)
        images.append({"id": 7 * number, "file_name": f"{number:03d}.jpg", "width": width, "height": height})
        scale = generator.uniform(0.4, 0.75, 2) * (width, height)
        left, top = ((width, height) - scale) / 2 + generator.normal(0, 2, 2)
        box = {"bbox": [left, top, *scale], "area": float(np.prod(scale)), "iscrowd": 0}
        annotations.append({"id": number, "image_id": 7 * number, "category_id": 63 if number % 3 else 1, **box})
    names = {number: "couch" if number == 63 else name for number, name in enumerate(COCO_91)}
    categories = [{"id": number, "name": name} for number, name in names.items() if number not in UNUSED_IDS]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


def _model(folder: Path) -> None:
    """Save a model whose boxes are near the middle of the image and whose labels are `USED_IDS`."""
    labels = [Category(number, "Sofa" if number == 63 else name) for number, name in enumerate(COCO_91)]
    detector = build_detector("yolos_tiny", labels, image_size=64, seed=0)
    model: Any = detector.model
    *layers, last = model.class_labels_classifier.layers
    tokens, boxes = model.vit.embeddings.detection_tokens, model.bbox_predictor.layers[-1]
    with torch.no_grad():
        torch.nn.init.normal_(tokens, std=3.0, generator=torch.Generator().manual_seed(1))
        # Each detection token has a label of its own, on a black image exactly.
        features = model.vit(torch.zeros((1, 3, 64, 64))).last_hidden_state[0, -tokens.shape[1] :]
        for layer in layers:
            features = layer(features).relu()
        logits = torch.zeros((len(features), len(labels) + 1))
        for number, row in enumerate(logits):
            row[USED_IDS[number % len(USED_IDS)]] = 3 + number / 10
        last.weight.copy_(torch.linalg.lstsq(features, logits).solution.T)
        last.bias.fill_(-50)
        last.bias[[*USED_IDS, len(labels)]] = 0
        boxes.bias.copy_(torch.logit(torch.tensor([0.5, 0.5, 0.57, 0.57])))
    detector.save(str(folder))


def _ap_of_pycocotools(annotations: Path, model_folder: Path) -> float:
    """Return the AP in percent without raydet, whose labels are COCO's ids; unused ones are left out."""
    model = AutoModelForObjectDetection.from_pretrained(model_folder).eval()
    processor = AutoImageProcessor.from_pretrained(model_folder)
    results = []
    for item in json.loads(annotations.read_text())["images"]:
        picture = Image.open(annotations.parent / "images" / item["file_name"]).convert("RGB")
        with torch.inference_mode():
            outputs = model(**processor(images=picture, return_tensors="pt"))
        sizes = [(picture.height, picture.width)]
        (found,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        for score, label, (left, top, right, bottom) in zip(
            found["scores"].tolist(), found["labels"].tolist(), found["boxes"].tolist(), strict=True
        ):
            assert label in USED_IDS
            box = [left, top, right - left, bottom - top]
            results.append({"image_id": item["id"], "category_id": label, "bbox": box, "score": score})
    assert {result["category_id"] for result in results} == set(USED_IDS)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        known = [result for result in results if result["category_id"] not in UNUSED_IDS]
        evaluator = COCOeval(truth, truth.loadRes(known), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return 100 * float(evaluator.stats[0])


@pytest.mark.usefixtures("one_thread")
def test_the_whole_way_on_a_stand_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations, model = _coco_set(tmp_path), tmp_path / "model"
    _model(model)
    ap = _ap_of_pycocotools(annotations, model)
    assert 2 < ap < 98
    file = tmp_path / "published.json"
    words = [
        f"--annotations={annotations}",
        f"--images={tmp_path}/images",
        f"--published={file}",
        f"--out={tmp_path}/out",
    ]
    for published, exit_code in ((ap, 0), (ap + 2 * TOLERANCE, 1)):
        file.write_text(json.dumps({"stand-in": {"model": str(model), "ap": published, "source": "pycocotools"}}))
        assert main(words) == exit_code
        output = capsys.readouterr().out.splitlines()
        result = json.loads(output[-1])
        (numbers,) = result["checkpoints"].values()
        assert result["met"] == (exit_code == 0)
        assert numbers["ap"] == pytest.approx(ap, abs=TOLERANCE / 2)
        assert numbers["images"] == 24
        assert numbers["detections_of_other_classes"] > 0 and numbers["detections"] > 0
        assert ("MISSED" in "".join(output)) == (exit_code == 1)
    with pytest.raises(SystemExit, match="no published figures of unknown"):
        main([*words, "--models", "unknown"])
