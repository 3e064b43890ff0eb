"""Drawing of boxes with class names on images."""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from raydet.common.boxes import as_boxes, clip_xywh, has_area, xywh_to_xyxy
from raydet.common.errors import one_line

RgbImage = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

_Rectangle = tuple[float, float, float, float]
_Font = ImageFont.FreeTypeFont

# Distinct on photographs and with common colour vision deficiencies.
_COLOURS: tuple[Colour, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167), (60, 80, 220),
    (150, 220, 60), (220, 30, 60), (140, 60, 180), (0, 220, 210), (150, 90, 40),
)  # fmt: skip
_MARGIN = 2
_MAX_NAME_LENGTH = 24
_MAX_SIDE = 800
_MIN_SIDE = 320


def class_colours(names: Sequence[str]) -> dict[str, Colour]:
    """Assign a colour to each class by its position in the list.

    The first twelve colours are the easiest to distinguish; a thousand are pairwise different.
    """
    return {name: _colour(number) for number, name in enumerate(names)}


def _colour(number: int) -> Colour:
    if number < len(_COLOURS):
        return _COLOURS[number]
    # Steps of the golden angle never repeat a hue; brightness and saturation vary as well.
    rest = number - len(_COLOURS)
    hue = (0.11 + rest * 0.6180339887) % 1.0
    value, saturation = (1.0, 0.75, 0.9)[rest % 3], (0.85, 0.6)[rest // 3 % 2]
    parts = [np.clip(abs((hue * 6 + offset) % 6 - 3) - 1, 0, 1) for offset in (0, 4, 2)]
    red, green, blue = (round(255 * value * (1 - saturation + saturation * float(part))) for part in parts)
    return red, green, blue


def draw_boxes(
    image: RgbImage,
    boxes_xywh: object,
    class_names: Sequence[str],
    *,
    scores: Sequence[float] | npt.NDArray[np.float64] | None = None,
    colours: Mapping[str, Colour] | None = None,
) -> RgbImage:
    """Draw labelled boxes on a copy of an image.

    Args:
        image: uint8 RGB [H, W, 3].
        boxes_xywh: Boxes in pixels of the image, [N, 4]; clipped to the image, and skipped if without area.
        class_names: Class name of each box; long names are shortened.
        scores: Scores shown after the names, [N]; boxes with higher scores are drawn on top.
        colours: Colours by class name, see `class_colours`; other classes get a colour derived from their name.

    Returns:
        uint8 RGB [H, W, 3].
    """
    canvas = Image.fromarray(_checked(image))
    draw = ImageDraw.Draw(canvas)
    width, height = canvas.size
    boxes = as_boxes(boxes_xywh)
    order = range(len(boxes)) if scores is None else np.argsort(np.asarray(scores), kind="stable").tolist()
    texts = [_shortened(name) for name in class_names]
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores, strict=True)]
    assert len(texts) == len(boxes), f"{len(boxes)} boxes need as many class names, got {len(texts)}"
    clipped = clip_xywh(boxes, (height, width))
    drawn = [number for number in order if has_area(clipped[[number]])[0]]
    corners = xywh_to_xyxy(clipped)
    line_width = max(1, round(max(width, height) / 320))
    tints = [_tint(name, colours) for name in class_names]
    for number in drawn:
        left, top, right, bottom = corners[number]
        frame = (left, top, max(left, min(right, width - 1)), max(top, min(bottom, height - 1)))
        draw.rectangle(frame, outline=tints[number], width=line_width)
    font = _font(_font_size(width, height))
    texts = [_fitted(text, font, width - 2 * _MARGIN) for text in texts]
    places: dict[int, _Rectangle] = {}
    # Boxes with higher scores choose their label position first.
    for number in reversed(drawn):
        size_wh = font.getlength(texts[number]) + 2 * _MARGIN, sum(font.getmetrics()) + _MARGIN
        places[number] = _place(size_wh, corners[number].tolist(), (width, height), list(places.values()))
    for number in drawn:
        _draw_label(draw, texts[number], places[number], tints[number], font)
    return np.array(canvas)


