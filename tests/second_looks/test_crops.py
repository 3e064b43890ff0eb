"""`crops` gives the answers of a plain script, one row a detection, whatever interrupts it."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from raydet import CropsConfig, UserError, crops
from raydet.images.windows.index import PICTURE_FIELDS
from raydet.second_looks import crops as driver
from raydet.second_looks import writing
from raydet.second_looks.cutting import box_of, crops_of
from raydet.tables.schema import build_schema
from raydet.tables.table import TableWriter, open_table
from tests.json_output import check_result
from tests.second_looks.scored import CATEGORIES, UNREADABLE, assert_rows, config_of, crops_by_hand
from tests.small_sets import rows_of, write_drawn


@pytest.mark.parametrize("margin", [0.0, 2.0])
def test_classes_are_those_of_the_pipeline(data: Path, models: Any, tmp_path: Path, margin: float) -> None:
    config = config_of(data, tmp_path / "out", models("vit"), "image-classification", margin=margin, batch_size=4)
    result = crops(config)
    rows, expected = rows_of(result.out, "crops"), crops_by_hand(data, margin)
    assert check_result(result, "crops")["num_crops"] == 18
    assert result.num_errors == sum(crop is None for _, _, crop in expected)
    assert_rows(rows, expected)
    judge = hf.pipeline("image-classification", model=models("vit"))
    for row, (_, _, crop) in zip(rows, expected, strict=True):
        answers = [] if crop is None else judge(crop, top_k=5)
        assert (row["labels"] or []) == [answer["label"] for answer in answers]
        np.testing.assert_allclose(row["label_scores"] or [], [answer["score"] for answer in answers], atol=1e-5)
        assert row["label"] == (answers[0]["label"] if answers else None)
    assert crops(config).already_done


def test_zero_shot_classes_are_those_of_the_pipeline(data: Path, models: Any, tmp_path: Path) -> None:
    labels, template = ["cat", "red dog", "blue"], "the {} is it"
    options = {"labels": labels, "prompt_template": template, "top_k": 2}
    model = models("clip")
    result = crops(config_of(data, tmp_path / "out", model, "zero-shot-image-classification", **options))
    judge = hf.pipeline("zero-shot-image-classification", model=model)
    seen = set()
    for row, (_, _, crop) in zip(rows_of(result.out, "crops"), crops_by_hand(data), strict=True):
        if crop is not None:
            answers = judge(crop, candidate_labels=labels, hypothesis_template=template)[:2]
            assert row["labels"] == [answer["label"] for answer in answers]
            np.testing.assert_allclose(row["label_scores"], [answer["score"] for answer in answers], atol=1e-5)
            seen.add(row["label"])
    assert len(seen) > 1, "the labels do not depend on the crop"


def test_relabelled_detections_have_the_class_of_a_label_beside_their_own(
    data: Path, models: Any, tmp_path: Path
) -> None:
    def run(threshold: float) -> driver.CropsResult:
        options = {"labels": ["Cat", "bird"], "relabel": threshold, "rows_per_file": 2}
        config = config_of(data, tmp_path / "out", models("clip"), "zero-shot-image-classification", **options)
        return crops(config)

    first = run(0.0)
    answers = rows_of(first.out, "crops")
    labels = {(row["image_id"], row["detection"]): row["label"] for row in answers if row["label"] is not None}
    assert set(labels.values()) == {"Cat", "bird"}
    assert first.relabelled is not None
    table = open_table(first.relabelled, "detections")
    assert [(category.id, category.name) for category in table.categories] == [(3, "cat"), (7, "dog"), (8, "bird")]
    before, after = rows_of(data / "found", "detections"), rows_of(first.relabelled, "detections")
    for old, new in zip(before, after, strict=True):
        classes = [
            {None: category, "Cat": 0, "bird": 2}[labels.get((old["image_id"], place))]
            for place, category in enumerate(old["detections"]["category"])
        ]
        assert new.pop("detector_category") == old["detections"]["category"]
        assert new == {**old, "detections": {**old["detections"], "category": classes}}
    # Another threshold asks the model nothing; above all scores each detection keeps its class.
    again = run(1.0)
    assert again.already_done and again.relabelled == first.relabelled
    kept = rows_of(again.relabelled, "detections")
    assert [row["detections"] for row in kept] == [row["detections"] for row in before]
    assert rows_of(again.out, "crops") == answers


def test_labels_without_names_are_no_classes(data: Path, models: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(models("vit"), model)
    content = json.loads((model / "config.json").read_text())
    content["id2label"] = {str(index): f"LABEL_{index}" for index in range(7)}
    (model / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="needs names of classes"):
        crops(config_of(data, tmp_path / "out", str(model), "image-classification", relabel=0.5))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["dinov2", "clip"])
@torch.inference_mode()
def test_vectors_are_those_of_the_model(data: Path, models: Any, tmp_path: Path, name: str) -> None:
    result = crops(config_of(data, tmp_path / "out", models(name), "image-feature-extraction"))
    model, processor = (
        hf.AutoModel.from_pretrained(models(name)),
        hf.AutoImageProcessor.from_pretrained(models(name)),
    )
    for row, (_, _, crop) in zip(rows_of(result.out, "crops"), crops_by_hand(data), strict=True):
        if crop is not None:
            inputs = processor(images=crop, return_tensors="pt")
            found = model.get_image_features(**inputs) if name == "clip" else model(**inputs)
            vector = found if isinstance(found, torch.Tensor) else found.pooler_output
            np.testing.assert_allclose(row["embedding"], vector[0].numpy(), rtol=2e-3, atol=2e-3)


def test_depths_are_medians_of_the_pipeline(data: Path, models: Any, tmp_path: Path) -> None:
    result = crops(config_of(data, tmp_path / "out", models("depth_anything"), "depth-estimation"))
    judge: Any = hf.pipeline("depth-estimation", model=models("depth_anything"))
    processor, model = judge.image_processor, judge.model
    for row, (_, _, crop) in zip(rows_of(result.out, "crops"), crops_by_hand(data), strict=True):
        if crop is not None:
            with torch.inference_mode():
                depth = model(**processor(images=crop, return_tensors="pt")).predicted_depth
            assert row["depth"] == pytest.approx(float(depth.median()), rel=1e-4)


@pytest.mark.parametrize("name", ["blip_captions", "git"])
def test_captions_are_those_of_the_model(data: Path, models: Any, tmp_path: Path, name: str) -> None:
    config = config_of(data, tmp_path / "out", models(name), "image-text-to-text", max_new_tokens=6, batch_size=5)
    result = crops(config)
    model: Any = hf.AutoModelForImageTextToText.from_pretrained(models(name))
    processor = hf.AutoProcessor.from_pretrained(models(name))
    answers = []
    for row, (_, _, crop) in zip(rows_of(result.out, "crops"), crops_by_hand(data), strict=True):
        if crop is not None:
            inputs = processor(images=crop, return_tensors="pt")
            found = model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=1)
            assert row["caption"] == processor.batch_decode(found, skip_special_tokens=True)[0].strip()
            answers.append(row["caption"])
    assert len(set(answers)) > 1, "the captions do not depend on the crop"


@pytest.mark.parametrize("name", ["blip_questions", "vilt"])
def test_several_questions_have_a_column_each(data: Path, models: Any, tmp_path: Path, name: str) -> None:
    ask = ["what colour is it ?", "is it a cat ?"]
    options: dict[str, Any] = {"ask": ask, "max_new_tokens": 5, "batch_size": 4}
    result = crops(config_of(data, tmp_path / "out", models(name), "image-text-to-text", **options))
    model: Any = hf.AutoModelForVisualQuestionAnswering.from_pretrained(models(name))
    processor = hf.AutoProcessor.from_pretrained(models(name))
    for row, (_, _, crop) in zip(rows_of(result.out, "crops"), crops_by_hand(data), strict=True):
        for number, question in enumerate(ask, start=1):
            answer = row[f"answer_{number}"]
            if crop is None:
                assert answer is None
                continue
            inputs = processor(images=crop, text=question, return_tensors="pt")
            with torch.inference_mode():
                if name == "vilt":
                    expected = model.config.id2label[int(model(**inputs).logits.argmax())]
                else:
                    found = model.generate(**inputs, max_new_tokens=5, do_sample=False, num_beams=1)
                    expected = processor.batch_decode(found, skip_special_tokens=True)[0].strip()
            assert answer == expected


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("qwen2_vl", ["what colour is it ?", "is it a cat ?"]),
        pytest.param("idefics3", ["what colour is it ?", "is it a cat ?"], marks=pytest.mark.slow),
        pytest.param("llava", None, marks=pytest.mark.slow),
    ],
    ids=["qwen2_vl", "idefics3", "llava"],
)
def test_chat_models_answer_as_in_a_chat_about_one_crop(
    data: Path, models: Any, tmp_path: Path, name: str, ask: list[str] | None
) -> None:
    options: dict[str, Any] = {"ask": ask, "max_new_tokens": 6, "batch_size": 4}
    result = crops(config_of(data, tmp_path / "out", models(name), "image-text-to-text", **options))
    model: Any = hf.AutoModelForImageTextToText.from_pretrained(models(name))
    processor = hf.AutoProcessor.from_pretrained(models(name))
    questions = (
        {"caption": "Describe this image."} if ask is None else dict(zip(("answer_1", "answer_2"), ask, strict=True))
    )
    answers, lengths = [], set()
    for row, (_, _, crop) in zip(rows_of(result.out, "crops"), crops_by_hand(data), strict=True):
        for column, question in questions.items():
            if crop is None:
                assert row[column] is None
                continue
            content = [{"type": "image", "image": crop}, {"type": "text", "text": question}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            found = model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=1)
            lengths.add(inputs["input_ids"].shape[1])
            text = processor.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
            assert row[column] == text.strip()
            answers.append(row[column])
    assert len(set(answers)) > 1, "the answers do not depend on the crop"
    assert len(lengths) > 1 or name != "qwen2_vl", "the batches are not padded"


def test_a_processor_that_needs_another_package_names_it(
    data: Path, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise ImportError("Package `num2words` is required to run SmolVLM processor.")

    monkeypatch.setattr(hf.AutoProcessor, "from_pretrained", failing)
    monkeypatch.setattr(driver, "is_connected", lambda: False)
    with pytest.raises(UserError, match="num2words"):
        crops(config_of(data, tmp_path / "out", models("git"), "image-text-to-text"))


def test_a_killed_run_goes_on_with_what_is_left(
    data: Path, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = crops(config_of(data, tmp_path / "whole", models("vit"), "image-classification", rows_per_file=2))
    config = config_of(data, tmp_path / "out", models("vit"), "image-classification", rows_per_file=2)
    real, done = crops_of, []

    def failing(work: Any, rows: range, *, num_threads: int) -> Any:
        done.append(rows)
        if len(done) == 3:
            raise KeyboardInterrupt
        return real(work, rows, num_threads=num_threads)

    monkeypatch.setattr(writing, "crops_of", failing)
    monkeypatch.setattr(driver, "is_connected", lambda: False)
    with pytest.raises(KeyboardInterrupt):
        crops(config)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert crops(config).num_crops == 18
    assert len(done) == 3 + 2, "finished files are not written again"
    assert rows_of(tmp_path / "out", "crops") == rows_of(whole.out, "crops")


def test_unreadable_images_have_rows_with_the_reason(data: Path, models: Any, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for row in rows_of(data / "images"):
        content = b"no image" if row["image_id"] == UNREADABLE else row["image"]["bytes"]
        (folder / row["image"]["path"]).write_bytes(content)
    config = CropsConfig(
        detections=str(data / "found"),
        data=str(folder),
        model=models("vit"),
        task="image-classification",
        out=str(tmp_path / "out"),
    )
    result = crops(config)
    rows = rows_of(result.out, "crops")
    assert len(rows) == 18 and result.num_errors == 4
    bad = [row for row in rows if row["image_id"] == UNREADABLE]
    assert len(bad) == 3 and all(row["label"] is None and "image" in row["error"] for row in bad)


def test_other_images_and_models_are_refused(data: Path, models: Any, tmp_path: Path) -> None:
    few = write_drawn(tmp_path / "few", [(np.zeros((8, 8, 3), np.uint8), [], [])])
    base: dict[str, Any] = {"model": models("vit"), "task": "image-classification", "out": str(tmp_path / "out")}
    with pytest.raises(UserError, match="does not hold the images of"):
        crops(CropsConfig(detections=str(data / "found"), data=few, **base))
    shuffled = tmp_path / "shuffled"
    with TableWriter(str(shuffled), open_table(str(data / "images")).schema, config_hash="1" * 12) as writer:
        writer.write_rows(rows_of(data / "images")[::-1])
    with pytest.raises(UserError, match="not those of"):
        crops(CropsConfig(detections=str(data / "found"), data=str(shuffled), **base))
    misfits: list[tuple[str, str, dict[str, Any]]] = [
        ("clip", "image-classification", {}),
        ("vit", "depth-estimation", {}),
        ("vilt", "image-text-to-text", {}),
        ("git", "image-text-to-text", {"ask": ["what colour is it ?"]}),
        ("vit", "zero-shot-image-classification", {"labels": ["cat"]}),
    ]
    for name, task, options in misfits:
        with pytest.raises(UserError, match=r"does not fit --model|set --ask|only describes images: omit --ask"):
            crops(config_of(data, tmp_path / "out2", models(name), task, **options))
    assert not (tmp_path / "out2").exists()


def test_pictures_that_were_read_by_windows_are_refused(data: Path, models: Any, tmp_path: Path) -> None:
    schema = build_schema("detections", CATEGORIES, extra_fields=PICTURE_FIELDS)
    with TableWriter(str(tmp_path / "found"), schema, config_hash="0" * 12) as writer:
        writer.write_rows([{**row, "crs": None, "transform": None} for row in rows_of(data / "found", "detections")])
    config = config_of(data, tmp_path / "out", models("vit"), "image-classification")
    with pytest.raises(UserError, match="predict --windowed read in parts"):
        crops(dataclasses.replace(config, detections=str(tmp_path / "found")))
    assert not (tmp_path / "out").exists()


def test_rows_without_lists_have_no_crops_and_damage_is_that_of_the_detections(
    data: Path, models: Any, tmp_path: Path
) -> None:
    found = tmp_path / "found"
    with TableWriter(str(found), open_table(str(data / "found")).schema, config_hash="0" * 12) as writer:
        writer.write_rows([{**row, "detections": None} for row in rows_of(data / "found", "detections")])
    config = config_of(data, tmp_path / "out", models("vit"), "image-classification", relabel=0.0)
    config = dataclasses.replace(config, detections=str(found))
    result = crops(config)
    assert result.num_crops == 0 and result.relabelled is not None
    assert [row["detections"]["score"] or [] for row in rows_of(result.relabelled, "detections")] == [[]] * 7
    part = next(found.glob("part-*.parquet"))
    content = part.read_bytes()
    part.write_bytes(content[:4] + b"\xff" * 40 + content[44:])
    with pytest.raises(UserError, match=f"^{found} is damaged"):
        crops(dataclasses.replace(config, out=str(tmp_path / "out2")))


def test_a_run_is_not_continued_with_other_detections(data: Path, models: Any, tmp_path: Path) -> None:
    config = config_of(data, tmp_path / "out", models("vit"), "image-classification")
    found = tmp_path / "found"
    shutil.copytree(data / "found", found)
    config = dataclasses.replace(config, detections=str(found))
    crops(config)
    shutil.rmtree(found)
    with TableWriter(str(found), open_table(str(data / "found")).schema, config_hash="1" * 12) as writer:
        writer.write_rows(rows_of(data / "found", "detections")[:-1])
    with pytest.raises(UserError, match=r"another run \(the detections have changed since\)"):
        crops(config)


def test_a_run_that_could_not_begin_leaves_the_folder_to_others(
    data: Path, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(driver, "is_connected", lambda: False)
    config = config_of(data, tmp_path / "out", models("vit"), "image-classification", precision="fp16")
    with pytest.raises(UserError, match=r"fp16 needs a GPU, but the model runs on the CPU here"):
        crops(config)
    assert crops(dataclasses.replace(config, precision="fp32")).num_crops == 18
    with pytest.raises(UserError, match=r"another run \(--margin: 0.0 → 1.0\)"):
        crops(dataclasses.replace(config, precision="fp32", margin=1.0))


def test_a_template_may_have_further_braces(data: Path, models: Any, tmp_path: Path) -> None:
    options = {"labels": ["cat", "dog"], "prompt_template": "a {} in {1}"}
    config = config_of(data, tmp_path / "out", models("clip"), "zero-shot-image-classification", **options)
    assert crops(config).num_crops == 18


def test_a_crop_is_whole_pixels_inside_the_image() -> None:
    assert box_of([-3.0, 2.2, 10.0, 5.1], 0.0, (20, 30)) == (0, 2, 7, 8)
    assert box_of([10.0, 5.0, 10.0, 10.0], 0.5, (20, 30)) == (5, 0, 25, 20)


@pytest.mark.parametrize(
    "options",
    [
        {"task": "zero-shot-image-classification"},
        {"task": "zero-shot-image-classification", "labels": ["cat", "dog", "cat"]},
        {"task": "image-classification", "labels": ["cat"]},
        {"task": "image-classification", "ask": ["what ?"]},
        {"task": "zero-shot-image-classification", "labels": ["cat"], "prompt_template": "no place"},
        {"task": "depth-estimation", "margin": -1.0},
        {"task": "depth-estimation", "relabel": 0.5},
        {"task": "image-classification", "relabel": 1.5},
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        CropsConfig(detections="d", data="i", model="m", out="o", **options)
