"""Completion of commands, options, choices and files, and the scripts of the shells."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raydet.cli.commands import COMMANDS
from raydet.cli.completion import answers
from raydet.cli.main import main
from raydet.cli.usage import GROUPS
from raydet.config import field_names
from raydet.config.fields import flag

PROJECT = Path(__file__).parents[2]


def words(*line: str) -> list[str]:
    """The candidates after `raydet`, without their descriptions."""
    return [answer.partition("\t")[0] for answer in answers(line)]


def test_commands_and_formats() -> None:
    assert set(words("")) == {*(name.split()[0] for name in COMMANDS), "completion", "--help", "--version"}
    assert words() == words("")
    assert words("pre") == ["predict", "prepare"]
    for group in GROUPS:
        assert words(group, "") == [name.split()[1] for name in COMMANDS if name.startswith(group)] + ["--help"]
    assert words("completion", "") == ["bash", "zsh", "fish"]
    assert words("completion", "bash", "") == words("trian", "") == words("prepare", "cocoa", "") == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command(name: str) -> None:
    found = words(*name.split(), "--")
    assert {flag(field) for field in field_names(COMMANDS[name].config)} <= set(found)
    pages = ["--open"] if COMMANDS[name].writes_page else []
    assert found[-5 - len(pages) :] == ["--quiet", "--json", *pages, "--config", "--print-config", "--help"]
    assert all("\n" not in answer and answer.count("\t") == 1 for answer in answers([*name.split(), "--"]))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("predict --engine |", ["torch", "openvino", "onnx"]),
        ("predict --engine o|", ["openvino", "onnx"]),
        ("predict --engine=o|", ["--engine=openvino", "--engine=onnx"]),
        ("predict --engine = o|", ["openvino", "onnx"]),
        ("predict --engine =|", ["torch", "openvino", "onnx"]),
        ("predict --batch_size |", ["auto"]),
        ("predict --top-k |", []),
        ("predict --checkpoint |", [":files"]),
        ("predict --config pa|", [":files"]),
        ("predict --data a.jpg b|", [":files"]),
        ("predict --data a.jpg --che|", ["--checkpoint"]),
        ("predict --flip --no-fl|", []),
        ("predict --no-whole|", ["--no-whole-image"]),
        ("predict --checkpoint c --che|", []),
        ("predict --checkpoint=c --da|", ["--data"]),
        ("prepare voc --ann|", ["--annotations"]),
    ],
)
def test_what_fits_the_cursor(line: str, expected: list[str]) -> None:
    assert words(*line.removesuffix("|").split(" ")) == expected


def test_help_explains_each_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "--help"]) == 0
    page = capsys.readouterr().out
    assert all(f"raydet completion {shell}" in page for shell in ("bash", "zsh", "fish"))
    assert main(page.splitlines()[-1].split()[1:]) == 0


_BASH = """
source "$SCRIPT"
try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _raydet; echo "${COMPREPLY[@]}"; }
try raydet pre
try raydet predict --engine = o
try raydet predict --data 'a p'
"""
_FISH = """
source $SCRIPT
complete -C "raydet pre" | string replace -r '\\t.*' '' | string join ' '
complete -C "raydet predict --engine o" | string join ' '
complete -C "raydet predict --data a" | string join ' '
"""


@pytest.mark.parametrize(
    ("shell", "code"),
    [
        ("bash", _BASH),
        ("zsh", 'compdef() { print "$@" }; source "$SCRIPT"; functions _raydet >/dev/null && print known'),
        ("fish", _FISH),
    ],
)
def test_the_script_of_a_shell(shell: str, code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert main(["completion", shell]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "a photo.jpg").touch()
    program = tmp_path / "bin" / "raydet"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={PROJECT} exec {sys.executable} -m raydet "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "SCRIPT": str(tmp_path / "script")}
    run = subprocess.run(
        [shell, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    expected = {
        "bash": ["predict prepare", "openvino onnx", "a photo.jpg"],
        "zsh": ["_raydet raydet", "known"],
        "fish": ["predict prepare", "onnx openvino", "a\\ photo.jpg"],
    }
    assert (run.stderr, run.stdout.splitlines()) == ("", expected[shell])
