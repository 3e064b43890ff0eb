"""Shared storage check: every node of the cluster must be able to read files that another node writes."""

import contextlib
import hashlib
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydet.cluster.ray_internals import alive_nodes
from raydet.cluster.session import session
from raydet.common.console import listed
from raydet.common.errors import RunError, UserError, one_line
from raydet.tables import storage
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.table import Table

ANSWER_WITHIN_S = 180.0
"""Long, because a node may first have to fetch the job's working directory and retry requests to an object store."""
_BYTES_COMPARED = 2**16
_MOST_NODES_NAMED = 4


@dataclass(frozen=True)
class _Place:
    """A file or folder that every node must see.

    Attributes:
        option: The command-line option, such as `--out`.
        named: The option's value as given by the user, for the message.
        mark: Its mark as seen from this node; see `_mark`.
    """

    option: str
    named: str
    uri: str
    mark: str | None


@dataclass(frozen=True)
class _FailedCheck:
    """A failed check on a node: the place and the reason."""

    place: _Place
    reason: str


def check_shared(*, reads: Mapping[str, tuple[str, str]], writes: tuple[str, str] | None = None) -> None:
    """Check that every live node sees the inputs and the output folder of a job, before the job starts.

    This process writes a randomly named file to the output. A task on each node must find it with the same content
    and write a file of its own: network file systems and object stores pass, but a node's local disk and missing
    credentials do not. All these files are deleted. A single machine needs no check. Nodes that join later are not
    checked.

    Args:
        reads: By option: the input as given by the user, and the URI of the file or folder to check, which must exist
            (for a table its manifest).
        writes: The output as given by the user, and the folder in it for the temporary files.

    Raises:
        UserError: A node cannot see an input or the output.
        RunError: A node cannot run raydet, or does not answer.
        OSError: This process cannot read or write one of the places.
    """
    nodes = alive_nodes()
    if [node["NodeID"] for node in nodes] == [ray.get_runtime_context().get_node_id()]:
        return
    places = [_Place(option, named, uri, _mark(uri)) for option, (named, uri) in reads.items()]
    if writes is None:
        findings = _ask(nodes, places, None)
    else:
        with _probe(*writes, nodes) as probe:
            findings = _ask(nodes, [probe, *places], probe)
    if findings:
        raise _refusal(findings)


@contextlib.contextmanager
def table_session(address: str, option: str, table: Table) -> Iterator[None]:
    """Context manager: connect to a cluster, and check that all its nodes see a table, while the block runs.

    Args:
        address: Address of the cluster; "local" starts one on this machine.
        option: The option that names the table, for messages.
        table: The table to read.

    Raises:
        UserError: A node cannot read the table.
        RunError: The cluster cannot be reached.
    """
    with tempfile.TemporaryDirectory() as log, session(log, address=address):
        check_shared(reads={option: (table.uri, storage.join(table.uri, MANIFEST_NAME))})
        yield


@contextlib.contextmanager
def _probe(named: str, folder: str, nodes: Sequence[Mapping[str, Any]]) -> Iterator[_Place]:
    """Context manager: a probe file in the output while the block runs; the nodes write their answers next to it."""
    uri = storage.join(folder, f".shared-{uuid.uuid4().hex}")
    try:
        storage.write_bytes(uri, uri.encode())
        yield _Place("--out", named, uri, _mark(uri))
    finally:
        # A node lost meanwhile has not deleted its answer.
        for each in (uri, *(_answer_uri(uri, node["NodeID"]) for node in nodes)):
            with contextlib.suppress(OSError):
                storage.delete_file(each)


def _answer_uri(probe_uri: str, node_id: str) -> str:
    path, mark, options = probe_uri.partition("?") if "://" in probe_uri else (probe_uri, "", "")
    return f"{path}-{node_id}{mark}{options}"


def _ask(
    nodes: Sequence[Mapping[str, Any]], places: Sequence[_Place], probe: _Place | None
) -> list[tuple[str, _FailedCheck]]:
    """Run the check on all nodes and return the name and finding of each that fails; lost nodes are skipped."""
    task = ray.remote(num_cpus=0, max_retries=0)(_look)
    there = {node["NodeID"]: NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes}
    asked = [task.options(scheduling_strategy=at).remote(places, probe, node_id) for node_id, at in there.items()]
    ready, _ = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_WITHIN_S, fetch_local=False)
    alive = {node["NodeID"] for node in alive_nodes()}
    findings = []
    for node, answer in zip(nodes, asked, strict=True):
        name = f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})"
        if node["NodeID"] not in alive:
            continue
        if answer not in ready:
            raise RunError(
                f"the node {name} did not answer within {ANSWER_WITHIN_S:.0f} s; check its Ray log, or stop the node"
            )
        try:
            finding = ray.get(answer)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise RunError(
                f"the node {name} cannot run raydet: {reason}; install the same packages on all nodes, or pass them in "
                "--runtime-env-json"
            ) from error
        if finding is not None:
            findings.append((name, finding))
    return findings


def _look(places: Sequence[_Place], probe: _Place | None, node_id: str) -> _FailedCheck | None:
    """Return the first failed check, of a place that this node sees differently from the driver's, or None."""
    for place in places:
        try:
            here = _mark(place.uri)
        except (OSError, ValueError) as error:
            return _FailedCheck(place, f"cannot read it ({_reason(error)})")
        if here is None and place.mark is not None:
            return _FailedCheck(place, "cannot see it")
        if here != place.mark:
            return _FailedCheck(place, "found different content there")
    if probe is not None:
        uri = _answer_uri(probe.uri, node_id)
        try:
            storage.write_bytes(uri, b"")
            storage.delete_file(uri)
        except (OSError, ValueError) as error:
            return _FailedCheck(probe, f"cannot write to it ({_reason(error)})")
    return None


def _mark(uri: str) -> str | None:
    """Return a file's size and the hash of its first bytes, "folder" for a folder, or None if nothing exists."""
    filesystem, path = storage.resolve(uri)
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        return None
    if info.type != pafs.FileType.File:
        return "folder"
    beginning = storage.read_range(uri, 0, min(info.size, _BYTES_COMPARED))
    return f"{info.size} {hashlib.sha256(beginning).hexdigest()}"


def _refusal(findings: Sequence[tuple[str, _FailedCheck]]) -> UserError:
    """Build the error for all nodes whose finding concerns the same place as the first finding."""
    first = findings[0][1]
    place, is_file_tree = first.place, "://" not in first.place.uri or first.place.uri.startswith("file://")
    names = [name for name, finding in findings if finding.place == place]
    shown = listed(names, _MOST_NODES_NAMED)
    advice = (
        "on several machines use storage that all of them see under the same path: s3://, gs://, or a network file "
        "system"
        if is_file_tree
        else "every node needs the credentials and the endpoint of this one: use an instance role, or env_vars in "
        "--runtime-env-json"
    )
    return UserError(
        f"not all nodes share {place.option} {place.named}: the node{'s' if len(names) > 1 else ''} {shown} "
        f"{first.reason}; {advice}"
    )


def _reason(error: BaseException) -> str:
    return one_line(getattr(error, "strerror", None) or error, limit=300)
