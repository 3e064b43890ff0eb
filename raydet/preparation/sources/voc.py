"""Pascal VOC XML files → records.

Coordinates are those of the VOC devkit: the first pixel is 1, and a box extends from the left edge of pixel `xmin` to
the right edge of pixel `xmax`. Hence left = xmin - 1 and width = xmax - xmin + 1, and the same vertically; fractions
are allowed. Files whose first pixel is 0 state edges rather than pixels: left = xmin, width = xmax - xmin.

An XML file belongs to the image with the same path apart from the extension. The tag `filename` is often wrong or left
over from another data set; it decides only between several images with this path. `difficult` objects become crowds:
neither finding nor missing one is an error. Parts of objects, poses and `truncated` are not read. An
XML file with a DOCTYPE is refused, because a DOCTYPE can declare entities that fill the memory.
"""

import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import PurePosixPath

from raydet.common.errors import UserError, one_line
from raydet.common.threads import in_order
from raydet.common.untrusted.text import TextError, decode_text, encoding_of
from raydet.common.untrusted.xml import NoDoctype, XmlError
from raydet.config import PrepareVocConfig
from raydet.images.files import (
    LEAVES_BY_LINK,
    MAX_LABEL_BYTES,
    ImageFolder,
    ReadError,
    all_outside,
    image_files_below,
    is_image_name,
    list_below,
    readable,
    skipped_detail,
)
from raydet.preparation.sources.source import (
    SKIPPED,
    SOURCE_ID,
    UNLABELLED,
    UNLABELLED_KEPT,
    Finding,
    FindingLog,
    NamedBoxes,
    Source,
    SourceImage,
    aligned_folders,
    finite_numbers,
    read_class_names,
    size_hw_of,
    top_folders,
)
from raydet.tables import storage
from raydet.tables.schema import LONGEST_CLASS_NAME, Category
from raydet.tables.spill import Spilled

_MAX_SPLIT_BYTES = 64 * 2**20
_NO_IMAGE = "no such file: no image has this name"
_NO_BOX = "objects without a name or a box of four numbers, dropped"


class _TreeTarget(NoDoctype, ElementTree.TreeBuilder):
    """An element tree, from XML without a DOCTYPE."""


@dataclass(kw_only=True)
class _VocFile(NamedBoxes):
    """One XML file."""

    file_name: str = ""
    size_hw: tuple[int, int] | None = None


def read_voc(config: PrepareVocConfig, images: ImageFolder) -> Source:
    """Read Pascal VOC annotations.

    Without `classes`, the classes are those of all XML files, sorted by name; files outside the split count too, so
    that all splits of a folder have the same classes. A second column in the split file, which in the devkit states the
    presence of a class, is ignored.

    Returns:
        One record per image, sorted by path, whose id is the rank; category ids start at 1. Broken XML files, XML files
        without an image, and lines of the split without an image are refused. The column `source_id` holds the path
        without extension.

    Raises:
        UserError: A folder or the split cannot be read, no XML file belongs to an image, or there is no class.
    """
    annotations = ImageFolder(config.annotations, what="annotation", allow_root=config.allow_root)
    split_uri, classes = config.split, config.classes
    findings = FindingLog()
    xml_paths = _list_xml_files(annotations, images, findings)
    image_paths = _list_image_files(images, findings)
    if split_uri is None:
        _check_match(annotations, images, xml_paths, image_paths)
        stems = sorted({*image_paths, *xml_paths})
    else:
        stems = sorted(_read_split(split_uri, image_paths, xml_paths, findings))
        if not any(stem in image_paths and stem in xml_paths for stem in stems):
            _check_match(annotations, images, xml_paths, image_paths)
            raise UserError(
                f"--split {split_uri} names {len(stems)} images, none of which has an image file and an XML file; the "
                f"first name is {readable(stems[0])}"
            )
    wanted = sorted(xml_paths) if classes is None else [stem for stem in stems if stem in xml_paths]
    read = partial(_read_annotation, annotations, zero_based=config.zero_based)
    files = Spilled(_VocFile, in_order(read, (xml_paths[stem] for stem in wanted)))
    names = sorted({name for item in files for name in item.names}) if classes is None else read_class_names(classes)
    if not names:
        raise _no_class(annotations, {xml_paths[stem]: item.refusal for stem, item in zip(wanted, files, strict=True)})
    index_of = {name: index for index, name in enumerate(names)}
    place_of = {stem: place for place, stem in enumerate(wanted)}
    for stem in stems:
        if stem in xml_paths:
            files[place_of[stem]].add_findings(findings, index_of, readable(xml_paths[stem]))
    pairs: list[tuple[str, str, str | None]] = []
    for stem in stems:
        paths = image_paths.get(stem, [])
        if not paths:
            pairs.append((xml_paths.get(stem, stem), stem, _NO_IMAGE))
        are_clear = len(paths) == 1 or stem not in xml_paths
        for path in paths:
            is_clear = are_clear or PurePosixPath(path).name == files[place_of[stem]].file_name
            pairs.append((path, stem, None if is_clear else "its XML file may belong to another image of this name"))
    pairs.sort()
    if config.unlabelled == "keep":
        for image_id, (path, stem, refusal) in enumerate(pairs):
            if stem not in xml_paths and refusal is None:
                findings.note(Finding(UNLABELLED_KEPT, readable(path), image_id))
    without = _VocFile(refusal=UNLABELLED if config.unlabelled == "reject" else None)

    def records() -> Iterator[SourceImage]:
        ids = count(1)
        for image_id, (path, stem, refusal) in enumerate(pairs):
            annotation = files[place_of[stem]] if stem in place_of else without
            yield SourceImage(
                image_id=image_id,
                path=readable(path),
                objects=annotation.objects(index_of, ids),
                size_hw=annotation.size_hw,
                extra={"source_id": readable(stem)},
                refusal=refusal or images.refuse_outside(path) or annotation.refusal,
            )

    categories = tuple(Category(id=index + 1, name=name) for name, index in index_of.items())
    return Source(records, len(pairs), categories, SOURCE_ID, findings)


