"""The Hugging Face Hub client: without its messages, and without requests on behalf of local files."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants
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


@contextlib.contextmanager
def offline_if_local(name: str) -> Iterator[None]:
    """Context manager: if a model is a local folder, every request to the Hub in the block raises an error.

    The files of a model may name other models, adapters and kernels, which transformers would fetch, and run.

    Args:
        name: A folder, or a name on the Hub.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or Path(name).exists()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
