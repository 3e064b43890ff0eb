"""Virtual environments with a package that the project does not install, because it needs other versions."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[1]


def run_with(
    package: str,
    script: str,
    folder: Path,
    *,
    cwd: Path,
    arguments: Sequence[str] = (),
    with_project: bool = False,
    timeout_s: float = 120,
    **variables: str,
) -> Any:
    """Run a script in a new virtual environment with a package; skip the test if the package cannot be installed.

    Args:
        package: Requirement of the package.
        script: Python code.
        folder: Folder for the environment.
        cwd: Working directory of the script.
        arguments: Arguments of the script.
        with_project: Let the script import raydet and its packages, unless the environment has another version.
        timeout_s: Limit for the script.
        variables: Further environment variables of the script.

    Returns:
        The JSON that the script prints last.
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True, timeout=120)
    python = str(folder / "venv" / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", package]
    done = subprocess.run(install, capture_output=True, text=True, timeout=400, check=False)
    if done.returncode:
        pytest.skip(f"{package} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    if with_project:
        (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        (site / "project.pth").write_text(f"{PROJECT}\n{sysconfig.get_path('purelib')}\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    command = [python, "-c", f"import json, sys\n{script}", *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
