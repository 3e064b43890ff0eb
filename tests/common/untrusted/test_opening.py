"""Names that lead to pipes, devices, other folders or nowhere: each is refused at once, and the rest is read."""

import contextlib
import os
import pickle
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from raydet.common.untrusted import opening
from raydet.common.untrusted.opening import ANYWHERE, LocalRoots, NotAFileError, OutsideError, refusal_of_name


def nothing(_: int) -> None:
    pass


@pytest.fixture(params=["by descriptor", "portable"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalRoots:
    """Return the folder `root`, beside `outside`, with and without the help of Linux."""
    monkeypatch.setattr(opening, "_CAN_LOOK_FIRST", request.param == "by descriptor")
    for name in ("root/sub", "outside/sub"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.jpg").write_bytes(name.encode())
    return LocalRoots(str(tmp_path / "root"))


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as own:
        here = Path.cwd()
        os.chdir(path.parent)
        own.bind(path.name)
        os.chdir(here)


def make_pipe_outside(path: Path) -> None:
    os.mkfifo(path.parent / "../outside/pipe")
    path.symlink_to("../outside/pipe")


MAKE: dict[str, Callable[[Path], None]] = {
    "fifo": os.mkfifo,
    "socket": make_socket,
    "folder": Path.mkdir,
    "dangling": lambda path: path.symlink_to("nowhere"),
    "loop": lambda path: path.symlink_to(path.name),
    "to a device": lambda path: path.symlink_to("/dev/zero"),
    "to /proc": lambda path: path.symlink_to("/proc/self/environ"),
    "to a file outside": lambda path: path.symlink_to("../outside/sub/a.jpg"),
    "to a pipe outside": make_pipe_outside,
}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.timeout(20)
def test_what_is_no_file_of_the_folder_is_refused_at_once(root: LocalRoots, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "root" / "x.jpg"
    MAKE[kind](path)
    with pytest.raises(OSError) as caught:  # noqa: PT011 the type is compared below
        root.read(str(path), nothing)
    expected = OutsideError if "outside" in kind or kind.startswith("to ") else OSError
    if kind in ("fifo", "socket", "folder") and opening._CAN_LOOK_FIRST:
        expected = NotAFileError
    if kind == "dangling" or kind == "loop":
        expected = OSError
    assert isinstance(caught.value, expected)


@pytest.mark.parametrize("name", ["x" * 300, "y/" * 2500 + "z", "nul\0.jpg", "none.jpg", "sub/a.jpg/b.jpg"])
def test_names_that_no_file_has(root: LocalRoots, tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match=r"[Nn]ame too long|Invalid argument|No such file|Not a directory"):
        root.open(f"{tmp_path}/root/{name}")


def test_files_inside_are_read_by_any_way(root: LocalRoots, tmp_path: Path) -> None:
    (tmp_path / "way").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "link.jpg").symlink_to("sub/a.jpg")
    odd = os.fsdecode(os.fsencode(tmp_path / "root") + b"/\xff.jpg")
    Path(odd).write_bytes(b"odd")
    for path in ("root/sub/a.jpg", "way/sub/a.jpg", "root/link.jpg", "outside/../root/sub/a.jpg"):
        assert root.read(f"{tmp_path}/{path}", nothing) == b"root/sub"
        assert pickle.loads(pickle.dumps(root)).read(f"{tmp_path}/{path}", nothing) == b"root/sub"
    assert root.read(odd, nothing) == b"odd"
    both = LocalRoots(str(tmp_path / "root"), str(tmp_path / "outside"))
    assert both.read(f"{tmp_path}/outside/sub/a.jpg", nothing) == b"outside/sub"
    for path in (f"{tmp_path}/outside/sub/a.jpg", f"{tmp_path}/root/../outside/sub/a.jpg"):
        with pytest.raises(OutsideError):
            root.read(path, nothing)
        assert ANYWHERE.read(path, nothing) == b"outside/sub"
    with pytest.raises(OutsideError):  # a folder whose name begins like that of the root
        LocalRoots(str(tmp_path / "roo")).read(f"{tmp_path}/root/sub/a.jpg", nothing)


def test_a_file_is_as_it_was_when_it_was_opened(root: LocalRoots, tmp_path: Path) -> None:
    path = tmp_path / "root" / "sub" / "a.jpg"
    with root.open(str(path)) as file, path.open("ab") as more:
        more.write(b"x" * 1000)
        more.flush()
        assert file.size() == 8 and file.read_at(100, 0) == b"root/sub" == file.read()
        assert file.read_at(3, 5) == b"sub" and file.read_at(3, 8) == file.read_at(3, 100) == b""
        os.truncate(path, 4)
        assert file.read_at(8, 0) == b"root"
    assert ANYWHERE.read("/proc/self/status", nothing) == b""


def test_the_size_is_judged_before_anything_is_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)

    def refuse(num_bytes: int) -> None:
        raise ValueError(num_bytes)

    with pytest.raises(ValueError, match=str(2**40)):
        ANYWHERE.read(str(tmp_path / "large"), refuse)


@pytest.mark.timeout(60)
def test_exchanging_a_link_gains_nothing(root: LocalRoots, tmp_path: Path) -> None:
    path, over = tmp_path / "root" / "x.jpg", threading.Event()
    path.symlink_to("sub/a.jpg")

    def exchange() -> None:
        targets = ["../outside/sub/a.jpg", "sub/a.jpg"]
        while not over.is_set():
            for target in targets:
                (tmp_path / "new").unlink(missing_ok=True)
                (tmp_path / "new").symlink_to(target)
                (tmp_path / "new").rename(path)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        found = set()
        for _ in range(3000):
            try:
                found.add(root.read(str(path), nothing))
            except OSError:
                found.add(b"refused")
        assert found <= {b"root/sub", b"refused"}
    finally:
        over.set()
        thread.join()


def test_descriptors_are_closed(root: LocalRoots, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "root" / "pipe")
    names = ["sub/a.jpg", "pipe", "none", "../outside/sub/a.jpg"]
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        for name in names:
            with contextlib.suppress(OSError):
                root.open(f"{tmp_path}/root/{name}").close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_files_for_other_readers_are_looked_at_first(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    assert refusal_of_name(str(tmp_path / "pipe")) == "is a named pipe"
    assert refusal_of_name("/dev/null") == "is a device"
    assert refusal_of_name(str(tmp_path / "file")) is refusal_of_name(str(tmp_path)) is None
    assert "cannot be read" in str(refusal_of_name(f"{tmp_path}/{'x' * 300}"))
