"""cluster.yaml passes Ray's validation and further checks that Ray does not make."""

import copy
import re
import shlex
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command_lines import blocks_of

PROJECT = Path(__file__).parents[2]
SPEC = PROJECT / "cluster.yaml"
DOCUMENT = PROJECT / "docs" / "cluster.md"

SECRET = re.compile(
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|hf_[A-Za-z]{20,}|-----BEGIN"
    # A file in the home folder is named but not contained.
    r"|(?i:(secret|token|password|access_key)\w*\s*[:=]\s*(?!~/)\S)"
)
NODE_KEYS = {"aws": ("InstanceType", "ImageId"), "gcp": ("machineType",)}
GPU_MACHINES = {"aws": r"(g|p)\d", "gcp": r"(g2|g4|a2|a3|a4)-"}
TOKEN_FILE = "~/.ray/auth_token"


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
    """List faults that Ray accepts although the cluster would not work, or not safely."""
    faults = []
    if legacy := {"min_workers", "head_node", "worker_nodes"} & spec.keys():
        faults.append(f"legacy keys: {sorted(legacy)}")
    groups = spec["available_node_types"]
    head = groups[spec["head_node_type"]]
    if head["resources"].get("CPU") != 0:
        faults.append("the head offers CPUs")
    for name, group in groups.items():
        if group is not head:
            if not 0 <= group.get("min_workers", 0) <= group.get("max_workers", -1):
                faults.append(f"{name}: min_workers and max_workers do not fit")
            if group["max_workers"] > spec["max_workers"]:
                faults.append(f"{name}: more than the whole cluster")
        faults += find_faults_of_node(name, group, spec["provider"]["type"])
    setup = " && ".join(spec.get("setup_commands", []))
    if "requirements.lock" not in setup or "make setup" not in setup:
        faults.append("setup_commands do not install the lock")
    commands = [spec.get(f"{kind}_start_ray_commands") for kind in ("head", "worker")]
    if not all(commands):
        faults.append("no start commands of our own: the defaults open the dashboard to everyone")
    if "0.0.0.0" in text or re.search(r"host=(?!127\.0\.0\.1)", str(commands)):
        faults.append("something listens to everyone")
    if TOKEN_FILE not in spec.get("file_mounts", {}):
        faults.append("the nodes get no token")
    if not all("export RAY_AUTH_MODE=token; ray start" in " ".join(command or []) for command in commands):
        faults.append("no token is asked for")
    if SECRET.search(text):
        faults.append("a secret")
    return faults


def find_faults_of_node(name: str, group: dict[str, Any], provider: str) -> list[str]:
    node, resources = group["node_config"], group["resources"]
    faults = [f"{name}: no {key}" for key in NODE_KEYS[provider] if not isinstance(node.get(key), str)]
    if foreign := {key for other in NODE_KEYS if other != provider for key in NODE_KEYS[other]} & node.keys():
        faults.append(f"{name}: {sorted(foreign)} mean nothing to {provider}")
    machine = node.get(NODE_KEYS[provider][0], "")
    if (re.match(GPU_MACHINES[provider], machine) is not None) != (resources.get("GPU", 0) > 0):
        faults.append(f"{name}: {machine} and its GPU resources do not fit")
    # Ray looks up a machine's resources on AWS only.
    if provider == "gcp" and "CPU" not in resources:
        faults.append(f"{name}: Ray will think that it has no CPU")
    return faults


def test_ray_accepts_it() -> None:
    prepared = validate_with_ray(load_spec())
    assert prepared["available_node_types"]["head"]["max_workers"] == 0
    # By default Ray would install a nightly build over the locked version.
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
        (["worker_start_ray_commands"], ["ray start --address=$RAY_HEAD_IP:6379"], "no token is asked for"),
        (["file_mounts"], {}, "the nodes get no token"),
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
    assert mounts.pop(TOKEN_FILE) == TOKEN_FILE
    for remote, local in mounts.items():
        assert remote == f"~/raydet/{local}"
        # Ray reads everything below a mount, so the project folder with its .venv must not be one.
        assert local not in (".", "", ".venv")
        assert (PROJECT / local).exists(), f"{local} is mounted and not there"
    metadata = (PROJECT / "pyproject.toml").read_text()
    needed = {"Makefile", "pyproject.toml", "requirements.lock", "raydet"}
    needed |= {name for name in ("README.md", "LICENSE") if f'"{name}"' in metadata}
    assert needed <= set(mounts.values())


def load_spec_for_google() -> dict[str, Any]:
    """cluster.yaml with the replacement keys that docs/cluster.md lists for Google Cloud."""
    (block,) = [block for block in blocks_of(DOCUMENT, "yaml") if "type: gcp" in block]
    return {**load_spec(), **yaml.safe_load(block)}


def test_the_changes_for_google_cloud_pass_the_same_checks() -> None:
    spec = load_spec_for_google()
    assert validate_with_ray(spec)["provider"]["type"] == "gcp"
    assert find_faults(spec) == []
    assert not SECRET.search(yaml.safe_dump(spec).replace(f"{TOKEN_FILE}: {TOKEN_FILE}", ""))
    ours, googles = load_spec()["available_node_types"], spec["available_node_types"]
    for name in ours:
        assert {key: ours[name].get(key) for key in ("min_workers", "max_workers")} == {
            key: googles[name].get(key) for key in ("min_workers", "max_workers")
        }
    assert googles["model"]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    # By default Ray gives bucket access to the head only.
    assert all(googles[name]["node_config"]["serviceAccounts"] for name in ("decode", "model"))
    del googles["decode"]["resources"]["CPU"]
    googles["model"]["node_config"]["InstanceType"] = "g6.2xlarge"
    assert len(find_faults(spec)) == 2


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_the_start_commands_are_options_that_ray_has(kind: str) -> None:
    from ray.scripts.scripts import start

    (line,) = [command for command in load_spec()[f"{kind}_start_ray_commands"] if "ray start" in command]
    words = shlex.split(line.rpartition("ray start ")[2].replace("$RAY_HEAD_IP", "10.0.0.1"))
    options = start.make_context("start", words, resilient_parsing=True).params
    if kind == "head":
        assert options["system_config"] == {"num_workers_soft_limit": 32}
        assert options["head"] and options["dashboard_host"] == "127.0.0.1"
    else:
        assert options["address"] == "10.0.0.1:6379"


def test_a_submitted_job_takes_along_its_code_and_little_else(tmp_path: Path) -> None:
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(PROJECT), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    names = set(zipfile.ZipFile(package).namelist())
    assert {"raydet/__init__.py", "raydet/config/__init__.py", "pyproject.toml"} <= names
    left_at_home = ("tests/", "docs/", "benchmarks/", "deploy/", ".venv/", ".git/")
    assert not [name for name in names if name.startswith(left_at_home)]
    assert package.stat().st_size < 5 * 2**20
