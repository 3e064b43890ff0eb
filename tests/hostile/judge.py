"""Rules for the output, files and processes of a command that met something hostile."""

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raydet.common.errors import UserError
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.table import REJECTED_FOLDER, open_table
from tests.hostile.case import SECRET, Case, Scene

MAX_MEMORY_MB = 2048
HUB_PORT = 9
"""Port on loopback where no Hub answers."""
CODES = {0: "accepted", 1: "failed", 2: "refused", 130: "stopped", 143: "stopped"}
"""The exit codes that `raydet.cli.main` documents."""
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Control and bidirectional characters; tabs and line ends are allowed."""
_COUNTS = re.compile(r"^([\d,]+) images found, ([\d,]+) accepted, ([\d,]+) rejected", re.M)
_MOST_WARNINGS = 3
"""Lines on stderr of a command that succeeds."""
_OF_LIBRARIES = ("ray", "torchinductor", ".ses")
"""Temporary files of Ray, torch.compile and ONNX Runtime."""
_MOST_SCANNED_BYTES = 64 * 2**20

Snapshot = dict[str, tuple[Any, ...]]


@dataclass
class Ended:
    """End of a command.

    Attributes:
        code: Exit code; negative for a signal; None if it was killed because its time was over.
        seconds: Wall-clock time.
        memory_mb: Largest resident memory of the process or one of its children.
        left_processes: True if processes outlived the command.
        connections: Addresses and ports that it connected to.
    """

    code: int | None
    stdout: bytes
    stderr: bytes
    seconds: float = 0.0
    memory_mb: float = 0.0
    left_processes: bool = False
    connections: list[str] = field(default_factory=list)


@dataclass
class Verdict:
    """The judgement of a case; without faults it passed."""

    name: str
    outcome: str
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory_mb: float = 0.0
    command: str = ""
    stdout: str = ""
    stderr: str = ""

    def to_json(self) -> str:
        """Return one line."""
        return json.dumps(asdict(self))


def snapshot(scene: Scene) -> Snapshot:
    """Describe every file of a case except those in `made` and the temporary ones, without opening any."""
    found: Snapshot = {}
    for folder in (scene.data, scene.outside, scene.here):
        for path in _walk(folder):
            state = path.lstat()
            content = str(path.readlink()) if stat.S_ISLNK(state.st_mode) else state.st_mtime_ns
            size = state.st_size if stat.S_ISREG(state.st_mode) else 0
            found[os.fsdecode(bytes(path.relative_to(scene.root)))] = (state.st_mode, size, content)
    return found


def judge(case: Case, scene: Scene, before: Snapshot, ended: Ended, command: list[str]) -> Verdict:
    """Return the verdict on an ended command."""
    outcome = CODES.get(-1 if ended.code is None else ended.code, "flagged")
    faults = [
        *_faults_of_ending(case, ended),
        *_faults_of_output(ended),
        *_changes(case, before, snapshot(scene)),
        *(() if case.may_read_outside else _leaks(scene, ended)),
        *_leftovers(scene),
        *_faults_of_counts(case, scene, ended),
        *_faults_of_connections(case, scene, ended),
    ]
    stdout, stderr = (text[-1500:].decode("utf-8", "backslashreplace") for text in (ended.stdout, ended.stderr))
    return Verdict(
        case.name,
        "flagged" if faults else outcome,
        faults,
        round(ended.seconds, 2),
        round(ended.memory_mb),
        " ".join(ascii(word)[1:-1] for word in command)[:600],
        stdout,
        stderr,
    )


def _faults_of_ending(case: Case, ended: Ended) -> Iterator[str]:
    if ended.code is None:
        yield f"hung: not ended after {case.seconds:g} s"
    elif ended.code not in CODES:
        yield f"crashed: exit code {ended.code}"
    if ended.code == 1 and b"a worker failed" in ended.stderr:
        yield "a wrong input is called the failure of a worker"
    if case.survives and ended.code not in (None, 0):
        yield f"one image ended the command: exit code {ended.code}"
    if ended.memory_mb > MAX_MEMORY_MB:
        yield f"memory: {ended.memory_mb:,.0f} MB"
    if ended.left_processes:
        yield "left a process behind"


def _faults_of_output(ended: Ended) -> Iterator[str]:
    text = (ended.stdout + ended.stderr).decode("utf-8", "surrogateescape")
    if "Traceback (most recent call last)" in text:
        yield f"traceback: {text.strip().splitlines()[-1][:160]}"
    elif ended.code not in (0, None):
        lines = [line for line in ended.stderr.decode("utf-8", "replace").split("\n") if line.strip()]
        if len(lines) != 1 or not lines[0].startswith("raydet: "):
            yield f"{len(lines)} lines on stderr instead of one"
        elif len(lines[0]) > 2000:
            yield f"a line of {len(lines[0]):,} characters"
    elif ended.code == 0:
        lines = [line for line in ended.stderr.decode("utf-8", "replace").split("\n") if line.strip()]
        if len(lines) > _MOST_WARNINGS or any("Warning: " in line for line in lines):
            yield f"noise on stderr: {lines[-1][:120]}"
    if found := _FORBIDDEN.search(text) or re.search("[\ud800-\udfff]", text):
        yield f"control character {found[0]!a} in the output"


def _changes(case: Case, before: Snapshot, after: Snapshot) -> Iterator[str]:
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) == after.get(name) or name.startswith(case.may_change or ("\0",)):
            continue
        kind = "made" if name not in before else "removed" if name not in after else "changed"
        is_folder = name in after and stat.S_ISDIR(after[name][0]) and kind == "changed"
        if not is_folder:  # its time changes with its entries, which are compared themselves
            yield f"{kind} outside OUT: {name!a}"


def _leaks(scene: Scene, ended: Ended) -> Iterator[str]:
    secrets = (SECRET, (scene.base / "outside.png").read_bytes()[-600:-100])
    if any(secret in ended.stdout + ended.stderr for secret in secrets):
        yield "content of a file outside is in the output"
    for path in _walk(scene.made):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                data = file.read(_MOST_SCANNED_BYTES)
            if any(secret in data for secret in secrets):
                yield f"content of a file outside is in {str(path.relative_to(scene.made))!a}"
                return


def _leftovers(scene: Scene) -> Iterator[str]:
    left = [path for path in scene.temporary.iterdir() if not path.name.startswith(_OF_LIBRARIES)]
    if left:
        yield f"left a temporary file: {left[0].name}"


def _faults_of_connections(case: Case, scene: Scene, ended: Ended) -> Iterator[str]:
    """Check that the command spoke to nobody whom its command line, or a list in it, does not name."""
    if case.kind in ("options", "outputs", "configs") or case.format in ("image list", "image csv", "predict list"):
        allowed = {HUB_PORT, *scene.ports}
    else:
        allowed = scene.ports
    for connection in ended.connections:
        host, _, port = connection.rpartition(" ")
        if case.weight == "ray" and host == "127.0.0.1" and int(port) != HUB_PORT:
            continue  # Ray's own processes
        if host not in ("127.0.0.1", "::1", "localhost") or int(port) not in allowed:
            yield f"connected to {connection}"


def _faults_of_counts(case: Case, scene: Scene, ended: Ended) -> Iterator[str]:
    if ended.code != 0:
        manifest = scene.out / MANIFEST_NAME
        # Others were put there by the case.
        if manifest.is_file() and not manifest.is_symlink() and manifest.read_bytes() != b"{}":
            yield "a manifest in OUT although the command failed"
        return
    printed = _COUNTS.search(ended.stdout.decode("utf-8", "replace"))
    if not printed:
        return
    found, accepted, rejected = (int(number.replace(",", "")) for number in printed.groups())
    if found != accepted + rejected:
        yield f"{found} images found, but {accepted} accepted and {rejected} rejected"
    if case.survives and accepted == 0:
        yield "no image was accepted"
    manifest = scene.out / MANIFEST_NAME
    if manifest.exists():
        try:
            yield from _faults_of_table(scene.out, accepted)
        except UserError as error:
            yield f"the table cannot be read: {str(error)[-160:]}"
        rows = _manifest_rows(scene.out / REJECTED_FOLDER)
        if rows != rejected:
            yield f"{rejected} images rejected, but {rows} rows in {REJECTED_FOLDER}"


def _manifest_rows(folder: Path) -> int:
    return int(json.loads((folder / MANIFEST_NAME).read_bytes())["num_rows"])


def _faults_of_table(folder: Path, accepted: int) -> Iterator[str]:
    """Check what every images table promises: ids, sizes, boxes inside their image, categories."""
    table = open_table(str(folder), "images")
    rows = table.read(["image_id", "width", "height", "objects"]).to_pylist()
    ids = [row["image_id"] for row in rows]
    if len(rows) != accepted:
        yield f"{accepted} images accepted, but {len(rows)} rows"
    if len(set(ids)) != len(ids) or any(not 0 <= number < 2**53 for number in ids):
        yield "image ids are not unique numbers from 0 to 2**53 - 1"
    for row in rows:
        width, height, objects = row["width"], row["height"], row["objects"]
        lengths = {len(values) for values in objects.values()}
        if width < 1 or height < 1 or len(lengths) != 1:
            yield f"a row of {width} x {height} pixels with lists of {sorted(lengths)} values"
            return
        for x, y, wide, high in objects["bbox"]:
            numbers = all(math.isfinite(number) for number in (x, y, wide, high))
            slack = 1e-6 * max(width, height)
            if not numbers or x < -slack or y < -slack or x + wide > width + slack or y + high > height + slack:
                yield f"a box outside its image: {(x, y, wide, high)} in {width} x {height}"
                return
        if any(not 0 <= category < len(table.categories) for category in objects["category"]):
            yield "a category that the table does not list"
            return


def _walk(folder: Path) -> Iterator[Path]:
    """Yield everything below a folder without following links; ends in odd names included."""
    for here, folders, files in os.walk(os.fsencode(folder)):
        for name in (*folders, *files):
            yield Path(os.fsdecode(os.path.join(here, name)))  # noqa: PTH118 - bytes
