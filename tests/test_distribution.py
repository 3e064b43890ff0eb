"""The wheel, installed in an empty environment: the command, the demo, and jobs on a Ray head, without a clone."""

import json
import os
import pwd
import re
import secrets
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.local_head import free_port, running_head

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[1]
UV = str(Path(sys.executable).with_name("uv"))
CACHE = os.environ.get("UV_CACHE_DIR", str(Path(pwd.getpwuid(os.getuid()).pw_dir, ".cache", "uv")))
"""uv's cache of the user, because HOME is a private one in tests."""
RAY = "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; sys.exit(main())"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the wheel and the sdist."""
    out = tmp_path_factory.mktemp("dist")
    run([UV, "build", "--quiet", "--no-build-isolation", "--python", sys.executable, "--out-dir", str(out)], PROJECT)
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    """The wheel's path."""
    (wheel,) = dist.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and nothing but what it requires, in the versions of the lock."""
    folder = tmp_path_factory.mktemp("installed")
    run([UV, "venv", "--quiet", "--python", sys.executable, str(folder)], PROJECT)
    install = [UV, "pip", "install", "--quiet", "--python", f"{folder}/bin/python", "--constraint", "requirements.lock"]
    run([*install, str(wheel)], PROJECT, variables={"UV_CACHE_DIR": CACHE})
    return folder


def run(command: Sequence[str], cwd: Path, *, timeout_s: float = 600, variables: Mapping[str, str] = {}) -> str:
    """Run a command that has to succeed, without this project on Python's path, and return its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | dict(variables)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_and_sdist_hold_the_same_package(dist: Path, wheel: Path) -> None:
    files = {
        str(path.relative_to(PROJECT))
        for path in (PROJECT / "raydet").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == files
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in names if name.startswith("raydet/") and "." in Path(name).name} == files
    assert {"LICENSE", "README.md", "pyproject.toml"} < names and not any(name.startswith("tests") for name in names)


@pytest.mark.timeout(900)
def test_the_command_and_every_module_work_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    raydet = str(installed / "bin" / "raydet")
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", run([raydet, "--version"], tmp_path))
    assert "raydet demo" in run([raydet, "--help"], tmp_path)
    run([raydet, "prepare", "shapes", "--out", "data", "--num-train", "8", "--num-val", "4"], tmp_path)
    assert (tmp_path / "data" / "train" / ".manifest.json").exists()
    code = """
import importlib, pkgutil, raydet
for module in pkgutil.walk_packages(raydet.__path__, "raydet."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name not in ("av", "duckdb", "starlette", "uvicorn"):  # of extras
                raise
for name in raydet.__all__:
    getattr(raydet, name)
print(raydet.__file__)
"""
    assert run([f"{installed}/bin/python", "-c", code], tmp_path).startswith(str(installed))


@pytest.mark.timeout(1800)
def test_the_demo_passes(installed: Path, tmp_path: Path) -> None:
    said = run([str(installed / "bin" / "raydet"), "demo"], tmp_path, timeout_s=1700)
    (ap,) = re.findall(r"^best: AP (0\.\d+)", said, re.M)
    assert float(ap) > 0.5, said
    assert list((tmp_path / "runs" / "demo").rglob("*.html"))


@pytest.fixture(scope="module")
def bare(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with what raydet requires, but without raydet, as the nodes of a cluster may have."""
    folder = tmp_path_factory.mktemp("bare")
    # With pip, by which Ray installs what a job brings.
    run([UV, "venv", "--quiet", "--seed", "--python", sys.executable, str(folder)], PROJECT)
    (packages,) = (installed / "lib").glob("python*/site-packages")
    (own,) = (folder / "lib").glob("python*/site-packages")
    for path in packages.iterdir():
        if not path.name.startswith("raydet") and not os.path.lexists(own / path.name):
            (own / path.name).symlink_to(path)
    return folder


@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.parametrize("nodes_have_raydet", [True, False], ids=["installed", "sent"])
def test_a_job_needs_no_clone(
    installed: Path, wheel: Path, tmp_path: Path, request: pytest.FixtureRequest, nodes_have_raydet: bool
) -> None:
    nodes: Path = installed if nodes_have_raydet else request.getfixturevalue("bare")
    settings: dict[str, object] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}
    if not nodes_have_raydet:
        settings["py_modules"] = [str(wheel)]
    command = ["raydet"] if nodes_have_raydet else ["python", "-m", "raydet"]
    address = f"http://127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory(prefix="rdw", ignore_cleanup_errors=True) as home:
        variables = {
            "HOME": home,
            "PATH": f"{nodes}/bin:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
        with running_head(head_command(nodes, home, address), environment, address, Path(home, "head.log")):

            def submit(*words: str) -> str:
                client = [f"{installed}/bin/python", "-c", RAY, "job", "submit", "--address", address]
                options = ["--runtime-env-json", json.dumps(settings)]
                return run([*client, *options, "--", *command, *words], tmp_path, variables=variables)

            data, out = f"{tmp_path}/data", f"{tmp_path}/run"
            submit("prepare", "shapes", f"--out={data}", "--num-train=16", "--num-val=4", "--image-size=64")
            training = ["--model=rt_detr_v2_tiny", "--image-size=64", "--epochs=1", "--threads-per-worker=1"]
            said = submit("train", f"--train-data={data}/train", f"--val-data={data}/val", f"--out={out}", *training)
    assert "succeeded" in said and Path(out, "checkpoint", "config.json").exists()


def head_command(environment: Path, folder: str, address: str) -> list[str]:
    """Return the command of a Ray head with the packages of an environment."""
    command = [f"{environment}/bin/python", "-c", RAY, "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--num-cpus=2", f"--temp-dir={folder}/r", "--object-store-memory=300000000"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--include-dashboard=true"]
    command += [f"--port={free_port()}", f"--dashboard-port={address.rpartition(':')[2]}"]
    return [*command, f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
