"""The project: light imports, layout, docstrings, the lock file, run files, import order, and make targets."""

import ast
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from raydet.config import TrainConfig
from raydet.config.options import load_file

PROJECT = Path(__file__).parents[1]
LOCKS = [PROJECT / "requirements.lock", PROJECT / "requirements-lowest.lock"]
RUN_FILES = [
    *sorted(path for path in (PROJECT / "jobs" / "configs").glob("*.yaml") if path.stem != "tune"),
    PROJECT / "raydet" / "cli" / "demo.yaml",
]

HEAVY = ("torch", "torchvision", "transformers", "albumentations", "torchmetrics", "datasets", "ray")

# Modules that every decode worker imports. Each heavy package would cost seconds and most of a gigabyte.
LIGHT_MODULES = (
    "cluster.forecast.plan",
    "common.boxes",
    "common.errors",
    "config",
    "images.decode",
    "models.geometry",
    "preparation.sources.source",
    "tables.schema",
    "tables.storage",
    "tables.table",
    "training.feeding.ordering",
)


def heavy_imports(code: str) -> list[str]:
    """Run code in a new interpreter and return the heavy packages that it imported."""
    report = f"\nimport sys\nprint('HEAVY', *[name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1].split()[1:]


def test_heavy_imports_are_noticed(tmp_path: Path) -> None:
    """Check that direct and indirect imports are reported, with empty packages of these names, which import fast."""
    for name, content in (("torch", ""), ("torchvision", "import torch")):
        (tmp_path / f"{name}.py").write_text(content)
    assert heavy_imports(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport torchvision") == [
        "torch",
        "torchvision",
    ]


def test_light_modules_import_nothing_heavy() -> None:
    modules = [*(f"raydet.{name}" for name in LIGHT_MODULES), "raydet", "raydet.cli.main"]
    code = f"""
import importlib, sys
for module in {modules!r}:
    importlib.import_module(module)
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    assert not heavy, f"{{module}} imports {{heavy}}"
"""
    assert heavy_imports(code) == []


def test_help_and_completion_import_nothing_heavy() -> None:
    code = """
from raydet.cli.main import main
for words in ("--help", "prepare --help", "completion words -- predict --engine o"):
    assert main(words.split()) == 0
try:
    main(["predict", "--help"])
except SystemExit as end:
    assert not end.code, end.code
"""
    assert heavy_imports(code) == []


def test_the_libraries_of_other_metrics_are_imported_by_what_uses_them_alone() -> None:
    code = """
import importlib, pkgutil, sys
import raydet
users = {"raydet.measuring.coco_ap": "torchmetrics", "raydet.measuring.verification": None}
for module in pkgutil.walk_packages(raydet.__path__, "raydet."):
    if module.name not in users and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from raydet.models.loading import build_detector
from raydet.tables.schema import Category
build_detector("rt_detr_v2_tiny", [Category(1, "cell")], image_size=64, seed=0)
judges = {"torchmetrics", "pycocotools"}
assert not judges & set(sys.modules), judges & set(sys.modules)
for name, library in users.items():
    importlib.import_module(name)
    assert (judges & set(sys.modules)) == ({library} if library else {"torchmetrics"}), name
"""
    assert {"ray", "torch", "transformers"} <= set(heavy_imports(code))


def test_help_of_the_installed_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = Path(sys.executable).with_name("raydet")
    started = time.perf_counter()
    result = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=60)
    seconds = time.perf_counter() - started
    with capsys.disabled():
        print(f" [raydet --help: {seconds:.2f} s]", end="")
    assert result.returncode == 0, result.stderr
    for name in ("prepare", "train", "predict", "evaluate", "demo"):
        assert name in result.stdout


MOST_MODULES = 14
"""Per package, not counting `__init__.py`."""
QUESTION = re.compile(r"(What|Where|Whether|How|Who|When|Why|Which)\b")


def test_packages_are_small() -> None:
    assert {path.name for path in (PROJECT / "raydet").glob("*.py")} == {"__init__.py", "__main__.py"}
    num_modules = Counter(path.parent for path in (PROJECT / "raydet").rglob("*.py") if path.name != "__init__.py")
    assert {str(folder): number for folder, number in num_modules.items() if number > MOST_MODULES} == {}


