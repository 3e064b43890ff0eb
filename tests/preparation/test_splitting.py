import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet.common.errors import UserError
from raydet.preparation.splitting import UnitLabels, choose_validation
from raydet.preparation.surveying import find_duplicates

IMAGES = st.lists(st.tuples(st.integers(0, 25), st.sets(st.integers(0, 5), max_size=3)), min_size=2, max_size=40)
"""Content id and classes of each image; some contents are repeated."""


def hashes_of(contents: list[int]) -> np.ndarray:
    # Spread over all 128 bits, like file hashes.
    numbers = np.asarray(contents, np.uint64)
    return np.stack([numbers * np.uint64(0x9E3779B97F4A7C15), numbers * np.uint64(0xC2B2AE3D27D4EB4F)], axis=1)


def choose(images: list[tuple[int, set[int]]], fraction: float, seed: int = 0, num_classes: int = 6) -> list[bool]:
    pairs = [(number, item) for number, (_, classes) in enumerate(images) for item in sorted(classes)]
    units, classes = np.array(pairs, np.int64).reshape(-1, 2).T
    hashes = hashes_of([content for content, _ in images])
    labels = UnitLabels(units, classes)
    chosen = choose_validation(hashes, labels, num_classes=num_classes, val_fraction=fraction, seed=seed)
    assert chosen.dtype == np.bool_ and chosen.shape == (len(images),)
    return [bool(item) for item in chosen]


@settings(max_examples=150, deadline=None)
@given(images=IMAGES, fraction=st.floats(0.05, 0.95), seed=st.integers(0, 2**70), data=st.data())
def test_the_choice_depends_on_the_set_of_images_alone(
    images: list[tuple[int, set[int]]], fraction: float, seed: int, data: st.DataObject
) -> None:
    contents = [content for content, _ in images]
    if len(set(contents)) < 2:
        with pytest.raises(UserError, match=r"two .* found 1"):
            choose(images, fraction, seed)
        return
    is_val = choose(images, fraction, seed)
    order = data.draw(st.permutations(range(len(images))))
    assert choose([images[place] for place in order], fraction, seed) == [is_val[place] for place in order]
    val = {content for content, chosen in zip(contents, is_val, strict=True) if chosen}
    train = {content for content, chosen in zip(contents, is_val, strict=True) if not chosen}
    assert val and train and not val & train
    present: dict[int, set[int]] = {}
    for content, classes in images:
        for item in classes:
            present.setdefault(item, set()).add(content)
    classes_of = {content: {item for item, own in present.items() if content in own} for content in set(contents)}
    is_only = {content: any(present[item] == {content} for item in own) for content, own in classes_of.items()}
    for item, own in present.items():
        # If each content is the only one of some class, one class must lose its training content.
        assert own & train or all(is_only.values()), f"class {item} is not in training"
        if len(own) > 1 and not own & val:
            # Moving any content of the class would remove some class from training.
            assert all(any(len(present[other] & train) == 1 for other in classes_of[content]) for content in own)


def test_images_without_labels_are_held_out_by_the_fraction() -> None:
    images: list[tuple[int, set[int]]] = [(number, set()) for number in range(1000)]
    first, second = choose(images, 0.15, seed=1337), choose(images, 0.15, seed=1338)
    assert sum(first) == sum(second) == 150
    assert 5 < sum(one and other for one, other in zip(first, second, strict=True)) < 60
    assert first == choose(images, 0.15, seed=1337)
    # Even with few images neither split is empty.
    assert sum(choose(images[:2], 0.01)) == sum(choose(images[:2], 0.99)) == 1


def test_every_class_keeps_its_share() -> None:
    rng = np.random.default_rng(0)
    frequency = np.array([0.9, 0.3, 0.1, 0.03, 0.01, 0.002])
    present = rng.random((3000, 6)) < frequency
    images = [(number, set(np.flatnonzero(row).tolist())) for number, row in enumerate(present)]
    is_val = np.array(choose(images, 0.2))
    shares = present[is_val].sum(axis=0) / present.sum(axis=0)
    counts = present.sum(axis=0)
    assert counts[5] < 12  # so rare that a random split would often miss it
    assert (np.abs(shares[:4] - 0.2) < 0.01).all() and (np.abs(shares[4:] - 0.2) < 0.12).all()
    assert abs(is_val.mean() - 0.2) < 0.01


def test_the_only_image_of_a_class_is_trained_on() -> None:
    images = [(number, {0}) for number in range(9)] + [(9, {0, 1})]
    for seed in range(20):
        is_val = choose(images, 0.5, seed)
        assert not is_val[9] and sum(is_val) == 5


def test_duplicates_name_the_first_of_their_content() -> None:
    places, firsts = find_duplicates(hashes_of([3, 1, 3, 2, 1, 3]))
    assert places.tolist() == [2, 4, 5] and firsts.tolist() == [0, 1, 0]
    places, firsts = find_duplicates(hashes_of([]))
    assert not len(places) and not len(firsts)
