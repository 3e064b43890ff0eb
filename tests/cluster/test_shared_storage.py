"""A folder that not all nodes share is refused: of two nodes, a mount namespace hides it from the second."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray.util

from tests.local_head import free_port
from tests.s3_stand_in import BUCKET, started

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(280),
    pytest.mark.skipif(
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
        reason="requires permission to mount a separate file system for the second node",
    ),
]

SECOND = "127.0.0.2"
RAY = str(Path(sys.executable).with_name("ray"))
HIDE = 'mount -t tmpfs none "$1" && echo theirs > "$1/both.txt" && shift && exec "$@"'
"""Shell script: hide a folder behind a new disk that holds one file, then run a command that sees the disk."""


@dataclass(frozen=True)
class Nodes:
    """A cluster of two nodes.

    Attributes:
        address: Address of the head.
        shared: A folder that both nodes see.
        own: A folder in whose place the second node sees a separate disk.
    """

    address: str
    shared: Path
    own: Path


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two running nodes; all their processes stop with them."""
    shared, own = tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("own")
    Path(own, "both.txt").write_text("ours")
    address = f"{ray.util.get_node_ip_address()}:{free_port()}"
    own_only = ["unshare", "-rm", "sh", "-c", HIDE, "sh", str(own)]
    second = [f"--address={address}", f"--node-ip-address={SECOND}"]
    with started() as refusing, tempfile.TemporaryDirectory(prefix="rds", ignore_cleanup_errors=True) as folder:
        refusing.fail("403", 1e6)  # the nodes have no valid S3 credentials
        head = ["--head", f"--port={address.split(':')[1]}", "--include-dashboard=false", f"--temp-dir={folder}"]
        with (
            _node(head, Path(folder, "head.log"), refusing.environment),
            _node(second, Path(folder, "second.log"), refusing.environment, own_only),
        ):
            deadline = time.monotonic() + 120
            while _ask(address, "print(sum(node['Alive'] for node in ray.nodes()))") != "2":
                assert time.monotonic() < deadline, "\n".join(log.read_text() for log in Path(folder).glob("*.log"))
            yield Nodes(address, shared, own)


@contextmanager
def _node(options: list[str], log: Path, environment: dict[str, str], prefix: Sequence[str] = ()) -> Iterator[None]:
    command = [*prefix, RAY, "start", "--block", "--disable-usage-stats", "--num-cpus=1", *options]
    command += ["--object-store-memory=100000000", f"--dashboard-agent-listen-port={free_port()}"]
    with log.open("w") as output:
        node = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(node.pid, signal.SIGTERM)  # the node and all its processes are a separate session
        try:
            node.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def _ask(address: str, script: str, **environment: str) -> str:
    """Return the last line that a driver on the first node prints."""
    code = f"import ray\nray.init(address={address!r}, log_to_driver=False)\n{textwrap.dedent(script)}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return (done.stdout.strip().splitlines() or [done.stderr])[-1]


CHECK = """
import json, sys
from raydet.common.errors import RunError, UserError
from raydet.cluster.shared_storage import check_shared

def outcome(**places):
    try:
        check_shared(**places)
    except (UserError, RunError) as error:
        return f"{error.exit_code}: {error}"
    return "shared"
"""


def test_a_nodes_own_disk_is_told_from_a_shared_one(nodes: Nodes) -> None:
    shared, own = nodes.shared, nodes.own
    (shared / "table").mkdir()
    (shared / "table" / "manifest").write_text("a table")
    (own / "table").mkdir()
    script = f"""{CHECK}
print(json.dumps([
    outcome(reads={{"--data": ("t", "{shared}/table/manifest")}}, writes=("o", "{shared}/log")),
    outcome(reads={{}}, writes=("o", "{own}/log")),
    outcome(reads={{"--data": ("t", "{own}/table")}}),
    outcome(reads={{"--data": ("t", "{own}/both.txt")}}, writes=("o", "{shared}/log")),
]))
"""
    passed, output, data, other = json.loads(_ask(nodes.address, script))
    assert passed == "shared"
    where = f"the node {SECOND} ({socket.gethostname()})"
    for refused, place in ((output, "--out o"), (data, "--data t"), (other, "--data t")):
        assert refused.startswith("2: ") and place in refused and where in refused and "s3://" in refused
    assert "different content" in other and "different content" not in data
    for folder in (shared, own):
        assert list((folder / "log").iterdir()) == [], "probe files are deleted"


def test_a_store_without_credentials_on_a_node(nodes: Nodes) -> None:
    with started() as server:
        script = f'{CHECK}\nprint(outcome(reads={{}}, writes=("o", "{BUCKET}/run/log")))'
        refused = _ask(nodes.address, script, **server.environment)
        assert refused.startswith("2: ") and "--out o: the nodes " in refused, refused
        assert f"{SECOND} (" in refused and "cannot read it" in refused and "credentials" in refused
        # Passed as `ray job submit --runtime-env-json` does.
        job = {"runtime_env": {"env_vars": server.environment}, "metadata": {}}
        given = {**server.environment, "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)}
        assert _ask(nodes.address, script, **given) == "shared"


def test_commands_refuse_before_any_work(nodes: Nodes, shapes: Path) -> None:
    data = nodes.shared / "shapes"
    shutil.copytree(shapes, data)
    run, tables = nodes.own / "run", [f"--train-data={data}/train", f"--val-data={data}/val"]
    done = _raydet(nodes, "train", *tables, f"--out={run}", "--model=rt_detr_v2_tiny", "--image-size=64")
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"--out {run}: the node {SECOND}" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in run.iterdir()] == ["log"]
    assert [path.name for path in (run / "log").iterdir()] == ["ray.log"]


def _raydet(nodes: Nodes, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "raydet", *words],
        env={**os.environ, "RAY_ADDRESS": nodes.address},
        capture_output=True,
        text=True,
        timeout=150,
    )
