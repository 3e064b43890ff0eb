"""Pictures read by windows → one image per tile, in the order of the pictures."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from raydet.config import PredictConfig
from raydet.engines.views import TileView, num_tiles, tiles_of
from raydet.images.collection import Collection, ImageRow, WindowedCollection
from raydet.images.pixels import ppm_header
from raydet.images.references import FileReader, Reference
from raydet.images.windows.directory import WindowError
from raydet.images.windows.index import ListedPicture, open_picture
from raydet.images.windows.picture import OpenTiff


@dataclass(frozen=True)
class WindowRows(Collection):
    """Collection of the tiles of pictures, each an image; its ids are positions.

    Attributes:
        pictures: The pictures.
        config: Options of the run, which decide about the tiles.
        first_rows: Position of the first tile of each picture, and the number of all tiles, int64 [P + 1]. A picture
            that cannot be read has none.
    """

    pictures: WindowedCollection
    config: PredictConfig
    first_rows: npt.NDArray[np.int64] = field(compare=False, repr=False)

    @classmethod
    def of(cls, pictures: WindowedCollection, config: PredictConfig) -> "WindowRows":
        """Count the tiles of all pictures."""
        count = lru_cache(maxsize=1024)(lambda size_hw: 0 if size_hw is None else num_tiles(size_hw, config))
        counts = [count(picture.size_hw) for picture in pictures.pictures(0, pictures.num_rows)]
        first_rows = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        return cls("windowed", int(first_rows[-1]), pictures.fingerprint, pictures, config, first_rows)

    @property
    def id_space(self) -> None:
        """See `Collection.id_space`."""
        return None

    def rows_of(self, picture: int) -> range:
        """Return the positions of a picture's tiles."""
        return range(int(self.first_rows[picture]), int(self.first_rows[picture + 1]))

    def read(self, start: int, stop: int) -> Iterator[ImageRow]:
        """Read rows as `Collection.read` does, each an uncompressed image."""
        reader = self.pictures.reader()
        first = int(np.searchsorted(self.first_rows, start, side="right")) - 1
        last = int(np.searchsorted(self.first_rows, stop, side="left"))
        for number, picture in enumerate(self.pictures.pictures(first, last), start=first):
            rows = self.rows_of(number)
            if rows:
                wanted = range(max(rows.start, start), min(rows.stop, stop))
                yield from self._tiles(picture, rows.start, wanted, reader)

    def _tiles(self, picture: ListedPicture, first: int, wanted: range, reader: FileReader) -> Iterator[ImageRow]:
        assert picture.size_hw is not None, "a picture without a size has no tiles"
        tiles, reference = tiles_of(picture.size_hw, self.config), Reference(*picture[2:5])
        num_done = 0
        try:
            with open_picture(reference, reader, max_pixels=self.config.max_pixels) as opened:
                if opened.size_hw != picture.size_hw:
                    raise WindowError("the file has changed since it was listed")
                for position in wanted:
                    row = _row(picture, position, tiles[position - first], opened)
                    num_done += 1
                    yield row
        except WindowError as error:
            for position in wanted[num_done:]:
                yield _row(picture, position, tiles[position - first], str(error))


def _row(picture: ListedPicture, position: int, tile: TileView, source: OpenTiff | str) -> ImageRow:
    """Return a tile's row with its pixels from an open picture, or with a reason why there are none."""
    path = f"{picture.path} {place_of(tile)}"
    if isinstance(source, str):
        return ImageRow(position, path, None, source, None)
    try:
        pixels = source.window(tile.left, tile.top, tile.width, tile.height)
    except WindowError as error:
        return ImageRow(position, path, None, str(error), None)
    data = ppm_header(tile.size_hw) + (pixels[:, ::-1] if tile.is_mirrored else pixels).tobytes()
    return ImageRow(position, path, data, None, None)


def place_of(tile: TileView) -> str:
    """Return the place of a tile for messages."""
    return f"[{tile.left}, {tile.top}, {tile.width} × {tile.height}]"
