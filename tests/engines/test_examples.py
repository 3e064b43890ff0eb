"""Zero-shot detectors that look for what example pictures show."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raydet import UserError
from raydet.config import PredictConfig
from raydet.engines.zero_shot import check_prompts, load_zero_shot
from raydet.engines.zero_shot_models.prompts import fingerprint_of, prompts_of
from tests.engines.test_zero_shot import SIZES_HW, in_picture, pictures, plain_model
from tests.zero_shot_models import write_zero_shot

pytestmark = pytest.mark.usefixtures("one_thread")

OWL = ["owlvit", "owlv2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_zero_shot(name, root / name) for name in (*OWL, "grounding-dino")}


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one picture of a dog and two of a cat."""
    root = tmp_path_factory.mktemp("examples")
    for number, (name, size_hw) in enumerate([("dog", (64, 64)), ("cat", (80, 50)), ("cat", (40, 90))]):
        (root / name).mkdir(exist_ok=True)
        Image.fromarray(pictures([size_hw])[0] + np.uint8(40 * number)).save(root / name / f"{number}.png")
    return root


def load(folder: str, **options: Any) -> Any:
    config = PredictConfig(model=folder, data="images", out="out", **options)
    return load_zero_shot(config, device="cpu", num_threads=1)


def embeddings(engine: Any) -> np.ndarray:
    vectors: np.ndarray = engine._label_embeddings.numpy()
    return vectors


@pytest.mark.parametrize("model_type", OWL)
def test_one_example_finds_what_the_model_itself_does(
    model_type: str, folders: dict[str, str], examples: Path, tmp_path: Path
) -> None:
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "a.png").write_bytes((examples / "dog" / "0.png").read_bytes())
    engine = load(folders[model_type], examples=str(tmp_path))
    assert [category.name for category in engine.categories] == ["thing"]
    model, processor = plain_model(folders[model_type])
    query = processor.image_processor(images=[np.array(Image.open(tmp_path / "thing" / "a.png"))], return_tensors="pt")
    for image, size_hw in zip(pictures(SIZES_HW), SIZES_HW, strict=True):
        (found,) = engine.predict(engine.prepare([image]))
        inputs = processor.image_processor(images=[image], return_tensors="pt")
        with torch.inference_mode():
            outputs = model.image_guided_detection(
                pixel_values=inputs["pixel_values"], query_pixel_values=query["pixel_values"]
            )
        scores, boxes = outputs.logits[0, :, 0].sigmoid(), outputs.target_pred_boxes[0]
        extent = max(size_hw) if model_type == "owlv2" else None
        scale = torch.tensor([extent or size_hw[1], extent or size_hw[0]] * 2)
        corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1) * scale
        expected_boxes, expected_scores, _ = in_picture(corners, scores, size_hw)
        assert len(expected_scores) > 10
        np.testing.assert_allclose(found.scores, expected_scores, atol=1e-5)
        np.testing.assert_allclose(found.boxes_xywh, expected_boxes, atol=0.01)


@pytest.mark.parametrize("model_type", OWL)
def test_texts_and_examples_of_a_class_are_averaged(model_type: str, folders: dict[str, str], examples: Path) -> None:
    def vectors(**options: Any) -> dict[str, np.ndarray]:
        engine = load(folders[model_type], **options)
        return dict(zip([category.name for category in engine.categories], embeddings(engine), strict=True))

    words = vectors(labels=["Cat", "tree"])
    both = vectors(labels=["Cat", "tree"], examples=str(examples))
    shown = vectors(examples=str(examples))
    assert list(both) == ["Cat", "tree", "dog"] and list(shown) == ["cat", "dog"]
    np.testing.assert_allclose(both["tree"], words["tree"])
    np.testing.assert_allclose(both["dog"], shown["dog"])
    np.testing.assert_allclose(3 * both["Cat"], words["Cat"] + 2 * shown["cat"], atol=1e-5)
    templates = ["a {}", "the {} at night"]
    several = vectors(labels=["cat"], prompt_template=templates)
    single = [vectors(labels=[template.format("cat")]) for template in templates]
    mean = np.mean([*single[0].values(), *single[1].values()], axis=0)
    np.testing.assert_allclose(several["cat"], mean, atol=1e-6)


