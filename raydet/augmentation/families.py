"""Transforms of the detector families' own recipes: DETR's crop, photometric distortion, zoom-out and IoU crop.

The last three come from SSD (https://arxiv.org/abs/1512.02325), here with the ranges of torchvision's
`RandomPhotometricDistort`, `RandomZoomOut` and `RandomIoUCrop`, which RT-DETR and D-FINE use. They are written for
numpy and OpenCV: torchvision takes seconds to import in every worker, and fills up to sixteen times the pixels of an
image before it crops; the crops of albumentations that know about boxes keep all of them, unlike an IoU crop.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np
import numpy.typing as npt

from raydet.augmentation.samples import Sample, WorkingSize, area_of, chosen, cut
from raydet.augmentation.taught import is_labels
from raydet.common.boxes import Boxes, as_boxes, intersections, xywh_to_xyxy
from raydet.models.geometry import SizeHW

Rng = np.random.Generator

# DETR's recipe: an image is scaled to one of these short sides, and the sides of its crop are in this range, in pixels.
_DETR_SHORT_SIDES = (400, 500, 600)
_DETR_CROP = (384, 600)

_DISTORTION_P = 0.5
_BRIGHTNESS = (0.875, 1.125)
_CONTRAST = _SATURATION = (0.5, 1.5)
_HUE = (-0.05, 0.05)
_LUMA = (0.299, 0.587, 0.114)
_VALUES: npt.NDArray[np.float64] = np.arange(256, dtype=np.float64)

_ZOOM_OUT_P = 0.5
_ZOOM_OUT = (1.0, 4.0)
_IOU_CROP_P = 0.8
# Minimum IoU of the crop with one of the boxes; 1 leaves the image as it is.
_MIN_IOUS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
_CROP_SIDES = (0.3, 1.0)
_CROP_ASPECTS = (0.5, 2.0)
_TRIALS = 40
_MIN_SIDE_PX = 1.0


def detr_crop(sample: Sample, rng: Rng, *, min_visible: float = 0.0, min_area_px: float = 0.0) -> Sample:
    """Apply DETR's random crop: 384 to 600 pixels per side, at a short side of 400, 500 or 600 pixels.

    The image is not scaled here, since the model's resize follows; the crop selects the same part of the image. As in
    the source, all boxes of which any part is visible are kept by default; see `cut` for the arguments.
    """
    scale = float(rng.choice(_DETR_SHORT_SIDES)) / min(sample.size_hw)
    sides, corner = [], []
    for side in sample.size_hw:
        scaled = side * scale
        length = rng.uniform(min(_DETR_CROP[0], scaled), min(_DETR_CROP[1], scaled)) / scale
        sides.append(min(max(round(length), 1), side))
        corner.append(int(rng.integers(side - sides[-1] + 1)))
    window_hw = (sides[0], sides[1])
    return cut(sample, (corner[1], corner[0]), window_hw, min_visible=min_visible, min_area_px=min_area_px)


def photometric(sample: Sample, rng: Rng) -> Sample:
    """Distort brightness, contrast, saturation and hue, and permute the channels, each with probability 0.5."""
    brightness, contrast, saturation, hue = (
        rng.uniform(*limits) if rng.random() < _DISTORTION_P else None
        for limits in (_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE)
    )
    contrast_first = rng.random() < 0.5
    image = np.ascontiguousarray(sample.image)
    if brightness is not None:
        image = _mapped(image, brightness * _VALUES)
    if contrast is not None and contrast_first:
        image = _with_contrast(image, contrast)
    if saturation is not None:
        image = _recoloured(image, saturation * np.eye(3) + (1 - saturation) * np.tile(_LUMA, (3, 1)))
    if hue is not None:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
        # A full turn is 256, so uint8 wraps around as hue does.
        hsv[..., 0] += np.uint8(round(256 * hue) % 256)
        image = np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL), np.uint8)
    if contrast is not None and not contrast_first:
        image = _with_contrast(image, contrast)
    if rng.random() < _DISTORTION_P:
        image = _recoloured(image, np.eye(3)[rng.permutation(3)])
    return replace(sample, image=image)


def _with_contrast(image: npt.NDArray[np.uint8], factor: float) -> npt.NDArray[np.uint8]:
    mean = float(np.dot(cv2.mean(image)[:3], _LUMA))
    return _mapped(image, mean + factor * (_VALUES - mean))


def _mapped(image: npt.NDArray[np.uint8], values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Replace each of the 256 values of a channel."""
    return np.asarray(cv2.LUT(image, np.clip(np.rint(values), 0, 255).astype(np.uint8)), np.uint8)


