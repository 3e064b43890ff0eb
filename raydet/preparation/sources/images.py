"""Images without labels: every image file below a folder or URI."""

from collections import Counter

from raydet.images.files import ImageFolder, image_files_below, readable, skipped_detail
from raydet.preparation.sources.source import SKIPPED, SOURCE_ID, Finding, FindingLog, Source, SourceImage


def read_images(folder: ImageFolder) -> Source:
    """List the image files below a folder, sorted by relative path; the id of an image is its rank.

    The column `source_id` holds the relative path. Files with other extensions are skipped and counted; the case does
    not matter. Links that lead out of the folder are refused.

    Raises:
        UserError: There is no image file, all are refused links, or a subfolder cannot be listed.
    """
    skipped, findings = Counter[str](), FindingLog()
    paths = image_files_below(folder, skipped)
    findings.note(Finding(SKIPPED, count=skipped.total(), detail=skipped_detail(skipped)))
    return Source(
        lambda: (_record(folder, rank, path) for rank, path in enumerate(paths)),
        num_images=len(paths),
        extra_fields=SOURCE_ID,
        findings=findings,
    )


def _record(folder: ImageFolder, rank: int, path: str) -> SourceImage:
    name = readable(path)
    return SourceImage(image_id=rank, path=name, extra={"source_id": name}, refusal=folder.refuse_outside(path))
