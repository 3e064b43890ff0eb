"""The Hugging Face Hub client without its messages."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars


@contextlib.contextmanager
def quiet_client(*, hides_bars: bool = True) -> Iterator[None]:
    """Context manager: suppress warnings, and the Hub client's log and progress bars, while the block runs."""
    logger = logging.getLogger("huggingface_hub")
    level, had_bars = logger.level, not are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    if hides_bars:
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if had_bars:
            enable_progress_bars()
