"""The command line as a user meets it: exit codes, one line for a mistake, nothing left behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from raydet.cli.main import main
from raydet.tables.table import is_table


def _run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_prepare_and_evaluate_say_what_they_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--num-train", "4", "--num-val", "3", "--image-size", "64"]
    code, out, err = _run(["prepare", "shapes", "--out", str(tmp_path / "s"), *options], capsys)
    assert (code, err) == (0, "")
    assert is_table(str(tmp_path / "s" / "train")) and is_table(str(tmp_path / "s" / "val"))
    assert "7" in out
    results = tmp_path / "results.json"
    results.write_text("[]")
    code, out, err = _run(["evaluate", "--truth", str(tmp_path / "s" / "val"), "--detections", str(results)], capsys)
    assert (code, err) == (0, "")
    assert all(name in out for name in ("AP50", "AR100", "rectangle"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command `trian`"),
        (["prepare", "cocoa"], "unknown command `prepare cocoa`"),
        (["train", "--train-data", "absent", "--val-data", "absent", "--out", "OUT"], "no such table"),
        (["train", "--learning-rat", "1"], "did you mean --learning-rate?"),
        (
            ["train", "--train-data", "a", "--val-data", "b", "--out", "OUT", "--num-workers", "0"],
            "must be a number above 0",
        ),
        (["train", "--config", "absent.yaml"], "no such config file"),
        (["predict", "--checkpoint", "tests", "--data", "absent", "--out", "OUT"], "holds no model"),
        (["evaluate", "--truth", "absent", "--detections", "absent"], "absent"),
        (["prepare", "coco", "--annotations", "absent.json", "--images", ".", "--out", "OUT"], "absent.json"),
        (["prepare", "images", "--images", "absent", "--out", "OUT"], "absent"),
        (["push", "--checkpoint", "absent", "--repo", "ann/model"], "no such model folder: absent"),
        (["push", "--checkpoint", "tests", "--repo", "model"], "--repo must be owner/name"),
        (["push", "--checkpoint", "tests"], "--repo"),
        (["demo", "--recipe", "absent.yaml", "--out", "OUT"], "no such recipe"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = _run([str(tmp_path / "out") if word == "OUT" else word for word in arguments], capsys)
    assert code == 2 and out == ""
    assert message in err and err.startswith("raydet: error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["prepare", "--help"]):
        code, out, _ = _run(arguments, capsys)
        assert code == 0 and all(name in out for name in ("prepare coco", "evaluate", "push"))
    code, out, _ = _run(["--version"], capsys)
    assert code == 0 and out.strip().count(".") == 2


@pytest.mark.parametrize("job", ["prepare", "train", "predict", "evaluate"])
def test_jobs_hand_their_options_on(job: str) -> None:
    root = Path(__file__).parents[2]
    arguments = ["shapes", "--wrong", "1"] if job == "prepare" else ["--wrong", "1"]
    run = subprocess.run(
        [sys.executable, str(root / "jobs" / f"{job}.py"), *arguments],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 2
    assert "unknown option --wrong" in run.stderr and run.stderr.count("\n") == 1
