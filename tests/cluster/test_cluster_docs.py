"""The commands in the documentation: those in the first section of docs/cluster.md run, all others parse."""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from raydet.common.errors import UserError
from tests.command_lines import blocks_of, commands_of, config_of
from tests.local_head import free_port, running_head

PROJECT = Path(__file__).parents[2]
DOCUMENT = PROJECT / "docs" / "cluster.md"
DOCUMENTS = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
BINARIES = Path(sys.executable).parent
TRIED = "On this machine first"

_SHELL = ("bash", "sh", "")
_JOB = re.compile(r"python jobs/(\w+)\.py(.*)")
_RAYDET = re.compile(r"^(?:(?:\w+=\S+ )*|ray job submit .* -- (?:python -m )?)raydet (.*)")


def command_lines(path: Path) -> list[str]:
    return [line for block in blocks_of(path, *_SHELL) for line in commands_of(block)]


def raydet_words(line: str) -> list[str] | None:
    """Return the arguments of `raydet …` or of a job script in a shell line; None without one, or with an ellipsis."""
    job, direct = _JOB.search(line), _RAYDET.search(line)
    if "…" in line or not (job or direct):
        return None
    return [job[1], *shlex.split(job[2])] if job else shlex.split(direct[1] if direct else "")


def ray_words(line: str) -> list[str] | None:
    """Return the arguments of `ray` in a shell line, up to a pipe or redirection; None without `ray`."""
    line = re.sub(r"^\((.*)\)$", r"\1", line).rpartition("; ")[2]
    words = shlex.split(line)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words.pop(0)
    for mark in (">", "|"):
        words = words[: words.index(mark)] if mark in words else words
    return words[1:] if words and words[0] == "ray" and "…" not in line else None


def check_ray(words: list[str]) -> dict[str, Any]:
    """Parse a command with Ray's own parser, without running it; raises click.UsageError."""
    import click
    from ray.scripts.scripts import cli

    command: Any = cli
    while isinstance(command, click.Group):
        name, *words = words
        assert name in command.commands, f"ray has no command {name}"
        command = command.commands[name]
    parameters: dict[str, Any] = command.make_context(name, words).params
    return parameters


@pytest.mark.parametrize("path", DOCUMENTS, ids=[path.name for path in DOCUMENTS])
def test_every_command_of_a_document_has_options_that_there_are(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    for line in command_lines(path):
        words = raydet_words(line)
        if words is not None and words != ["--help"]:
            try:
                config_of(words)
            except (UserError, AssertionError) as error:
                pytest.fail(f"{path.name}: {line}\n{error}")


def test_every_command_of_ray_in_the_cluster_document_is_one_of_its() -> None:
    found = [words for line in command_lines(DOCUMENT) if (words := ray_words(line)) is not None]
    assert {words[0] for words in found} >= {"start", "job", "up", "down", "dashboard", "exec", "get-auth-token"}
    for words in found:
        check_ray(words)


@pytest.mark.parametrize("block", list(blocks_of(DOCUMENT, "bash")), ids=lambda block: block.split("\n")[0][:40])
def test_the_shell_understands_the_cluster_document(block: str) -> None:
    done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_wrong_commands_are_noticed() -> None:
    import click

    assert raydet_words("RAY_ADDRESS=auto raydet train --epochs 3  # more") is not None
    assert raydet_words("raydet train --train-data s3://… --out x") is None
    assert raydet_words("pip install raydet") is None
    for job in ("python jobs/train.py", "raydet train", "python -m raydet train"):
        words = raydet_words(f"ray job submit --working-dir . -- {job} --epoch 3")
        assert words == ["train", "--epoch", "3"]
    with pytest.raises(UserError, match="unknown option --epoch"):
        config_of(["train", "--epoch", "3"])
    assert ray_words("(umask 077; ray get-auth-token --generate > /dev/null)") == ["get-auth-token", "--generate"]
    with pytest.raises(click.UsageError, match="No such option"):
        check_ray(["job", "submit", "--workingdir", ".", "--", "python"])


def blocks_to_try() -> list[str]:
    section = DOCUMENT.read_text(encoding="utf-8").partition(f"## {TRIED}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```bash\n(.*?)^```", section, re.M | re.S)


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_the_first_section_runs_as_it_stands() -> None:
    """The section runs unchanged, except for private HOME, ports, temporary files and table folder."""
    ports = {"6379": str(free_port()), "8265": str(free_port())}
    with tempfile.TemporaryDirectory(prefix="rdd", ignore_cleanup_errors=True) as folder:
        own = {**ports, "/tmp/raydet-first": f"{folder}/first", "source .venv/bin/activate": "true"}
        preparing, starting, *using = [
            re.sub("|".join(map(re.escape, own)), lambda match: own[match[0]], block) for block in blocks_to_try()
        ]
        (start,) = commands_of(starting)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"HOME": folder, "PATH": f"{BINARIES}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
        done = subprocess.run(["bash", "-e"], input=preparing, env=environment, cwd=PROJECT, text=True, timeout=60)
        assert done.returncode == 0
        assert Path(folder, ".ray", "auth_token").stat().st_mode & 0o077 == 0
        limits = [f"--temp-dir={folder}/r", "--num-cpus=2", "--object-store-memory=300000000"]
        limits += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
        setting, ray, *options = shlex.split(start)
        name, _, value = setting.partition("=")
        command = [str(BINARIES / ray), *options, *limits]
        address = f"http://127.0.0.1:{ports['8265']}"
        of_head = {**environment, "RAY_AUTH_MODE": "token", name: value}
        with running_head(command, of_head, address, Path(folder, "head.log")):
            script = "\n".join(["export RAY_AUTH_MODE=token", *using])
            done = subprocess.run(
                ["bash", "-e"], input=script, env=environment, cwd=PROJECT, capture_output=True, text=True, timeout=800
            )
        assert done.returncode == 0, done.stdout + done.stderr
        assert Path(folder, "first", "run", "checkpoint", "config.json").is_file()
        assert "AP50" in done.stdout and "SUCCEEDED" in done.stdout + done.stderr
        assert done.stdout.rstrip().endswith("401")