def test_docstrings_are_statements() -> None:
    found = [
        f"{path.relative_to(PROJECT)}:{node.lineno}: {node.value.value.splitlines()[0]}"
        for path in sorted((PROJECT / "raydet").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        # Besides docstrings, these are the texts below attributes.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if QUESTION.match(node.value.value.lstrip())
    ]
    assert found == []


@pytest.mark.parametrize("path", RUN_FILES, ids=[path.stem for path in RUN_FILES])
def test_run_files_are_training_configs(path: Path) -> None:
    config = load_file(TrainConfig, str(path), train_data="train", val_data="val", out="run")
    assert config.out == "run"


def test_a_wheel_holds_the_files_that_are_read_at_run_time() -> None:
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packaged = {path for pattern in settings["package-data"]["raydet"] for path in (PROJECT / "raydet").glob(pattern)}
    others = {path for path in (PROJECT / "raydet").rglob("*.*") if path.suffix not in (".py", ".pyc")}
    assert others == packaged


@pytest.mark.parametrize("lock", LOCKS, ids=[lock.stem for lock in LOCKS])
def test_a_lock_pins_all_that_the_project_names_by_hash(lock: Path) -> None:
    text = lock.read_text()
    assert [line for line in text.splitlines() if re.search(r"https?://|file:|git\+| @ ", line)] == []
    pins = {}
    for entry in re.split(r"\n(?=[a-zA-Z0-9])", text.strip()):
        match = re.match(r"([A-Za-z0-9._-]+)==([^ ]+)", entry)
        assert match and "--hash=sha256:" in entry, entry.splitlines()[0]
        pins[normalise(match[1])] = match[2]
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    # The editable install is built without isolation, with the setuptools of the lock.
    for item in map(Requirement, [*wanted, "setuptools"]):
        assert item.name == "raydet" or item.specifier.contains(pins[normalise(item.name)]), item
    assert len(pins) > 50


def normalise(name: str) -> str:
    """Return the canonical spelling of a package name."""
    return re.sub(r"[-_.]+", "-", name).lower()


VIOLATIONS = [
    ("models/geometry", "import ray", "raydet.models.geometry -> ray "),
    ("common/boxes", "import torch", "raydet.common.boxes -> torch "),
    ("measuring/slices", "from raydet.scoring import predict", "raydet.measuring.slices -> raydet.scoring.predict "),
    ("newcomer", "pass", "- raydet.newcomer"),
]
"""Module, a line added to it, and the resulting message of the linter."""


def test_the_order_of_imports_is_enforced(tmp_path: Path) -> None:
    shutil.copytree(PROJECT / "raydet", tmp_path / "raydet")
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    for module, line, _ in VIOLATIONS:
        with (tmp_path / "raydet" / f"{module}.py").open("a") as file:
            file.write(f"\n\ndef _late() -> None:\n    {line}\n")
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stdout + result.stderr
    for _, _, evidence in VIOLATIONS:
        assert evidence in result.stdout + "\n"


def test_a_name_of_a_type_is_used_once() -> None:
    names: dict[str, list[str]] = {}
    for path in (PROJECT / "raydet").rglob("*.py"):
        for name in re.findall(r"^class _?(\w+)", path.read_text("utf-8"), re.M):
            names.setdefault(name, []).append(str(path.relative_to(PROJECT)))
    assert {name: paths for name, paths in names.items() if len(paths) > 1} == {}


def test_make_help_lists_the_commands() -> None:
    listed = make("help")
    for target in (
        "demo",
        "test",
        "test-all",
        "test-gpu",
        "test-dist",
        "test-lowest",
        "lint",
        "format",
        "lock",
        "dist",
    ):
        assert f"make {target} " in listed


def test_make_test_is_the_fast_tier() -> None:
    assert '-m "not slow and not cluster and not browser and not gpu and not hostile"' in make("-n", "test")


def test_setup_takes_packages_by_hash_only() -> None:
    commands = [line for line in make("-n", "-B", "setup").splitlines() if "uv pip install" in line]
    assert len(commands) == 2
    assert "--require-hashes -r requirements.lock" in commands[0]
    assert "--no-deps --no-build-isolation -e ." in commands[1]


def test_an_old_python_is_refused_with_one_clear_line(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        (tmp_path / name).write_bytes((PROJECT / name).read_bytes())
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1 || exit 1\n')
    old.chmod(0o755)
    result = subprocess.run(
        ["make", "PYTHON=./old", "setup"], cwd=tmp_path, env=make_environment(), capture_output=True, text=True
    )
    assert result.returncode != 0
    assert all(text in result.stderr for text in ("3.11", "./old", "3.8.1"))
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(
    ("failing", "ran", "succeeds"), [("none", ["lint", "test"], True), ("lint", ["lint"], False)], ids=["green", "red"]
)
def test_ci_runs_lint_then_test_and_stops_at_a_failure(
    tmp_path: Path, failing: str, ran: list[str], succeeds: bool
) -> None:
    journal = tmp_path / "journal"
    recorder = tmp_path / "make"
    recorder.write_text(f'#!/bin/sh\necho "$@" >> {journal}\n[ "$1" != {failing} ]\n')
    recorder.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run([PROJECT / ".ci" / "run"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert journal.read_text().split() == ran
    assert (result.returncode == 0) is succeeds


def test_the_workflow_runs_what_there_is() -> None:
    workflow = yaml.safe_load((PROJECT / ".github" / "workflows" / "ci.yml").read_text())
    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert {".ci/run", "make docs", "make test-dist", "make test-lowest"} <= set(runs)
    targets = re.findall(r"^  make (\S+)", make("help"), re.M)
    assert {run.removeprefix("make ") for run in runs if run.startswith("make ")} <= set(targets)
    classifiers = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["classifiers"]
    declared = [item.rpartition(" ")[2] for item in classifiers if re.search(r"Python :: 3\.\d", item)]
    assert workflow["jobs"]["check"]["strategy"]["matrix"]["python"] == declared


def test_commit_hooks_are_valid() -> None:
    command = [sys.executable, "-m", "pre_commit", "validate-config", ".pre-commit-config.yaml"]
    subprocess.run(command, cwd=PROJECT, check=True, timeout=60)


def make(*arguments: str) -> str:
    """Return the output of make."""
    command = ["make", "--no-print-directory", *arguments]
    result = subprocess.run(command, cwd=PROJECT, env=make_environment(), capture_output=True, text=True, check=True)
    return result.stdout


def make_environment() -> dict[str, str]:
    """Return the environment without the variables of an outer `make test`."""
    return {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
