"""Hostile files and names: what may stand where a command expects a file or the name of one."""

import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

from tests.hostile.case import Scene

Put = Callable[[Scene, Path], None]


def _fifo(_: Scene, path: Path) -> None:
    os.mkfifo(path)


def _socket(_: Scene, path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the names of sockets are limited to 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def _device(_: Scene, path: Path) -> None:
    if os.geteuid() == 0:
        os.mknod(path, 0o20666, os.makedev(1, 5))  # /dev/zero
    else:
        path.symlink_to("/dev/zero")


def _growing(scene: Scene, path: Path) -> None:
    start = path.read_bytes() if path.exists() else b"x"
    path.write_bytes(start)

    def grow() -> None:
        with path.open("ab") as file:
            for _ in range(2_000):
                file.write(start[-1:] * 2**16)
                file.flush()
                time.sleep(0.01)

    scene.beside.append(grow)


def _sparse(num_bytes: int) -> Put:
    def put(_: Scene, path: Path) -> None:
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            file.truncate(num_bytes)

    return put


def _unreadable(scene: Scene, path: Path) -> None:
    if not path.exists():
        shutil.copy(scene.outside / "secret.txt", path)
    path.chmod(0)


def _link(target: Callable[[Scene, Path], object]) -> Put:
    def put(scene: Scene, path: Path) -> None:
        path.symlink_to(str(target(scene, path)))

    return put


def _hard_link_inside(_: Scene, path: Path) -> None:
    other = path.with_name(f"other-{path.name}")
    other.write_bytes(b"")
    os.link(other, path)


def _link_to_fifo(scene: Scene, path: Path) -> None:
    os.mkfifo(scene.outside / "fifo")
    path.symlink_to(scene.outside / "fifo")


def _empty(_: Scene, path: Path) -> None:
    path.write_bytes(b"")


def _secret(scene: Scene, path: Path) -> Path:
    return scene.outside / ("secret.png" if path.suffix == ".png" else "secret.txt")


FILES: dict[str, Put] = {
    "fifo": _fifo,
    "socket": _socket,
    "device": _device,
    "folder": lambda _, path: path.mkdir(),
    "empty": _empty,
    "3 GB sparse": _sparse(3 * 2**30),
    "900 MB sparse": _sparse(900 * 2**20),
    "growing": _growing,
    "unreadable": _unreadable,
    "link to /dev/zero": _link(lambda *_: "/dev/zero"),
    "link to /proc/self/mem": _link(lambda *_: "/proc/self/mem"),
    "dangling link": _link(lambda scene, _: scene.data / "nothing"),
    "looping link": _link(lambda _, path: path.name),
    "link to a file outside": _link(_secret),
    "relative link to a file outside": _link(lambda scene, path: os.path.relpath(_secret(scene, path), path.parent)),
    "link to a folder outside": _link(lambda scene, _: scene.outside),
    "link to a FIFO outside": _link_to_fifo,
    "empty hard link": _hard_link_inside,
    "missing": lambda *_: None,
}
"""Things in place of a file; the good file has been removed, unless the thing needs it."""
NEED_THE_FILE = ("growing", "unreadable")


def put(scene: Scene, path: Path, thing: str) -> None:
    """Put a hostile file in place of a good one."""
    if thing not in NEED_THE_FILE:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
    FILES[thing](scene, path)


ESCAPE = "\x1b]0;owned\x07\x1b[31mred\x1b[2J"
BIDI = "photo\u202egnp.exe\u2066"

NAMES: dict[str, str] = {
    "300 characters": "n" * 296 + ".png",
    "5,000 characters": "n" * 5000 + ".png",
    "5,000 folders": "n/" * 5000 + "x.png",
    "NUL": "a\0b.png",
    "half a surrogate": "a\udce4.png",
    "a high surrogate": "a\ud800.png",
    "parent": "../outside/secret.png",
    "parent at the end": "images/..",
    "hidden parent": "images/../../outside/secret.png",
    "absolute": "/etc/hostname",
    "absolute and outside": "@OUTSIDE@/secret.png",
    "file URI": "file://@OUTSIDE@/secret.png",
    "web URL": "http://127.0.0.1:9/a.png",
    "unknown scheme": "gopher://host/a.png",
    "object of a store": "s3://bucket/a.png",
    "password": "s3://user:hunter2hunter2@bucket/a.png",
    "backslashes": "..\\..\\outside\\secret.png",
    "drive": "C:\\windows\\a.png",
    "Windows device": "CON",
    "Windows stream": "a.png:stream",
    "escape sequences": f"{ESCAPE}.png",
    "bidirectional": BIDI,
    "line separator": "a\u2028b.png",
    "newline": "a\nraydet: error: forged\n.png",
    "carriage return": "a\roverwritten.png",
    "leading dash": "-rf.png",
    "tilde": "~/a.png",
    "shell": "$(touch x);`id`|a.png",
    "pattern": "*.png",
    "glob braces": "{a,b}.png",
    "percent": "%2e%2e/%2e%2e/outside/secret.png",
    "dot": ".",
    "empty": "",
    "slashes": "////",
    "trailing slash": "a.png/",
    "below a file": "a.png/b.png",
    "spaces": "   ",
    "not normalised": "cafe\u0301.png",
    "zero width": "a\u200b.png",
    "format": "{0.__class__}%s%n.png",
    "markup": "<script>alert(1)</script>.png",
}
"""Names of images that a data set states, with @OUTSIDE@ for the folder outside."""

LABELS: dict[str, str] = {
    "300 characters": "n" * 300,
    "100,000 characters": "n" * 100_000,
    "NUL": "a\0b",
    "a high surrogate": "a\ud800",
    "escape sequences": ESCAPE,
    "one-byte CSI": "a\x9b31mred",
    "bidirectional": BIDI,
    "newline": "a\nraydet: error: forged",
    "carriage return": "a\roverwritten",
    "tab": "a\tb",
    "line separator": "a\u2028b",
    "parent": "../../outside/x",
    "markup": "</script><script>alert(1)</script>",
    "comma": "a,b",
    "empty": "",
    "spaces": "  ",
    "rich markup": "[red]a[/nothing][link=file:///etc]b",
    "template": "{{ 7 * 7 }}{% raw %}",
    "format": "{0}%s%n",
    "zero width": "ca\u200bt",
    "formula": '=cmd|"/c calc"!A1',
}
"""Names of classes."""