def test_each_example_is_embedded_once(folders: dict[str, str], examples: Path, monkeypatch: Any) -> None:
    from transformers import Owlv2ForObjectDetection

    real, calls = Owlv2ForObjectDetection.image_embedder, []

    def counting(self: Any, pixel_values: Any, **options: Any) -> Any:
        calls.append(len(pixel_values))
        return real(self, pixel_values=pixel_values, **options)

    monkeypatch.setattr(Owlv2ForObjectDetection, "image_embedder", counting)
    engine = load(folders["owlv2"], examples=str(examples))
    assert calls == [1, 1, 1]
    engine.predict(engine.prepare(pictures([(64, 64), (64, 64)])))
    assert calls == [1, 1, 1, 2]


@pytest.mark.parametrize("model_type", OWL)
def test_a_box_names_the_object(model_type: str, folders: dict[str, str], tmp_path: Path) -> None:
    size_hw = (60, 120)
    model, processor = plain_model(folders[model_type])
    (image,) = pictures([size_hw])
    (tmp_path / "thing").mkdir()
    Image.fromarray(image).save(tmp_path / "thing" / "a.png")
    pixel_values = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        feature_map, _ = model.image_embedder(pixel_values)
        features = feature_map.flatten(1, 2)
        proposals = model.box_predictor(features, feature_map)[0]
        vectors = model.class_predictor(features)[1][0]
    extent_hw = (max(size_hw),) * 2 if model_type == "owlv2" else size_hw
    boxes = proposals.numpy() * np.array([extent_hw[1] / size_hw[1], extent_hw[0] / size_hw[0]] * 2)
    place = int(np.flatnonzero(((boxes > 0) & (boxes <= 1)).all(axis=1))[0])
    box = boxes[place]
    (tmp_path / "thing" / "a.txt").write_text("0 " + " ".join(f"{number:.6f}" for number in box))
    found = embeddings(load(folders[model_type], examples=str(tmp_path)))[0]
    np.testing.assert_allclose(found, (vectors[place] / vectors[place].norm()).numpy(), atol=1e-5)


def test_other_pictures_are_another_run(examples: Path, folders: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()

    def fingerprint() -> str | None:
        return fingerprint_of(prompts_of(PredictConfig(model="m", data="i", out="o", examples=str(tmp_path))))

    found = []
    for number in (1, 2):
        (tmp_path / "cat" / "a.png").write_bytes((examples / "cat" / f"{number}.png").read_bytes())
        found.append(fingerprint())
    (tmp_path / "cat" / "a.txt").write_text("0.5 0.5 0.1 0.1")
    assert len({*found, fingerprint()}) == 3


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no sub-folders"),
        (["cat/readme.md"], "has no pictures"),
        (["cat/a.png", "Cat /b.png"], "two folders are named"),
    ],
)
def test_folders_without_examples_are_refused(tmp_path: Path, files: Sequence[str], message: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=message):
        prompts_of(PredictConfig(model="m", data="i", out="o", examples=str(tmp_path)))


@pytest.mark.parametrize(
    "text", ["0.5 0.5 0.1", "0.5 0.5 0.1 2", "0.5 0.5 0 0.1", "a b c d", "0.5 0.5 0.1 0.1\n1 1 1 1"]
)
def test_boxes_of_another_form_are_refused(folders: dict[str, str], examples: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes((examples / "cat" / "1.png").read_bytes())
    (tmp_path / "cat" / "a.txt").write_text(text)
    with pytest.raises(UserError, match="must have one line"):
        fingerprint_of(prompts_of(PredictConfig(model="m", data="i", out="o", examples=str(tmp_path))))


def test_unreadable_examples_and_other_models_are_refused(
    folders: dict[str, str], examples: Path, tmp_path: Path
) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot read the example"):
        load(folders["owlv2"], examples=str(tmp_path))
    with pytest.raises(UserError, match="--examples needs OWL-ViT or OWLv2"):
        check_prompts(PredictConfig(model=folders["grounding-dino"], data="i", out="o", examples=str(examples)))
    with pytest.raises(UserError, match=r"must contain \{\} once"):
        PredictConfig(model="m", data="i", out="o", labels=["cat"], prompt_template=["a photo"])
    with pytest.raises(UserError, match="--prompt-template needs --labels"):
        PredictConfig(model="m", data="i", out="o", examples="e", prompt_template=["a {}"])
