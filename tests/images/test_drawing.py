from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from raydet.images.drawing import class_colours, draw_boxes, draw_comparison

Picture = npt.NDArray[np.uint8]


def grey(height: int = 200, width: int = 300) -> Picture:
    return np.full((height, width, 3), 90, np.uint8)


def changed(image: Picture, drawn: Picture) -> npt.NDArray[np.bool_]:
    assert drawn.shape == image.shape and drawn.dtype == np.uint8
    return np.asarray((image != drawn).any(axis=2))


def test_a_box_is_drawn_in_the_colour_of_its_class_with_a_filled_label_above_it() -> None:
    image, colours = grey(), class_colours(["cat", "dog"])
    drawn = draw_boxes(image, [[50.0, 60.0, 100.0, 80.0]], ["dog"], colours=colours)
    tint = np.array(colours["dog"])
    for y, x in ((60, 100), (140, 100), (100, 50), (100, 150)):
        assert (drawn[y, x] == tint).all()
    assert not changed(image, drawn)[62:138, 52:148].any()
    label = drawn[48:59, 51:70]
    assert (label == tint).all(axis=2).mean() > 0.5  # the background is filled
    assert (label.sum(axis=2) < 60).any() or (label.sum(axis=2) > 700).any()  # and there is text on it
    assert (image == 90).all()


def test_colours_are_distinct_and_stable() -> None:
    names = [f"class {number}" for number in range(1000)]
    colours = class_colours(names)
    assert len(set(colours.values())) == 1000
    assert class_colours(names) == colours
    first = np.array([colours[name] for name in names[:12]], float)
    distances = np.linalg.norm(first[:, None] - first[None], axis=2) + np.eye(12) * 1000
    assert distances.min() > 50
    alone = draw_boxes(grey(), [[50, 60, 100, 80]], ["cat"])
    beside = draw_boxes(grey(), [[50, 60, 100, 80], [160, 60, 100, 80]], ["cat", "dog"])
    assert (alone[140, 100] == beside[140, 100]).all()


@pytest.mark.parametrize(
    "box_xywh",
    [[0, 0, 300, 200], [250, 0, 50, 20], [0, 180, 40, 20], [-50, -50, 100, 100], [290, 190, 500, 500], [0, 0, 1, 1]],
)
def test_labels_stay_inside_the_picture(box_xywh: list[float]) -> None:
    image = grey()
    colours = {"a rather long class name": (0, 158, 115)}
    drawn = draw_boxes(image, [box_xywh], list(colours), scores=[0.5], colours=colours)
    ys, xs = np.nonzero(changed(image, drawn))
    without_text = draw_boxes(image, [box_xywh], [""], colours={"": (0, 158, 115)})
    # The label has its full width wherever the box lies, so its text is not cut.
    label = changed(without_text, drawn)
    columns = np.nonzero(label.any(axis=0))[0]
    assert columns.max() - columns.min() > 100
    assert len(ys) and ys.max() < 200 and xs.max() < 300


def test_long_names_are_shortened_and_very_small_pictures_survive() -> None:
    long = draw_boxes(grey(), [[10, 50, 200, 100]], ["x" * 500], colours={"x" * 500: (0, 158, 115)})
    same = draw_boxes(grey(), [[10, 50, 200, 100]], ["x" * 400], colours={"x" * 400: (0, 158, 115)})
    assert (long == same).all()
    assert changed(grey(), long)[30:49].any(axis=0).sum() < 250
    for size in (1, 3, 17):
        tiny = np.zeros((size, size, 3), np.uint8)
        assert draw_boxes(tiny, [[0, 0, size, size]], ["x" * 500], scores=[0.5]).shape == (size, size, 3)


def test_boxes_without_area_or_outside_leave_the_picture_as_it_is() -> None:
    boxes = [[10, 10, 0, 5], [float("nan"), 0, 5, 5], [400, 10, 20, 20], [-30, 10, 20, 20]]
    image = grey()
    assert not changed(image, draw_boxes(image, boxes, ["a", "b", "c", "d"], scores=[0.1, 0.2, 0.3, 0.4])).any()
    assert not changed(image, draw_boxes(image, np.zeros((0, 4)), [])).any()


def test_the_text_grows_with_the_picture() -> None:
    def label_height(height: int, width: int) -> int:
        image = grey(height, width)
        drawn = draw_boxes(image, [[width / 4, height / 2, width / 2, height / 4]], ["cat"])
        return int(changed(image, drawn)[: height // 2 - 1].any(axis=1).sum())

    assert label_height(1500, 2000) > 2 * label_height(300, 400)


def test_labels_of_neighbours_do_not_hide_each_other() -> None:
    image, colours = grey(), {"cat": (0, 158, 115), "dog": (230, 159, 0)}
    drawn = draw_boxes(
        image, [[50, 60, 100, 80], [52, 61, 100, 80]], ["cat", "dog"], scores=[0.9, 0.8], colours=colours
    )
    for tint in colours.values():
        filled = (drawn == np.array(tint)).all(axis=2)
        assert filled.sum() > 4 * (100 + 80)  # far more than the frame of the box


def test_truth_and_detections_stand_side_by_side() -> None:
    image = grey(400, 500)
    sheet = draw_comparison(
        image,
        [[50, 60, 100, 80]],
        [1],
        [[50, 60, 100, 80], [300, 200, 100, 80]],
        [1, 0],
        [0.9, 0.3],
        ["cat", "dog"],
    )
    bar, gap = sheet.shape[0] - 400, sheet.shape[1] - 1000
    assert 10 < bar < 40 and 0 < gap < 20
    left, right = sheet[bar:, :500], sheet[bar:, 500 + gap :]
    dog = np.array(class_colours(["cat", "dog"])["dog"])
    assert (left[140, 100] == dog).all() and (right[140, 100] == dog).all()
    assert not changed(image, right)[180:300, 280:420].any()  # its score is not above the threshold
    assert changed(left.copy(), right.copy())[:59, 40:200].any()  # a score on the right only
    for half in (sheet[:bar, :500], sheet[:bar, 500 + gap :]):
        assert (half < 60).all(axis=2).any() and (half[0] == 255).all()


@pytest.mark.parametrize(("height", "width", "side"), [(64, 64, 320), (3000, 4000, 800), (500, 400, 500)])
def test_a_comparison_is_of_a_size_to_look_at(height: int, width: int, side: int) -> None:
    box = [[width / 4, height / 2, width / 2, height / 4]]
    sheet = draw_comparison(grey(height, width), box, [0], box, [0], [0.9], ["cat"])
    shown_width = side * width // max(height, width)
    shown_height = side * height // max(height, width)
    assert 2 * shown_width < sheet.shape[1] < 2 * shown_width + 20
    half = sheet[sheet.shape[0] - shown_height :, :shown_width]
    tint = np.array(class_colours(["cat"])["cat"])
    assert (
        (half[round(shown_height * 0.75) - 1 : round(shown_height * 0.75) + 2, shown_width // 2] == tint).all(1).any()
    )


def test_real_pictures_are_drawn_on(test_data: Path) -> None:
    path = sorted((test_data / "bccd" / "images").iterdir())[0]
    image = np.asarray(Image.open(path).convert("RGB"))
    sheet = draw_comparison(image, [[10, 10, 90, 90]], [0], [], [], [], ["RBC"])
    assert sheet.shape[1] > 2 * image.shape[1]
    assert (sheet[-image.shape[0] :, -image.shape[1] :] == image).all()
