"""Images that are not in the folder that the user named → the folder that was probably meant."""

from itertools import islice

from raydet.common.errors import UserError
from raydet.images.files import ImageFolder, is_image_name, list_below, readable
from raydet.preparation.sources.source import Source, aligned_folders

_LOOKED_AT = 20
"""Images that must all be elsewhere; some may be missing from any data set."""


def refuse_other_folder(source: Source, folder: ImageFolder) -> None:
    """Refuse a folder that holds the first images of a source elsewhere, such as the parent of the one that was meant.

    Raises:
        UserError: None of the images is at its place, and the folder has one of them in another place.
    """
    first = list(islice(source.images, _LOOKED_AT))
    if any(_may_be_there(image.locator or image.path, image.refusal, folder) for image in first):
        return
    files = [path for path in list_below(folder) if is_image_name(path)]
    places = aligned_folders([image.path for image in first], files)
    if places is None:
        return
    text = f"no image is at its place below --images {folder.uri}: the first would be {readable(first[0].path)}"
    stated, found = places
    if not stated:
        raise UserError(f"{text}; did you mean --images {folder.uri_of(found)}?")
    raise UserError(
        f"{text}, but {folder.uri_of(found) if found else 'the folder itself'} holds its file; the paths in the "
        f"annotations begin with {readable(stated)}/, so --images must name the folder that holds {readable(stated)}/"
    )


def _may_be_there(path: str, refusal: str | None, folder: ImageFolder) -> bool:
    if refusal is not None:
        return not refusal.startswith("no such file")
    return folder.size_of(path) is not None
