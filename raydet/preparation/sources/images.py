"""Images without labels: every image file below a folder or URI."""

import pyarrow as pa

from raydet.images.files import ImageFolder, image_files_below, readable
from raydet.preparation.sources.source import Source, SourceImage


def read_images(folder: ImageFolder) -> Source:
    """List the image files below a folder, sorted by relative path; the id of an image is its rank.

    The column `source_id` holds the relative path. Files with other extensions are ignored; the case does not matter.
    Links that lead out of the folder are refused.

    Raises:
        UserError: There is no image file, or a subfolder cannot be listed.
    """
    paths = image_files_below(folder)
    return Source(
        lambda: (_record(folder, rank, path) for rank, path in enumerate(paths)),
        num_images=len(paths),
        extra_fields=(pa.field("source_id", pa.string()),),
    )


def _record(folder: ImageFolder, rank: int, path: str) -> SourceImage:
    name = readable(path)
    return SourceImage(image_id=rank, path=name, extra={"source_id": name}, refusal=folder.refuse_outside(path))