def _recoloured(image: npt.NDArray[np.uint8], matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Apply a matrix [3, 3] to the colour of each pixel; values are clipped."""
    return np.asarray(cv2.transform(image, matrix), np.uint8)


@dataclass(frozen=True)
class ZoomAndCrop:
    """Zoom-out with probability 0.5, then an IoU crop with probability 0.8, then removal of boxes too small to learn.

    Zoom-out places the image on a black canvas of up to four times its sides. An IoU crop is a window of 0.3 to 1 of
    each side that has an IoU of at least a random minimum with one box; boxes whose centre lies outside are dropped.
    Both choose a window first, which is then rendered once, no larger than the working size: the canvas around it
    never exists.

    Attributes:
        working_size: Size at which images are augmented; None keeps the resolution of the image.
    """

    working_size: WorkingSize | None

    def __call__(self, sample: Sample, rng: Rng) -> Sample:
        """Apply the step."""
        (left, top), window_hw = (0, 0), sample.size_hw
        if rng.random() < _ZOOM_OUT_P:
            (left, top), window_hw = _zoomed_out(sample.size_hw, rng)
        if rng.random() < _IOU_CROP_P:
            is_label = is_labels(sample) & ~sample.iscrowd
            chosen_from = is_label if is_label.any() else ~sample.iscrowd
            boxes_xywh = sample.boxes_xywh[chosen_from] - np.array([left, top, 0, 0], np.float64)
            (crop_left, crop_top), cropped_hw = _iou_crop(boxes_xywh, window_hw, rng)
            if cropped_hw != window_hw:
                left, top, window_hw = left + crop_left, top + crop_top, cropped_hw
                window_xywh = np.array([[left, top, window_hw[1], window_hw[0]]], np.float64)
                sample = chosen(sample, _centres_within(sample.boxes_xywh, window_xywh)[0])
        size_hw = self.working_size.fitted_hw(window_hw) if self.working_size else window_hw
        sample = cut(sample, (left, top), window_hw, size_hw, fill=0, min_visible=0.0, min_area_px=0.0)
        # At least one pixel of the model's input on each side.
        model_hw = self.working_size.rule.target_size_hw(size_hw) if self.working_size else size_hw
        sides_px = sample.boxes_xywh[:, 2:] * (model_hw[1] / size_hw[1], model_hw[0] / size_hw[0])
        return chosen(sample, np.all(sides_px >= _MIN_SIDE_PX, axis=1))


def _zoomed_out(size_hw: SizeHW, rng: Rng) -> tuple[tuple[int, int], SizeHW]:
    """Choose a canvas around an image: its upper left corner (x, y) in pixels of the image, and its size."""
    zoom = rng.uniform(*_ZOOM_OUT)
    height, width = (int(side * zoom) for side in size_hw)
    top, left = (int((outer - side) * rng.random()) for outer, side in zip((height, width), size_hw, strict=True))
    return (-left, -top), (height, width)


def _iou_crop(boxes_xywh: Boxes, size_hw: SizeHW, rng: Rng) -> tuple[tuple[int, int], SizeHW]:
    """Choose an IoU crop: its upper left corner (x, y) and its size; the whole image if there are no boxes."""
    while len(boxes_xywh) and (min_iou := _MIN_IOUS[int(rng.integers(len(_MIN_IOUS)))]) < 1:
        windows_xywh = _random_windows(size_hw, rng)
        ious = _ious(boxes_xywh, windows_xywh)
        # Only boxes whose centre is inside count; without one, a window does not qualify.
        best = np.where(_centres_within(boxes_xywh, windows_xywh), ious, -1.0).max(axis=1)
        if (best >= min_iou).any():
            left, top, width, height = windows_xywh[np.argmax(best >= min_iou)].astype(int).tolist()
            return (left, top), (height, width)
    return (0, 0), size_hw


def _random_windows(size_hw: SizeHW, rng: Rng) -> Boxes:
    """Return up to `_TRIALS` windows with the sides and aspects of an IoU crop, in whole pixels, [M, 4]."""
    sides, corners = rng.uniform(*_CROP_SIDES, (_TRIALS, 2)), rng.random((_TRIALS, 2))
    size_wh = np.array(size_hw[::-1])
    windows_wh = np.floor(size_wh * sides)
    windows_xywh = np.concatenate([np.floor((size_wh - windows_wh) * corners), windows_wh], axis=1)
    widths, heights = windows_wh.T
    is_allowed = (widths >= _CROP_ASPECTS[0] * heights) & (widths <= _CROP_ASPECTS[1] * heights)
    return as_boxes(windows_xywh[is_allowed & (widths > 0) & (heights > 0)])


def _centres_within(boxes_xywh: Boxes, windows_xywh: Boxes) -> npt.NDArray[np.bool_]:
    """Return a mask of the boxes whose centre is inside a window, [N, 4] and [M, 4] → [M, N]."""
    offsets = (boxes_xywh[:, :2] + boxes_xywh[:, 2:] / 2)[None] - windows_xywh[:, None, :2]
    return np.asarray(np.all((offsets > 0) & (offsets < windows_xywh[:, None, 2:]), axis=2))


def _ious(boxes_xywh: Boxes, windows_xywh: Boxes) -> npt.NDArray[np.float64]:
    """Return the IoU of each window with each box, [N, 4] and [M, 4] → [M, N]."""
    common = intersections(xywh_to_xyxy(boxes_xywh), xywh_to_xyxy(windows_xywh)[:, None])
    return np.asarray(common / (area_of(boxes_xywh)[None] + area_of(windows_xywh)[:, None] - common))
