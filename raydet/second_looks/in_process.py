"""A crops run in this process: threads decode while the model runs."""

from collections.abc import Iterator, Sequence

from raydet.common.threads import available_cpus
from raydet.config import CropsConfig
from raydet.engines.loading import device_here
from raydet.second_looks.models.loading import load_looker
from raydet.second_looks.work import CropsWork
from raydet.second_looks.writing import WrittenChunk, write_chunk


class CropsHere:
    """This process as the place of a crops run."""

    def __init__(self, config: CropsConfig) -> None:
        """Load the model.

        Raises:
            UserError: It cannot be read, or `device_here` raises.
        """
        num_threads = config.threads_per_worker or available_cpus()
        device = device_here(use_gpu=config.use_gpu, precision=config.precision)
        self._looker = load_looker(config, device=device, num_threads=num_threads)

    def run(self, work: CropsWork, chunks: Sequence[int]) -> Iterator[WrittenChunk]:
        """Write the files of chunks, one after the other."""
        for chunk in chunks:
            yield write_chunk(work, self._looker, chunk, num_threads=available_cpus())
