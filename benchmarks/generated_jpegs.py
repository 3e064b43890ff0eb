"""Generated JPEGs that take as long to decode as photographs of their size."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

SIZE = (640, 480)
"""Width and height in pixels, by default."""


def jpegs(num_images: int, size: tuple[int, int] = SIZE) -> list[bytes]:
    """Encode smooth, grainy images, of about 84 KB each by default; image i is the same in every call."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda number: _jpeg(number, size), range(num_images)))


def _jpeg(number: int, size: tuple[int, int]) -> bytes:
    rng = np.random.default_rng(number)
    soft = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.integers(-12, 13, (size[1], size[0], 1), dtype=np.int16)
    pixels = np.clip(np.asarray(soft, np.int16) + grain, 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=85)
    return stream.getvalue()
