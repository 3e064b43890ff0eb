"""The columns of a CSV file of boxes: which of them names the image, the class and the four numbers.

Recognised without an option, whatever the order and the case of the columns:

| written by | columns |
|---|---|
| VoTT | image, xmin, ymin, xmax, ymax, label |
| TensorFlow's Object Detection API | filename, width, height, class, xmin, ymin, xmax, ymax |
| RetinaNet (keras-retinanet) | path, x1, y1, x2, y2, class, in this order, without a header |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raydet.common.errors import UserError, one_line
from raydet.images.files import readable

EXPECTED = (
    "the columns of VoTT (image, xmin, ymin, xmax, ymax, label), of TensorFlow (filename, width, height, class, xmin, "
    "ymin, xmax, ymax), or of RetinaNet (path, x1, y1, x2, y2, class, without a header)"
)
ROLES = ("image", "class", "xmin", "ymin", "xmax", "ymax", "x", "y", "w", "h", "width", "height")
"""Keys of `--columns`. A box is `xmin` to `ymax` or `x`, `y`, `w`, `h`; `width` and `height` are the image's."""

_CORNERS, _SIDES, _SIZE = ROLES[2:6], ROLES[6:10], ROLES[10:]
_NAMES = {
    "image": ("image", "filename", "file_name", "path", "image_path", "file", "img"),
    "class": ("label", "class", "class_name", "name", "category"),
    "xmin": ("xmin", "x_min", "x1", "left"),
    "ymin": ("ymin", "y_min", "y1", "top"),
    "xmax": ("xmax", "x_max", "x2", "right"),
    "ymax": ("ymax", "y_max", "y2", "bottom"),
    "x": ("x",),
    "y": ("y",),
    "w": ("w",),
    "h": ("h",),
    "width": ("width",),
    "height": ("height",),
}
_WITHOUT_HEADER = {"image": 0, "xmin": 1, "ymin": 2, "xmax": 3, "ymax": 4, "class": 5}
_SHOWN = 12


@dataclass(frozen=True)
class CsvColumns:
    """Positions of the columns in a row, from 0.

    Attributes:
        box: Four numbers: left, top, right, bottom, or left, top, width, height.
        has_corners: The box is left, top, right, bottom.
        size: Width and height of the image in pixels, if the file states them.
        has_header: The first row names the columns.
    """

    image: int
    category: int
    box: tuple[int, int, int, int]
    has_corners: bool
    size: tuple[int, int] | None
    has_header: bool

    @property
    def num_columns(self) -> int:
        """Minimum number of values in a row with a box."""
        return 1 + max(self.image, self.category, *self.box)


def find_columns(first: Sequence[str], named: Mapping[str, str | int] | None, where: str) -> CsvColumns:
    """Find the columns by the first row of a file.

    Args:
        first: Values of the first row.
        named: The option `--columns`: role → name in the header, or number from 1 in a file without a header.
        where: The file, for messages.

    Raises:
        UserError: A column is missing, or `named` is invalid.
    """
    if not first:
        raise UserError(f"{where} is empty; expected {EXPECTED}")
    header = [name.strip().lower() for name in first]
    if named is not None:
        return _named(header, named, where)
    places = {}
    for role, names in _NAMES.items():
        name = next((name for name in names if name in header), None)
        if name is not None:
            places[role] = header.index(name)
    if _has_all(places):
        return _columns(places, has_header=True)
    if len(first) == len(_WITHOUT_HEADER) and _is_row(first):
        return _columns(_WITHOUT_HEADER, has_header=False)
    raise UserError(
        f"{where} begins with {_shown(first)}; expected {EXPECTED}; or name the columns, such as "
        "--columns '{image: file, class: name, xmin: x1, ymin: y1, xmax: x2, ymax: y2}'"
    )


def _named(header: Sequence[str], named: Mapping[str, str | int], where: str) -> CsvColumns:
    unknown = [role for role in named if role not in ROLES]
    if unknown:
        raise UserError(f"--columns has the key {unknown[0]!r}; must be one of {', '.join(ROLES)}")
    if not _has_all(named):
        raise UserError(
            "--columns must have image, class, and either xmin, ymin, xmax, ymax or x, y, w, h; got "
            f"{', '.join(named) or 'none'}"
        )
    has_header = not all(isinstance(value, int) for value in named.values())
    places = {}
    for role, value in named.items():
        place = value - 1 if isinstance(value, int) else _place_of(header, value.strip().lower())
        if place is None or not 0 <= place < len(header):
            raise UserError(
                f"--columns {role}: {value}: there is no such column in {where}; its first row is {_shown(header)}"
            )
        places[role] = place
    return _columns(places, has_header=has_header)


def _shown(row: Sequence[str]) -> str:
    names = [one_line(readable(name), limit=40) for name in row[:_SHOWN]]
    return ", ".join([*names, "…"] if len(row) > _SHOWN else names)


def _place_of(header: Sequence[str], name: str) -> int | None:
    return header.index(name) if name in header else None


def _has_all(places: Mapping[str, object]) -> bool:
    has_box = all(role in places for role in _CORNERS) or all(role in places for role in _SIDES)
    return "image" in places and "class" in places and has_box


def _columns(places: Mapping[str, int], *, has_header: bool) -> CsvColumns:
    has_corners = all(role in places for role in _CORNERS)
    first, second, third, fourth = (places[role] for role in (_CORNERS if has_corners else _SIDES))
    return CsvColumns(
        image=places["image"],
        category=places["class"],
        box=(first, second, third, fourth),
        has_corners=has_corners,
        size=(places["width"], places["height"]) if all(role in places for role in _SIZE) else None,
        has_header=has_header,
    )


def _is_row(values: Sequence[str]) -> bool:
    """Return True for a RetinaNet row: a path and a class around four numbers, or a path alone."""
    path, *box, name = (value.strip() for value in values)
    if not any((*box, name)):
        return bool(path)
    return bool(path and name) and all(map(_is_number, box))


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True