def draw_comparison(
    image: RgbImage,
    truth_boxes_xywh: object,
    truth_categories: Sequence[int] | npt.NDArray[np.int64],
    boxes_xywh: object,
    categories: Sequence[int] | npt.NDArray[np.int64],
    scores: Sequence[float] | npt.NDArray[np.float64],
    names: Sequence[str],
    *,
    score_threshold: float = 0.3,
) -> RgbImage:
    """Draw an image with its true boxes beside the same image with its detections.

    Args:
        image: uint8 RGB [H, W, 3]; scaled to a readable size.
        truth_boxes_xywh: True boxes in pixels of the image, [N, 4].
        truth_categories: Category indices of the true boxes, [N].
        boxes_xywh: Detected boxes in pixels of the image, [M, 4].
        categories: Category indices of the detections, [M].
        scores: Scores of the detections, [M].
        names: Class names by category index.
        score_threshold: Detections with this score or less are not drawn.

    Returns:
        uint8 RGB [H', 2 W' + gap, 3] with a title above each half.
    """
    resized = at_readable_size(image)
    (height, width), colours = image.shape[:2], class_colours(names)
    scale = np.array([resized.shape[1] / width, resized.shape[0] / height] * 2)
    kept_scores = np.asarray(scores, np.float64)
    kept = kept_scores > score_threshold
    halves = (
        draw_boxes(resized, as_boxes(truth_boxes_xywh) * scale, [names[i] for i in truth_categories], colours=colours),
        draw_boxes(
            resized,
            as_boxes(boxes_xywh)[kept] * scale,
            [names[category] for category, keep in zip(categories, kept, strict=True) if keep],
            scores=kept_scores[kept],
            colours=colours,
        ),
    )
    return _side_by_side(
        halves, (f"truth: {len(truth_categories)}", f"detected: {kept.sum()} above {score_threshold:g}")
    )


def _side_by_side(halves: Sequence[RgbImage], titles: Sequence[str]) -> RgbImage:
    height, width = halves[0].shape[:2]
    size = _font_size(width, height) + 2
    bar, gap = size + 8, max(4, width // 100)
    sheet = Image.new("RGB", (width * len(halves) + gap * (len(halves) - 1), height + bar), "white")
    draw, font = ImageDraw.Draw(sheet), _font(size)
    for number, (half, title) in enumerate(zip(halves, titles, strict=True)):
        left = number * (width + gap)
        draw.text((left + 4, bar / 2), _fitted(title, font, width - 8), fill="black", font=font, anchor="lm")
        sheet.paste(Image.fromarray(half), (left, bar))
    return np.array(sheet)


def _checked(image: RgbImage) -> RgbImage:
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3, (
        f"an image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}"
    )
    return image


def at_readable_size(image: RgbImage, *, min_side: int = _MIN_SIDE, max_side: int = _MAX_SIDE) -> RgbImage:
    """Scale an image so that its longest side suits labels and a page.

    Args:
        image: uint8 RGB [H, W, 3].
        min_side: Minimum length of the longest side in pixels.
        max_side: Maximum length of the longest side in pixels.
    """
    height, width = _checked(image).shape[:2]
    longest = max(height, width)
    scale = float(np.clip(longest, min_side, max_side)) / longest
    if scale == 1:
        return image
    # Nearest neighbour when enlarging: blur could be mistaken for the model's input.
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
    size_wh = max(1, round(width * scale)), max(1, round(height * scale))
    return np.array(Image.fromarray(image).resize(size_wh, method))


def _font_size(width: int, height: int) -> int:
    return int(np.clip(round(max(width, height) / 45), 10, 48))


def _font(size: int) -> _Font:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "this Pillow was built without FreeType"
    return font


def _shortened(name: str) -> str:
    name = one_line(name)
    return name if len(name) <= _MAX_NAME_LENGTH else name[: _MAX_NAME_LENGTH - 1].rstrip() + "…"


def _tint(label: str, colours: Mapping[str, Colour] | None) -> Colour:
    if colours is not None and label in colours:
        return colours[label]
    return _colour(zlib.crc32(label.encode()) % 1000)


def _place(
    size_wh: tuple[float, float],
    corners: Sequence[float],
    image_wh: tuple[int, int],
    taken: Sequence[_Rectangle],
) -> _Rectangle:
    """Choose the position of a label: at an edge of its box, inside the image, clear of other labels if possible.

    Args:
        size_wh: Width and height of the label in pixels.
        corners: Left, top, right and bottom of the box.
        image_wh: Width and height of the image in pixels.
        taken: Rectangles of other labels.

    Returns:
        Left, top, right and bottom of the label.
    """
    (width, height), (left, top, right, bottom) = size_wh, corners

    def at(x: float, y: float) -> _Rectangle:
        x = max(0.0, min(x, image_wh[0] - width))
        return x, y, x + width, y + height

    places = [at(left, top - height), at(left, top), at(left, bottom), at(left, bottom - height), at(right, top)]
    inside = [place for place in places if place[1] >= 0 and place[3] <= image_wh[1]]
    free = [place for place in inside if not any(_overlap(place, other) for other in taken)]
    return (free or inside or [at(left, 0.0)])[0]


def _draw_label(draw: ImageDraw.ImageDraw, text: str, place: _Rectangle, tint: Colour, font: _Font) -> None:
    left, top, right, bottom = place
    draw.rectangle((left, top, right - 1, bottom - 1), fill=tint)
    luminance = 0.299 * tint[0] + 0.587 * tint[1] + 0.114 * tint[2]
    fill = "black" if luminance > 127 else "white"
    draw.text((left + _MARGIN, (top + bottom) / 2), text, fill=fill, font=font, anchor="lm")


def _overlap(one: _Rectangle, other: _Rectangle) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _fitted(text: str, font: _Font, width: float) -> str:
    """Shorten a text until it is at most `width` pixels wide."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…" if text else ""
