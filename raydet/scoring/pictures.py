"""Pictures named one by one → their boxes, and the pictures with the boxes drawn, in this process, without Ray."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from raydet.common.console import Console, aligned, counted
from raydet.common.errors import UserError
from raydet.config import PredictConfig, default_of, fields_of
from raydet.config.fields import flag
from raydet.images.files import IMAGE_EXTENSIONS
from raydet.tables import storage
from raydet.tables.new_output import new_file

if TYPE_CHECKING:
    from raydet.engines.in_memory.picture_detections import PictureDetections
    from raydet.models.geometry import Image

SCORE_THRESHOLD = 0.3
"""Default of `--score-threshold` for pictures, as of `raydet.load`."""
_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
_TABLES_ONLY = (
    *("num_workers", "cpus_per_worker", "reduced_decode", "limit", "fps", "allow_root", "keep", "rows_per_file"),
    *("adapter", "draw", "draw_if", "draw_threshold", "price_per_node_hour", "max_failures"),
)
"""Options without a meaning for pictures."""


@dataclass(frozen=True)
class Picture:
    """One picture with its detections, in descending score order.

    Attributes:
        name: Path or address, as given.
        width: Pixels of the upright picture.
        height: Pixels of the upright picture.
        class_names: Class of each detection, N of them.
        scores: Score of each detection.
        boxes_xywh: Box of each detection, [x, y, width, height] in pixels of the upright picture.
        drawn: File with the picture and the boxes drawn on it.
        is_replaced: True if such a file existed.
    """

    name: str
    width: int
    height: int
    class_names: list[str]
    scores: list[float]
    boxes_xywh: list[list[float]]
    drawn: str
    is_replaced: bool

    def lines(self) -> list[str]:
        """Return the table of the boxes, and the place of the drawing, for the terminal."""
        rows: list[tuple[str, ...]] = [("class", "score", "x", "y", "width", "height")]
        for name, score, box in zip(self.class_names, self.scores, self.boxes_xywh, strict=True):
            rows.append((name, f"{score:.3f}", *(f"{value:.1f}" for value in box)))
        found = counted(len(self.scores), "object")
        return [
            f"{self.name}: {found} in {self.width} × {self.height} pixels",
            *(f"  {line}" for line in (aligned(rows) if self.scores else [])),
            f"drawn: {self.drawn}{' (replaces an earlier one)' if self.is_replaced else ''}",
        ]


@dataclass(frozen=True)
class DrawnPictures:
    """Pictures with their detections.

    Attributes:
        out: File of the only drawing, or the folder of all.
        pictures: The readable pictures, in order.
        unreadable: Reason by name of each unreadable picture.
    """

    out: str
    pictures: tuple[Picture, ...]
    unreadable: Mapping[str, str] = field(default_factory=dict)


def pictures_in(data: Sequence[str] | str) -> list[str] | None:
    """Return the image files and web addresses that `--data` names; None if it names a table, folder, list or tar file.

    Raises:
        UserError: It names several places, and one of them is no picture.
    """
    names = [data] if isinstance(data, str) else list(dict.fromkeys(data))
    others = [name for name in names if not _is_picture(name)]
    if others and len(names) > 1:
        raise UserError(
            f"--data names several places, so each must be a picture, but {others[0]} is not an image file; score a "
            "table, folder, list or tar file by itself"
        )
    return None if others else names


def _is_picture(name: str) -> bool:
    if storage.is_web(name):
        return True
    path = name.partition("?")[0] if "://" in name else name
    return path.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and not storage.is_folder(name)


def detect_in(names: Sequence[str], config: PredictConfig, *, console: Console) -> DrawnPictures:
    """Detect objects in pictures, with the boxes that `predict` writes into a table, and draw them.

    Args:
        names: Result of `pictures_in`.
        config: Config of the command.
        console: Shows what the command waits for.

    Raises:
        UserError: An option or the model is invalid, a drawing would overwrite a source, or no picture can be read.
        RunError: A drawing cannot be written.
    """
    wrong = [item for item in fields_of(PredictConfig) if item.name in _TABLES_ONLY]
    flags = [flag(item.name) for item in wrong if getattr(config, item.name) != default_of(item)]
    if flags:
        instead = "; to draw fewer boxes, use --score-threshold" if "--draw-threshold" in flags else ""
        raise UserError(f"{', '.join(flags)} cannot be combined with pictures as --data: omit it{instead}")
    if config.batch_size == "auto":
        raise UserError("--batch-size auto cannot be combined with pictures as --data: choose a number")
    if config.score_threshold is None and not config.operating_point:
        config = dataclasses.replace(config, score_threshold=SCORE_THRESHOLD)
    missing = [name for name in names if not storage.is_web(name) and not storage.exists(name)]
    if missing:
        raise UserError(f"no such file: {missing[0]}")
    targets = _targets(names, config.out)
    unreadable: dict[str, str] = {}
    pictures: list[Picture] = []
    with console.progress("loading the model"):
        # Imported late: torch takes seconds, and wrong options are refused at once.
        from raydet.engines.in_memory.loaded import LoadedModel

        model = LoadedModel(config)
    read: list[str] = []

    def readable() -> Iterator["Image"]:
        for name in names:
            try:
                pixels = model.pixels(name)
            except UserError as error:
                if len(names) == 1:
                    raise
                unreadable[name] = str(error).removeprefix(f"{name}: ")
                continue
            read.append(name)
            yield pixels

    with console.progress("detecting objects", total=len(names), unit="pictures") as progress:
        for number, found in enumerate(model(readable())):
            name = read[number]
            pictures.append(_drawn(name, found, targets[name]))
            progress.reach(number + 1)
    if not pictures:
        name, reason = next(iter(unreadable.items()))
        raise UserError(f"none of the {len(names)} pictures can be read; {name}: {reason}")
    return DrawnPictures(
        pictures[0].drawn if len(names) == 1 else storage.absolute_uri(config.out or "."), tuple(pictures), unreadable
    )


def _drawn(name: str, found: "PictureDetections", target: str) -> Picture:
    """Write one drawing."""
    is_replaced = storage.exists(target)
    with new_file(target, command="predict", endings=(PurePosixPath(target).suffix,)) as file:
        found.draw().save(file, _FORMATS[PurePosixPath(target).suffix.lower()], quality=95)
    height, width = found.image.shape[:2]
    scores, boxes = found.scores.tolist(), found.boxes_xywh.tolist()
    return Picture(name, width, height, found.class_names, scores, boxes, target, is_replaced)


def _targets(names: Sequence[str], out: str) -> dict[str, str]:
    """Return the file to write for each picture.

    Raises:
        UserError: `out` is one file for several pictures, or a drawing would overwrite one of the pictures.
    """
    suffix = PurePosixPath(out).suffix.lower()
    is_file = suffix[1:] in IMAGE_EXTENSIONS and not storage.is_folder(out)
    if is_file and suffix not in _FORMATS:
        raise UserError(f"--out must name a folder, or a file that ends in {', '.join(_FORMATS)}; got {out}")
    if is_file and len(names) > 1:
        raise UserError(f"--out {out} is one file for {len(names)} pictures; name a folder")
    targets: dict[str, str] = {}
    for name in names:
        stem, ending = _stem_of(name), ".png" if name.lower().endswith(".png") else ".jpg"
        earlier = sum(_stem_of(other) == stem for other in targets)
        file = f"{stem}.detections{f'-{earlier + 1}' if earlier else ''}{ending}"
        targets[name] = out if is_file else storage.join(out, file) if out else file
    sources = [path for name in names if (path := _local(name)) is not None]
    for target in targets.values():
        path = _local(target)
        if path is not None and any(path.samefile(source) for source in sources):
            raise UserError(f"the drawing {target} would overwrite a picture of --data; choose another --out")
    return targets


def _local(uri: str) -> Path | None:
    """Return the path of a local file that exists."""
    uri = storage.absolute_uri(uri)
    path = Path(storage.resolve(uri)[1]) if storage.is_local(uri) else None
    return path if path is not None and path.exists() else None


def _stem_of(name: str) -> str:
    """Return the name of a picture without its folders and its ending."""
    if "://" not in name:
        return Path(name).stem
    stem = PurePosixPath(unquote(urlsplit(name).path)).stem
    return re.sub(r"[^\w.-]+", "_", stem)[:100].lstrip(".") or "picture"
