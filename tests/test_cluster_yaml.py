"""cluster.yaml passes Ray's own validation, and the checks of what that lets through."""

import copy
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).parents[1]
SPEC = PROJECT / "cluster.yaml"

SECRET = re.compile(
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|hf_[A-Za-z]{20,}|-----BEGIN|(?i:(secret|token|password|access_key)\w*\s*[:=]\s*\S)"
)


def load_spec() -> dict[str, Any]:
    spec = yaml.safe_load(SPEC.read_text())
    assert isinstance(spec, dict)
    return spec


def validate_with_ray(spec: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(spec))
    validate_config(prepared)
    return prepared


def find_faults(spec: dict[str, Any], text: str = "") -> list[str]:
    """What Ray accepts though it would not work, or not safely."""
    faults = []
    if legacy := {"min_workers", "head_node", "worker_nodes"} & spec.keys():
        faults.append(f"legacy keys: {sorted(legacy)}")
    groups = spec["available_node_types"]
    head = groups[spec["head_node_type"]]
    if head["resources"].get("CPU") != 0:
        faults.append("the head offers CPUs")
    for name, group in groups.items():
        node = group["node_config"]
        for key in ("InstanceType", "ImageId"):
            if not isinstance(node.get(key), str):
                faults.append(f"{name}: no {key}")
        if group is not head:
            if not 0 <= group.get("min_workers", 0) <= group.get("max_workers", -1):
                faults.append(f"{name}: min_workers and max_workers do not fit")
            if group["max_workers"] > spec["max_workers"]:
                faults.append(f"{name}: more than the whole cluster")
        is_gpu_instance = re.match(r"(g|p)\d", node.get("InstanceType", "")) is not None
        if is_gpu_instance != (group["resources"].get("GPU", 0) > 0):
            faults.append(f"{name}: {node.get('InstanceType')} and its GPU resources do not fit")
    setup = " && ".join(spec.get("setup_commands", []))
    if "requirements.lock" not in setup or "make setup" not in setup:
        faults.append("setup_commands do not install the lock")
    commands = [spec.get(f"{kind}_start_ray_commands") for kind in ("head", "worker")]
    if not all(commands):
        faults.append("no start commands of our own: the defaults open the dashboard to everyone")
    if "0.0.0.0" in text or re.search(r"host=(?!127\.0\.0\.1)", str(commands)):
        faults.append("something listens to everyone")
    if SECRET.search(text):
        faults.append("a secret")
    return faults


def test_ray_accepts_it() -> None:
    prepared = validate_with_ray(load_spec())
    assert prepared["available_node_types"]["head"]["max_workers"] == 0
    # Ray's default would install a nightly build over the lock.
    assert not any("ray-wheels" in command for command in prepared["worker_setup_commands"])


def test_our_own_checks_find_nothing() -> None:
    assert find_faults(load_spec(), SPEC.read_text()) == []


def test_decoding_grows_and_the_model_runs_on_spot() -> None:
    groups = load_spec()["available_node_types"]
    gpu = [group for group in groups.values() if group["resources"].get("GPU")]
    cpu = [
        group
        for name, group in groups.items()
        if name != load_spec()["head_node_type"] and not group["resources"].get("GPU")
    ]
    assert [group["node_config"]["InstanceMarketOptions"]["MarketType"] for group in gpu] == ["spot"]
    assert len(cpu) == 1
    assert cpu[0]["max_workers"] > cpu[0]["min_workers"]
    assert load_spec()["idle_timeout_minutes"] > 0


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (["min_workers"], 1, "legacy"),
        (["available_node_types", "head", "resources"], {}, "head offers CPUs"),
        (["available_node_types", "decode", "node_config"], {"machineType": "n2-standard-8"}, "no InstanceType"),
        (["available_node_types", "model", "resources"], {"CPU": 8}, "GPU resources"),
        (["available_node_types", "model", "min_workers"], 9, "min_workers"),
        (["setup_commands"], [], "lock"),
        (["head_start_ray_commands"], ["ray start --head --dashboard-host=::"], "listens"),
    ],
)
def test_our_own_checks_catch_what_ray_lets_through(path: list[str], value: object, fault: str) -> None:
    spec = load_spec()
    place = spec
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    validate_with_ray(spec)
    assert any(fault in found for found in find_faults(spec))


@pytest.mark.parametrize("line", ["aws_secret_access_key: abc", "RAY_AUTH_TOKEN=abc", "key: AKIAABCDEFGHIJKLMNOP"])
def test_a_secret_is_noticed(line: str) -> None:
    assert find_faults(load_spec(), line) == ["a secret"]


def test_mounts_are_what_an_installation_needs() -> None:
    mounts = load_spec()["file_mounts"]
    for remote, local in mounts.items():
        assert remote == f"~/raydet/{local}"
        # Ray reads everything below a mount, so the whole project with its .venv must not be one.
        assert local not in (".", "", ".venv")
        assert (PROJECT / local).exists(), f"{local} is mounted and not there"
    metadata = (PROJECT / "pyproject.toml").read_text()
    needed = {"Makefile", "pyproject.toml", "requirements.lock", "raydet"}
    needed |= {name for name in ("README.md", "LICENSE") if f'"{name}"' in metadata}
    assert needed <= set(mounts.values())


def test_a_submitted_job_takes_along_its_code_and_little_else(tmp_path: Path) -> None:
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(PROJECT), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    names = set(zipfile.ZipFile(package).namelist())
    assert {"raydet/__init__.py", "raydet/config/__init__.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/", "benchmarks/", ".venv/", ".git/"))]
    assert package.stat().st_size < 5 * 2**20
