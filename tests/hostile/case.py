"""A hostile case: what is built in a folder of its own, and the command that is run on it."""

import hashlib
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.hostile.rights import Rights

SECRET = b"this text lies outside of what the user named"
"""Content of every file outside; it must never be in OUT."""


@dataclass
class Scene:
    """The folder of one case.

    Attributes:
        root: Everything of the case; only `made` and temporary files may change while the command runs.
        base: Good data sets, tables and models, made once for all cases.
        beside: Functions that run in processes of their own beside the command, such as a server.
        ports: Ports on loopback that the command may connect to.
    """

    root: Path
    base: Path
    beside: list[Callable[[], None]] = field(default_factory=list)
    ports: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        for folder in (self.data, self.outside, self.made, self.home, self.temporary, self.here):
            folder.mkdir(parents=True)
        (self.outside / "secret.txt").write_bytes(SECRET)
        shutil.copy(self.base / "outside.png", self.outside / "secret.png")

    @property
    def data(self) -> Path:
        """Folder of the files that the command line names."""
        return self.root / "data"

    @property
    def outside(self) -> Path:
        """Folder that no command may read or write."""
        return self.root / "outside"

    @property
    def made(self) -> Path:
        """Parent of OUT, which may hold its lock."""
        return self.root / "made"

    @property
    def out(self) -> Path:
        """OUT."""
        return self.made / "out"

    @property
    def home(self) -> Path:
        """HOME of the command."""
        return self.root / "home"

    @property
    def temporary(self) -> Path:
        """TMPDIR of the command."""
        return self.root / "tmp"

    @property
    def ray(self) -> Path:
        """Folder of Ray's sessions; a short path, since names of Unix sockets are limited to 107 bytes."""
        return self.root / "r"

    @property
    def here(self) -> Path:
        """Working directory of the command."""
        return self.root / "here"

    def copy(self, name: str, to: str | None = None) -> Path:
        """Copy a folder or file of the base into the data."""
        source, target = self.base / name, self.data / (to or name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copy(source, target)
        return target


@dataclass(frozen=True)
class Case:
    """One hostile case.

    Attributes:
        kind: Row of the summary, such as `pictures`.
        format: Column of the summary: what the hostile thing is in, such as `coco`.
        thing: The hostile thing, in a few words.
        build: Builds the data below `scene.data` and returns the command line.
        survives: One image of several is hostile: the command must end with code 0 and accept the others.
        seconds: Limit of the wall clock.
        weight: What the process that runs it has imported: `light`, `heavy` (torch and transformers) or `ray`.
        rights: Rights of the process, if the tests run as root.
        may_read_outside: The command line names a link to what lies outside.
        may_change: Paths below the root, besides `made`, that the command line asks to write.
    """

    kind: str
    format: str
    thing: str
    build: Callable[[Scene], list[str]]
    survives: bool = False
    seconds: float = 20
    weight: str = "light"
    rights: Rights = "all"
    may_read_outside: bool = False
    may_change: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name that selects the case on the command line."""
        return f"{self.kind}/{self.format}/{self.thing}"

    def is_in_part(self, part: int, num_parts: int) -> bool:
        """Return True if a case belongs to one of several equal shares; controls and cases on Ray belong to all."""
        if self.kind == "controls" or self.weight == "ray":
            return True
        return int(hashlib.sha256(self.name.encode("utf-8", "backslashreplace")).hexdigest(), 16) % num_parts == part


def unique(cases: Iterable[Case]) -> list[Case]:
    """Return the cases as a list.

    Raises:
        ValueError: Two have the same name.
    """
    found = list(cases)
    names: set[str] = set()
    for case in found:
        if case.name in names:
            raise ValueError(f"two cases are called {case.name}")
        names.add(case.name)
    return found
