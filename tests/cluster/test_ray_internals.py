"""Only `ray_internals` uses Ray's private, developer and deprecated APIs."""

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest
import ray

import raydet
from raydet.cluster.ray_internals import away_from_empty_nodes

PACKAGE = Path(raydet.__file__).parent
ALLOWED = PACKAGE / "cluster" / "ray_internals.py"
OPTIONS_THAT_GO = {
    "custom_execution_callback_classes",
    "exclude_resources",
    "ray_remote_args_fn",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
}


def breaches(source: str) -> list[str]:
    """List the names in a module's source that belong in `ray_internals`."""
    tree = ast.parse(source)
    found: list[str] = []
    known: dict[str, str] = {}  # name in this module: Ray's name
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                if item.name.split(".")[0] == "ray":
                    known[item.asname or "ray"] = item.name if item.asname else "ray"
                    found += [item.name] * is_unstable(item.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray":
            for item in node.names:
                name = f"{node.module}.{item.name}"
                known[item.asname or item.name] = name
                found += [name] * is_unstable(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            if root in known:
                found += [f"{known[root]}.{rest}"] * is_unstable(f"{known[root]}.{rest}")
            found += [node.attr] * (node.attr in OPTIONS_THAT_GO)
        elif isinstance(node, ast.keyword):
            found += [node.arg or ""] * (node.arg in OPTIONS_THAT_GO)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "ray.init":
            found += [keyword.arg or "" for keyword in node.keywords if (keyword.arg or "").startswith("_")]
        elif isinstance(node, ast.Constant) and node.value in OPTIONS_THAT_GO:
            found.append(str(node.value))
    return sorted(set(found))


def is_unstable(name: str) -> bool:
    """Return True if a dotted name of Ray's is private, or annotated as developer API or deprecated."""
    if any(part.startswith("_") for part in name.split(".")):
        return True
    thing = _thing(name)
    own_name = getattr(thing, "__name__", None)
    if getattr(thing, "_annotated", None) != own_name:  # an annotation inherited from a base class
        return False
    return getattr(thing, "_annotated_type", None) is not None and thing._annotated_type.value != "PublicAPI"


def _thing(name: str) -> Any:
    parts = name.split(".")
    thing: Any = importlib.import_module(parts[0])
    for count, part in enumerate(parts[1:], 2):
        if not hasattr(thing, part):
            try:
                importlib.import_module(".".join(parts[:count]))
            except ImportError:
                return None
        thing = getattr(thing, part, None)
    return thing


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from ray._private import state", ["ray._private.state"]),
        ("import ray._raylet", ["ray._raylet"]),
        ("import ray\nray.nodes()", ["ray.nodes"]),
        ("import ray.data as data\ndata.DataContext", ["ray.data.DataContext"]),
        ("from ray.data.block import BlockMetadata", ["ray.data.block.BlockMetadata"]),
        ("import ray\nray.init(_system_config={})", ["_system_config"]),
        ("dataset.map_batches(work, ray_remote_args_fn=few)", ["ray_remote_args_fn"]),
        ("import ray\nray.get(ray.put(1))\nray.data.TaskPoolStrategy(size=1)", []),
        ("from ray.tune.schedulers import ASHAScheduler", []),
    ],
)
def test_breaches_are_noticed(source: str, found: list[str]) -> None:
    assert breaches(source) == found


def test_one_module_alone_uses_what_ray_does_not_promise() -> None:
    folders = [PACKAGE, *(PACKAGE.parent / name for name in ("benchmarks", "jobs"))]
    used = {path: breaches(path.read_text("utf-8")) for folder in folders for path in folder.rglob("*.py")}
    own = used.pop(ALLOWED)
    assert {str(path): names for path, names in used.items() if names} == {}
    assert len(own) > 10


def test_every_class_that_is_loaded_late_is_there() -> None:
    from raydet.cluster import ray_internals

    for name in ray_internals.__all__:
        assert getattr(ray_internals, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = ray_internals.Nothing


def test_tasks_without_cpus_name_the_nodes_to_avoid(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"NodeID": name, "Alive": True, "Resources": resources}
        for name, resources in (("head", {"memory": 1.0}), ("idle", {"CPU": 0.0}), ("work", {"CPU": 4.0}))
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert away_from_empty_nodes() == {"label_selector": {"ray.io/node-id": "!in(head,idle)"}}
    del nodes[:2]
    assert away_from_empty_nodes() == {}