def _list_xml_files(annotations: ImageFolder, images: ImageFolder, findings: FindingLog) -> dict[str, str]:
    """List the XML files by their path without extension."""
    files = list_below(annotations)
    xml_files = sorted(path for path in files if path.lower().endswith(".xml"))
    if not xml_files:
        elsewhere = sum(path.lower().endswith(".xml") for path in list_below(images))
        hint = "for images without labels, use `raydet prepare images`"
        hint = f"--images {images.uri} holds {elsewhere} XML files" if elsewhere else hint
        raise UserError(f"--annotations {annotations.uri} holds no XML files, but {len(files)} others; {hint}")
    if all(annotations.refuse_outside(path) == LEAVES_BY_LINK for path in xml_files):
        raise all_outside(annotations, xml_files, "XML files")
    paths = {_stem(path): path for path in xml_files}
    for path in sorted(set(xml_files) - set(paths.values())):
        findings.note(Finding("XML files with the same name as another, skipped", readable(path)))
    return paths


def _list_image_files(images: ImageFolder, findings: FindingLog) -> dict[str, list[str]]:
    """List the images by their path without extension."""
    paths: defaultdict[str, list[str]] = defaultdict(list)
    skipped = Counter[str]()
    for path in image_files_below(images, skipped):
        paths[_stem(path)].append(path)
    del skipped[".xml"]  # the annotations may lie beside their images
    findings.note(Finding(SKIPPED, count=skipped.total(), detail=skipped_detail(skipped)))
    return dict(paths)


def _check_match(
    annotations: ImageFolder, images: ImageFolder, xml_paths: Mapping[str, str], image_paths: Mapping[str, list[str]]
) -> None:
    """Refuse folders in which no XML file belongs to an image, and suggest those that were probably meant."""
    if image_paths.keys() & xml_paths.keys():
        return
    xml_path, (image_path, *_) = min(xml_paths.values()), min(image_paths.values())
    text = (
        f"no XML file in --annotations {annotations.uri} has the path of an image in --images {images.uri}: the first "
        f"are {readable(xml_path)} and {readable(image_path)}"
    )
    folders = aligned_folders(xml_paths.values(), sorted(chain(*image_paths.values())))
    if folders is None:
        raise UserError(f"{text}; for images without labels, use `raydet prepare images`")
    sides = (
        ("--annotations", annotations, folders[0], list(xml_paths.values())),
        ("--images", images, folders[1], list(chain(*image_paths.values()))),
    )
    options = [side for side in sides if side[2]]
    holds = ", ".join(f"{option} holds {top_folders(paths)}" for option, _, _, paths in options)
    meant = " ".join(f"{option} {folder.uri_of(subfolder)}" for option, folder, subfolder, _ in options)
    raise UserError(f"{text}; {holds}: did you mean {meant}?")


def _no_class(annotations: ImageFolder, refusal_of: Mapping[str, str | None]) -> UserError:
    """Explain why the XML files name no class, given the refusal of each, if any."""
    refused = [(path, refusal) for path, refusal in refusal_of.items() if refusal is not None]
    if not refused:
        return UserError(
            f"no object in any XML file below {annotations.uri}; for images without labels, use `raydet prepare images`"
        )
    text = f"none of the {len(refused)} XML files below {annotations.uri} can be read"
    if num_read := len(refusal_of) - len(refused):
        text = f"no object in the {num_read} XML files below {annotations.uri} that can be read; "
        text += f"{len(refused)} cannot be"
    return UserError(f"{text}; {readable(refused[0][0])}: {refused[0][1]}")


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


