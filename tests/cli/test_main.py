"""The command line: exit codes, one line per error, no files left behind."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from raydet.cli.commands import COMMANDS
from raydet.cli.main import main
from raydet.cli.usage import GROUPS
from raydet.config import fields_of, is_required
from raydet.config.fields import flag
from raydet.tables.table import is_table
from tests.command_lines import config_of

PROJECT = Path(__file__).parents[2]


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
    ("arguments", "facts"),
    [
        (["trian"], ("`trian`", "`train`")),
        (["prepare", "cocoa"], ("`prepare cocoa`", "`prepare coco`")),
        (["qwertz"], ("`qwertz`", "raydet --help")),
        (["detect"], ("`detect`", "`predict`")),
        (["prepare", "--out", "OUT"], ("prepare needs a format", "coco, voc")),
        (["export", "qwertz"], ("`export qwertz`", "coco, voc")),
        (["completion", "tcsh"], ("bash, zsh, fish", "tcsh")),
        (["predict", "--chekpoint", "a"], ("--chekpoint", "did you mean --checkpoint?")),
        (["train", "--train-data", "absent", "--val-data", "absent", "--out", "OUT"], ("absent",)),
        (["train", "--learning-rat", "1"], ("--learning-rat", "--learning-rate")),
        (
            ["train", "--train-data", "a", "--val-data", "b", "--out", "OUT", "--num-workers", "0"],
            ("--num-workers", "0"),
        ),
        (["train", "--config", "absent.yaml"], ("absent.yaml",)),
        (["predict", "--checkpoint", "tests", "--data", "absent", "--out", "OUT"], ("tests", "model")),
        (["evaluate", "--truth", "absent", "--detections", "absent"], ("absent",)),
        (["prepare", "coco", "--annotations", "absent.json", "--images", ".", "--out", "OUT"], ("absent.json",)),
        (["prepare", "images", "--images", "absent", "--out", "OUT"], ("absent",)),
        (["push", "--checkpoint", "absent", "--repo", "ann/model"], ("absent",)),
        (["push", "--checkpoint", "tests", "--repo", "model"], ("--repo", "owner/name")),
        (["push", "--checkpoint", "tests"], ("--repo",)),
        (["demo", "--train-config", "absent.yaml", "--out", "OUT"], ("absent.yaml",)),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], facts: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = _run([str(tmp_path / "out") if word == "OUT" else word for word in arguments], capsys)
    assert code == 2 and out == ""
    assert all(fact in err for fact in facts), err
    assert err.startswith("raydet: error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["help"]):
        code, out, _ = _run(arguments, capsys)
        assert code == 0 and all(f"  {name} " in out for name in COMMANDS)
    code, out, _ = _run(["--version"], capsys)
    assert code == 0 and out.strip().count(".") == 2


def test_help_of_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(GROUPS) == {name.split()[0] for name in COMMANDS if " " in name}
    for group in GROUPS:
        formats = [name for name in COMMANDS if name.startswith(f"{group} ")]
        for arguments in ([group, "--help"], [group, "-h"], ["help", group]):
            code, out, _ = _run(arguments, capsys)
            assert code == 0 and all(f"  {name} " in out for name in formats)
            assert not any(f"  {name} " in out for name in COMMANDS if name not in formats)
        assert _run([group], capsys)[0] == 2


@pytest.mark.parametrize("arguments", [["--help"], *([group, "--help"] for group in GROUPS)])
def test_lists_of_commands_end_with_an_example(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = _run(arguments, capsys)
    *_, title, example = out.splitlines()
    assert title == "Example:"
    program, *words = shlex.split(example)
    assert program == "raydet" and config_of(words) is not None


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that the page lists every option once, required ones first, and ends with a valid example."""
    command = COMMANDS[name]
    with pytest.raises(SystemExit) as stop:
        main(["help", *name.split()])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    spelled = [line.split()[0] for line in page.splitlines() if re.match("  --", line)]
    fields = fields_of(command.config)
    shared = ["--config", "--print-config", "--quiet", "--json", "--open"]
    assert sorted(spelled) == sorted([*(flag(item.name) for item in fields), *shared])
    required = {flag(item.name) for item in fields if is_required(item)}
    assert set(spelled[: len(required)]) == required
    assert max(map(len, page.splitlines())) <= 120 + len(command.example)
    program, *words = shlex.split(page.splitlines()[-1])
    assert program == "raydet" and " ".join(words).startswith(name)
    assert isinstance(config_of(words), command.config)


@pytest.mark.parametrize("line", ["--help", "predict --help", "demo --print-config", "completion bash"])
def test_a_reader_may_close_the_pipe_early(line: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "raydet", *line.split()]
    run = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write_end)
    assert (run.returncode, run.stderr) == (0, "")


JOBS_TO_COPY = {"sweep", "nightly", "release_gate"}


@pytest.mark.parametrize("job", sorted((PROJECT / "jobs").glob("*.py")), ids=lambda path: path.stem)
def test_jobs_run_commands(job: Path) -> None:
    command = job.stem.removesuffix("_data")
    arguments = ["shapes", "--wrong", "1"] if command == "prepare" else ["--wrong", "1"]
    run = subprocess.run(
        [sys.executable, str(job), *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False
    )
    assert command in {*JOBS_TO_COPY, *(name.split()[0] for name in COMMANDS)}
    assert run.returncode == 2
    assert "--wrong" in run.stderr and run.stderr.count("\n") == 1
