"""The Hugging Face Hub client: without its messages, and without requests on behalf of local files."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from raydet.common.errors import RunError
from raydet.common.probing import failure_of, has_proxy


def require_hub() -> None:
    """Check that the Hub answers, with whatever status; its client would retry for up to a minute.

    Raises:
        RunError: The Hub cannot be reached within ten seconds.
    """
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or has_proxy():
        return  # the client reports it; a proxy may reach what this machine cannot
    reason = failure_of(endpoint.scheme == "https", endpoint.netloc)
    if reason is not None:
        raise RunError(
            f"cannot reach the Hugging Face Hub at {endpoint.hostname} ({reason}); check the connection, or set "
            "HF_HUB_OFFLINE=1 to use what is in its cache"
        )


@contextlib.contextmanager
def quiet_client() -> Iterator[None]:
    """Context manager: suppress warnings, and the Hub client's log and progress bars, while the block runs."""
    logger = logging.getLogger("huggingface_hub")
    level, had_bars = logger.level, not are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
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
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or Path(name).exists()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