def _read_split(
    uri: str, image_paths: Mapping[str, list[str]], xml_paths: Mapping[str, str], findings: FindingLog
) -> set[str]:
    """Read the names in a split file, without repetitions."""
    try:
        text = decode_text(storage.read_bytes(uri, max_bytes=_MAX_SPLIT_BYTES))
    except FileNotFoundError:
        raise UserError(f"no such split file: {storage.absolute_uri(uri)}") from None
    except (OSError, TextError) as error:
        raise UserError(f"cannot read the split file {uri}: {one_line(error)}") from None
    stems = []
    for line in filter(None, map(str.strip, text.splitlines())):
        # The whole line first, since names may contain spaces.
        candidates = [line, line.rsplit(maxsplit=1)[0]]
        candidates += [_stem(name) for name in candidates if is_image_name(name)]
        known = [name for name in candidates if name in image_paths or name in xml_paths]
        stems.append(known[0] if known else candidates[1])
    if not stems:
        raise UserError(
            f"the split file {uri} names no images; it must contain one name per line, as in ImageSets/Main"
        )
    for stem, times in Counter(stems).items():
        findings.note(Finding("repeated lines in the split file, skipped", readable(stem), count=times - 1))
    return set(stems)


def _read_annotation(folder: ImageFolder, path: str, *, zero_based: bool) -> _VocFile:
    """Read one XML file, in a thread."""
    refusal = folder.refuse_outside(path)
    if refusal is not None:
        return _VocFile(refusal=f"its XML file: {refusal}")
    try:
        root = _parse(folder.read(path, max_bytes=MAX_LABEL_BYTES))
    except (ReadError, XmlError) as error:
        return _VocFile(refusal=str(error) if isinstance(error, XmlError) else f"its XML file: {error}")
    result = _VocFile(file_name=_text(root, "filename"), size_hw=_size_hw(root))
    offset = 0.0 if zero_based else 1.0
    for item in root.findall("object"):
        name = readable(_text(item, "name"))
        if len(name) > LONGEST_CLASS_NAME:
            return _VocFile(refusal=f"its XML file: a name of {len(name):,} characters, at most {LONGEST_CLASS_NAME:,}")
        corners = finite_numbers(item.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
        if not name or corners is None:
            result.note(_NO_BOX)
            continue
        left, top, right, bottom = corners
        result.note("boxes that begin before pixel 1, as if counted from 0 (see --zero-based)", min(left, top) < offset)
        is_difficult = _text(item, "difficult") or "0"
        result.note("objects whose `difficult` is neither 0 nor 1, treated as 0", is_difficult not in ("0", "1"))
        left, top = left - offset, top - offset
        width, height = right - left, bottom - top
        result.add(name, (left, top, width, height), area=width * height, iscrowd=is_difficult == "1")
    if result.notes and not result.names:
        return _VocFile(refusal="its XML file: none of its objects has a name and a box of four numbers")
    stated = result.file_name.replace("\\", "/").rsplit("/", 1)[-1]
    is_other = not {stated, PurePosixPath(stated).stem} & {PurePosixPath(path).stem, ""}
    result.note("`filename` tags that name another image", is_other)
    return result


def _parse(data: bytes) -> ElementTree.Element:
    try:
        # Editors that save as UTF-16 leave a declaration that says UTF-8, which the parser ignores in text.
        text = data if encoding_of(data).startswith("utf-8") else decode_text(data)
        # Safe here: without a DOCTYPE there are no entities, and the parser never opens other files.
        root = ElementTree.fromstring(text, parser=ElementTree.XMLParser(target=_TreeTarget()))
    except TextError as error:
        raise XmlError(f"broken XML: {error}") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise XmlError(f"broken XML: {one_line(error)}") from None
    if root.tag != "annotation":
        raise XmlError(f"broken XML: its root is <{readable(root.tag)[:40]}>, not <annotation>")
    return root


def _text(parent: ElementTree.Element, tag: str) -> str:
    return (parent.findtext(tag) or "").strip()


def _size_hw(root: ElementTree.Element) -> tuple[int, int] | None:
    size_hw = finite_numbers(root.findtext(f"size/{side}") for side in ("height", "width"))
    return None if size_hw is None else size_hw_of(int(size_hw[0]), int(size_hw[1]))
