"""Images without labels: every image file below a folder or URI."""

import os
import posixpath
from pathlib import Path, PurePosixPath

import pyarrow as pa

from raydet import storage
from raydet.errors import UserError
from raydet.sources import ImageFolder, Records, Source, SourceImage, readable

_COMMON = ("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "bmp", "tif", "tiff")
_RARE = ("avif", "jp2", "j2k", "jpx", "ppm", "pgm", "pbm", "pnm", "heic", "heif")
IMAGE_EXTENSIONS = frozenset(_COMMON + _RARE)
"""Files named so count as found; HEIC is among them to be reported, since Pillow alone does not read it."""
LIST_SUFFIXES = (".txt", ".lst")
"""Of files that list images, a path a line."""


def read_images(folder: ImageFolder) -> Source:
    """Lists the image files below a folder, sorted by their relative path; an image's id is its rank.

    The column `source_id` holds the relative path. Other files are left out, by their extension, whatever its case;
    files to which a link leads out of the folder are refused.

    Raises:
        UserError: There is no image file, or a subfolder cannot be listed.
    """
    files = list_below(folder)
    paths = sorted(path for path in files if is_image_name(path))
    if not paths:
        raise UserError(
            f"no image file below {folder.uri} (but {len(files)} others); "
            f"image files end in {', '.join(sorted(IMAGE_EXTENSIONS))}"
        )
    return Source(
        images=Records(lambda: (_record(folder, rank, path) for rank, path in enumerate(paths))),
        num_images=len(paths),
        extra_fields=(pa.field("source_id", pa.string()),),
    )


def is_image_name(path: str) -> bool:
    """Whether a file is named as an image is."""
    return PurePosixPath(path).suffix[1:].lower() in IMAGE_EXTENSIONS


def beside(folder: str, path: str) -> str:
    """What a relative path in a list means, for a list in this folder."""
    if "://" not in folder:
        return f"{folder}/{path}"
    # In object storage `..` is a name like any other.
    scheme, _, place = folder.partition("://")
    return f"{scheme}://{posixpath.normpath(f'{place}/{path}')}"


def list_below(folder: ImageFolder) -> list[str]:
    """All files below a folder, relative to it, also those to which links lead.

    Raises:
        UserError: A subfolder cannot be listed.
    """
    return _list_local(folder.path) if folder.is_local else storage.list_files(folder.uri, recursive=True)


def _record(folder: ImageFolder, rank: int, path: str) -> SourceImage:
    name = readable(path)
    return SourceImage(image_id=rank, path=name, extra={"source_id": name}, refusal=folder.refuse_outside(path))


def _list_local(root: str) -> list[str]:
    """Files below a local folder; links are followed, but not in circles, and dangling ones are listed."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot list {error.filename}: {error.strerror}")

    found = []
    for name, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        folder = Path(name)
        here = folder.resolve()
        subfolders[:] = [name for name in subfolders if not _leads_back(folder / name, here)]
        paths = [folder / name for name in files]
        found += [str(path.relative_to(root)) for path in paths if path.is_file() or path.is_symlink()]
    return found


def _leads_back(path: Path, here: Path) -> bool:
    """Whether a path is a link to the folder `here` or to one that contains it."""
    return path.is_symlink() and here.is_relative_to(path.resolve())
