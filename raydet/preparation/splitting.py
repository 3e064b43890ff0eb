"""The choice of images for validation.

The algorithm is iterative stratification (Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-Label
Data", 2011) into two parts, over the classes present in an image. It repeatedly takes the class with the fewest
unassigned images and assigns these so that both parts come as close as possible to their share of the class. Where the
paper assigns at random, here a hash of the image's content decides, keyed with the seed. The result therefore depends
only on the set of images, their classes and the seed.

It differs from the paper in two points. The units are contents rather than files, so that identical images stay
together. And a class with at least two contents has one in each part, unless the assignment for rarer classes
prevents it; the only content of a class stays in training.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raydet.common.errors import UserError
from raydet.tables.columns import Flags, Integers

Hashes = npt.NDArray[np.uint64]
"""[N, 2]: the two halves of 16 bytes."""


@dataclass(frozen=True)
class UnitLabels:
    """Pairs of a unit and a class that is present in it, without repetition.

    Attributes:
        units: Numbers from 0, [M], ascending.
        classes: Category indices, [M].
    """

    units: Integers
    classes: Integers


def choose_validation(hashes: Hashes, labels: UnitLabels, *, num_classes: int, val_fraction: float, seed: int) -> Flags:
    """Choose images for validation, [N], from the hash of each image's content, [N, 2], and the classes present in it.

    `val_fraction` is the requested fraction of the contents, between 0 and 1.

    Raises:
        UserError: There are fewer than two different images.
    """
    unique, unit_of_image = np.unique(hashes, axis=0, return_inverse=True)
    unit_of_image = unit_of_image.reshape(-1)
    if len(unique) < 2:
        raise UserError(f"--val-fraction needs at least two different images, found {len(unique)}")
    pairs = np.unique(np.stack([unit_of_image[labels.units], labels.classes], axis=1).reshape(-1, 2), axis=0)
    order = np.argsort(_keys(unique, seed), kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    # From here on a unit is its rank by hash, so that the first units are those that the hash prefers.
    ranked = UnitLabels(rank[pairs[:, 0]], pairs[:, 1])
    is_val = _deal(ranked, len(unique), num_classes, val_fraction)
    return np.asarray(is_val[rank[unit_of_image]])


def _keys(unique: Hashes, seed: int) -> npt.NDArray[np.bytes_]:
    """Hash each content, keyed with the seed; units are taken in the order of these hashes."""
    key = seed.to_bytes(8 + seed.bit_length() // 8, "little")[:64]
    digests = [hashlib.blake2b(row.tobytes(), key=key, digest_size=15).hexdigest() for row in unique]
    return np.array(digests, dtype="S30")


class _Deal:
    """The assignment of units to the two parts; a lower index is taken first."""

    def __init__(self, labels: UnitLabels, num_units: int, num_classes: int) -> None:
        order = np.lexsort((labels.units, labels.classes))
        self._units = labels.units[order]
        self._class_starts = np.searchsorted(labels.classes[order], np.arange(num_classes + 1))
        order = np.lexsort((labels.classes, labels.units))
        self._classes = labels.classes[order]
        self._unit_starts = np.searchsorted(labels.units[order], np.arange(num_units + 1))
        self.totals = np.diff(self._class_starts)
        self.is_dealt = np.zeros(num_units, np.bool_)
        self.is_val = np.zeros(num_units, np.bool_)
        self.remaining, self.num_val = self.totals.copy(), np.zeros(num_classes, np.int64)

    def units_of(self, category: int) -> Integers:
        """Return the units of a class, [K]."""
        return self._units[self._class_starts[category] : self._class_starts[category + 1]]

    def classes_of(self, unit: int) -> Integers:
        """Return the classes of a unit, [K]."""
        return self._classes[self._unit_starts[unit] : self._unit_starts[unit + 1]]

    def put(self, units: Integers, *, is_val: bool) -> None:
        """Assign unassigned units to a part."""
        self.is_dealt[units] = True
        self.is_val[units] = is_val
        starts, lengths = self._unit_starts[units], np.diff(self._unit_starts)[units]
        places = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        counts = np.bincount(self._classes[places], minlength=len(self.totals))
        self.remaining -= counts
        self.num_val += counts if is_val else 0

    def move(self, unit: int) -> None:
        """Move an assigned unit to the other part."""
        self.is_val[unit] = not self.is_val[unit]
        self.num_val[self.classes_of(unit)] += 1 if self.is_val[unit] else -1


def _deal(labels: UnitLabels, num_units: int, num_classes: int, val_fraction: float) -> Flags:
    deal = _Deal(labels, num_units, num_classes)
    wanted = np.clip(np.rint(deal.totals * val_fraction), 1, deal.totals - 1)
    wanted[deal.totals < 2] = 0
    while (deal.remaining > 0).any():
        rarest = int(np.argmin(np.where(deal.remaining > 0, deal.remaining, num_units + 1)))
        units = deal.units_of(rarest)
        units = units[~deal.is_dealt[units]]
        num_taken = int(np.clip(wanted[rarest] - deal.num_val[rarest], 0, len(units)))
        deal.put(units[:num_taken], is_val=True)
        deal.put(units[num_taken:], is_val=False)
    _mend(deal)
    rest = np.flatnonzero(~deal.is_dealt)
    num_wanted = int(np.clip(np.rint(num_units * val_fraction), 1, num_units - 1))
    deal.put(rest[: max(0, num_wanted - int(deal.is_val.sum()))], is_val=True)
    if deal.is_val.all() or not deal.is_val.any():
        deal.move(0)
    return deal.is_val


def _mend(deal: _Deal) -> None:
    """Move a unit of each class that ended up in one part only; moves into training take precedence."""
    for category in np.argsort(deal.totals, kind="stable").tolist():
        if deal.totals[category] and deal.num_val[category] == deal.totals[category]:
            deal.move(int(deal.units_of(category)[0]))
    num_train = deal.totals - deal.num_val
    for category in np.flatnonzero((deal.num_val == 0) & (deal.totals > 1)).tolist():
        for unit in deal.units_of(category).tolist() if deal.num_val[category] == 0 else []:
            if (num_train[deal.classes_of(unit)] > 1).all():
                deal.move(unit)
                num_train = deal.totals - deal.num_val
                break
