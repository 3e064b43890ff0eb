"""The classes that a zero-shot detector looks for: words, example pictures, or both.

This module needs neither torch nor transformers, so that the driver can refuse wrong prompts immediately.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from raydet.common.errors import UserError, one_line
from raydet.config import PredictConfig
from raydet.images.files import IMAGE_EXTENSIONS, is_image_name
from raydet.tables import storage

_MOST_EXAMPLES = 1000
_MOST_BYTES = 64 * 2**20

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Prompt:
    """A class to look for.

    Attributes:
        label: Its name.
        texts: Texts that describe it; the model averages what it makes of them.
        examples: URIs of pictures of one object each.
    """

    label: str
    texts: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()


def prompts_of(config: PredictConfig) -> tuple[Prompt, ...]:
    """Return the classes of `--labels`, and then those that only `--examples` has.

    Raises:
        UserError: Two labels differ in case and spaces only, which models ignore; or the folder has no examples.
    """
    templates = config.prompt_template or ["{}"]
    found = {
        plain(label): Prompt(label, tuple(template.format(label) for template in templates))
        for label in check_labels(config.labels or ())
    }
    for name, examples in _examples_in(config.examples).items() if config.examples else ():
        prompt = found.get(plain(name), Prompt(name))
        if prompt.examples:
            raise UserError(f"--examples: two folders are named {name!r}, apart from case and spaces; merge them")
        found[plain(name)] = Prompt(prompt.label, prompt.texts, examples)
    return tuple(found.values())


def plain(label: str) -> str:
    """Return a label as models read it: in lower case, with single spaces."""
    return " ".join(label.lower().split())


def check_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Strip the labels and check that they differ.

    Raises:
        UserError: Two labels differ in case and spaces only, which models ignore.
    """
    seen: dict[str, str] = {}
    for label in labels:
        if plain(label) in seen:
            raise UserError(
                f"--labels: {seen[plain(label)]!r} and {label.strip()!r} are the same label to the model; remove one"
            )
        seen[plain(label)] = label.strip()
    return tuple(seen.values())


def _examples_in(folder: str) -> dict[str, tuple[str, ...]]:
    """Return the pictures in each sub-folder, sorted."""
    folder = storage.absolute_uri(folder)
    names = storage.list_folders(folder)
    found = {}
    for name in names:
        files = storage.list_files(storage.join(folder, name))
        pictures = tuple(storage.join(folder, name, file) for file in files if is_image_name(file))
        if not pictures:
            raise UserError(
                f"--examples: {storage.join(folder, name)} has no pictures; image files end in "
                f"{', '.join(sorted(IMAGE_EXTENSIONS))}"
            )
        found[name] = pictures
    if not found:
        raise UserError(
            f"--examples {folder} has no sub-folders; expected one for each class, with pictures of single objects"
        )
    if sum(map(len, found.values())) > _MOST_EXAMPLES:
        raise UserError(f"--examples {folder} has more than {_MOST_EXAMPLES:,} pictures; a few for each class suffice")
    return found


def read_example(uri: str) -> bytes:
    """Read a picture.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return storage.read_limited(uri, _MOST_BYTES)
    except (OSError, UserError) as error:
        raise UserError(f"cannot read the example {uri}: {one_line(error)}") from None


def read_box(uri: str) -> Box | None:
    """Read the box of the object in an example, from a text file of the same name beside it, if there is one.

    The file has one line as in YOLO's label files: centre, width and height as fractions of the picture, with or
    without a class number before them.

    Returns:
        Centre x, centre y, width and height, 0 … 1; None for the whole picture.

    Raises:
        UserError: The file has another form.
    """
    file = uri[: -len(PurePosixPath(uri).suffix)] + ".txt"
    if not storage.exists(file):
        return None
    text = storage.read_limited(file, 4096).decode("utf-8", "replace").strip()
    try:
        numbers = [float(word) for word in text.split()][-4:]
        centre_x, centre_y, width, height = numbers
    except ValueError:
        raise UserError(f"{file} must have one line: centre x, centre y, width and height, from 0 to 1") from None
    if "\n" in text or not all(0 <= number <= 1 for number in numbers) or not (width and height):
        raise UserError(f"{file} must have one line: centre x, centre y, width and height, from 0 to 1")
    return centre_x, centre_y, width, height


def fingerprint_of(prompts: Sequence[Prompt]) -> str | None:
    """Return 16 hex digits that change with the content of the examples and of their boxes; None without examples.

    Raises:
        UserError: One cannot be read.
    """
    examples = [uri for prompt in prompts for uri in prompt.examples]
    if not examples:
        return None
    digest = hashlib.sha256()
    for uri in examples:
        digest.update(hashlib.sha256(read_example(uri)).digest())
        digest.update(repr(read_box(uri)).encode())
    return digest.hexdigest()[:16]
