"""`evaluate --verify` runs pycocotools on the same boxes and says whether every bit is equal."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.generated_boxes import generate, write_tables
from raydet.cli.main import main
from raydet.common.errors import UserError
from raydet.config import EvaluateConfig, ReportConfig
from raydet.measuring import verification
from raydet.measuring.evaluate import evaluate
from raydet.measuring.numbers.metrics import accumulate
from raydet.reporting.report import report
from tests.measuring.test_evaluate import (
    coco_to_rows,
    made_up_results,
    numbers,
    pycocotools_stats,
    results_to_rows,
    write_detections,
    write_images,
)


@pytest.fixture
def config(test_data: Path, tmp_path: Path) -> EvaluateConfig:
    """Tables of 87 images, to be verified; `results.json` beside them has the same detections."""
    content = json.loads((test_data / "bccd" / "instances_val.json").read_bytes())
    results = made_up_results(content, seed=1)
    rows, categories = coco_to_rows(content)
    write_images(tmp_path / "truth", rows, categories)
    write_detections(tmp_path / "detections", results_to_rows(results, rows, categories), categories)
    (tmp_path / "results.json").write_text(json.dumps(results))
    return EvaluateConfig(truth=str(tmp_path / "truth"), detections=str(tmp_path / "detections"), verify=True)


def arguments(config: EvaluateConfig, *more: str) -> list[str]:
    return ["evaluate", "--truth", config.truth, "--detections", config.detections, "--verify", *more]


def report_of(metrics: Path) -> str:
    return Path(report(ReportConfig(metrics=str(metrics), num_images=0)).out).read_text("utf-8")


def test_tables_and_json_are_verified(config: EvaluateConfig, test_data: Path, tmp_path: Path) -> None:
    truth, results = test_data / "bccd" / "instances_val.json", tmp_path / "results.json"
    expected = pycocotools_stats(truth, results)
    for inputs in (config, dataclasses.replace(config, truth=str(truth), detections=str(results))):
        evaluation = evaluate(inputs)
        found = evaluation.verification
        assert found is not None and found.differing == () and evaluation.exit_code == 0
        assert [theirs for _, theirs in found.numbers.values()] == expected == numbers(evaluation)
        assert (found.num_images, found.num_measured) == (87, 87)
        lines = "\n".join(evaluation.lines())
        assert lines.count(repr(expected[0])) == 2 and "verified: equal to pycocotools" in lines
    assert evaluate(dataclasses.replace(config, verify=False)).verification is None


def test_the_report_says_verified(config: EvaluateConfig, tmp_path: Path) -> None:
    out = tmp_path / "metrics"
    unverified = dataclasses.replace(config, out=str(out), bootstrap=0, verify=False)
    evaluate(unverified)
    assert "erified:" not in report_of(out)
    # The option does not change the result, so the same run may be measured again.
    assert main(arguments(config, "--out", str(out), "--bootstrap", "0")) == 0
    assert "Verified: equal to pycocotools" in report_of(out) and "over all 87 images" in report_of(out)


@pytest.mark.parametrize(("limit", "most"), [("_MAX_IMAGES", 20), ("_MAX_BOXES", 600)])
def test_of_many_images_a_random_sample_is_compared(
    config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch, limit: str, most: int
) -> None:
    monkeypatch.setattr(verification, limit, most)
    samples = []
    for seed in (0, 0, 1):
        found = evaluate(dataclasses.replace(config, seed=seed)).verification
        assert found is not None and found.differing == ()
        assert 10 < found.num_images < 40 and f"a random sample of {found.num_images} of 87 images" in found.outcome
        samples.append(found.numbers)
    assert samples[0] == samples[1] != samples[2]


@pytest.mark.slow
def test_fifty_thousand_images_are_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tables([generate(50_000, 350_000, 500_000, seed=3)], tmp_path)
    assert main(["evaluate", "--truth", f"{tmp_path}/truth", "--detections", f"{tmp_path}/detections", "--verify"]) == 0
    *_, outcome = capsys.readouterr().out.splitlines()
    assert outcome.startswith("verified: equal to pycocotools")
    assert outcome.endswith("over a random sample of 5,000 of 50,000 images")


def test_one_different_bit_fails(
    config: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def off_by_one_bit(*args: object, **options: object) -> object:
        result = accumulate(*args, **options)  # type: ignore[arg-type]
        assert result.AP75 is not None
        return dataclasses.replace(result, values={**result.values, "AP75": result.AP75 * (1 + 2**-52)})

    monkeypatch.setattr("raydet.measuring.evaluate.accumulate", off_by_one_bit)
    assert main(arguments(config, "--out", str(tmp_path / "metrics"), "--bootstrap", "0")) == 1
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line.endswith("differs")] == ["AP75"]
    assert out.count("NOT VERIFIED") == 1 and "differs in AP75, over all 87 images" in out
    assert "differs in AP75, over all 87 images" in report_of(tmp_path / "metrics")


def test_nothing_to_find_and_nothing_found(config: EvaluateConfig, test_data: Path, tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("[]")
    content = json.loads((test_data / "bccd" / "instances_val.json").read_bytes())
    content["annotations"] = [item for item in content["annotations"] if item["area"] > 96**2]
    (tmp_path / "large.json").write_text(json.dumps(content))
    evaluation = evaluate(
        dataclasses.replace(config, truth=str(tmp_path / "large.json"), detections=str(tmp_path / "none.json"))
    )
    assert evaluation.verification is not None and evaluation.verification.differing == ()
    assert evaluation.verification.numbers["AP"] == (0.0, 0.0)
    assert evaluation.verification.numbers["APs"] == (None, None)
    assert "–" in "\n".join(evaluation.verification.lines())


@pytest.mark.parametrize(
    "options", [{"protocol": "voc"}, {"iou_thresholds": [0.5]}, {"max_detections": [1]}, {"class_agnostic": True}]
)
def test_other_rules_cannot_be_verified(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match="--verify"):
        EvaluateConfig(truth="a", detections="b", verify=True, **options)  # type: ignore[arg-type]


def test_pycocotools_is_loaded_by_this_option_alone(config: EvaluateConfig) -> None:
    code = (
        "import sys; from raydet.cli.main import main; main(sys.argv[1:]); "
        "print('pycocotools' in sys.modules, 'torchmetrics' in sys.modules)"
    )
    for options, loaded in ((arguments(config)[:-1], "False False"), (arguments(config), "True False")):
        run = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, check=True)
        assert run.stdout.splitlines()[-1] == loaded
