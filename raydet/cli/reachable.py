"""A quick answer whether the stores that a command names can be reached at all.

The clients of object stores retry each request for about a minute, so that a run survives an outage. At the start of a
command that is too long: a mistyped endpoint or a missing network should be told at once.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

from raydet.common.errors import RunError
from raydet.common.probing import failure_of, has_proxy
from raydet.config import PrepareHubConfig, PushConfig


def check_reachable(config: Any) -> None:
    """Check that the object stores in the fields of a config, and the Hub if needed, answer, with whatever status.

    Raises:
        UserError: The URI of a store names no bucket.
        RunError: A store cannot be reached, or does not answer within ten seconds.
    """
    if isinstance(config, PushConfig) or _reads_hub(config):
        from raydet.common.hub_client import require_hub

        require_hub()
    uris = list(_uris_in(dataclasses.asdict(config)))
    if uris:
        from raydet.tables import storage  # imported late: `raydet --help` needs no file system
    for uri in uris:
        storage.refuse_no_place(uri)
    places = {place: uri for uri in uris if (place := _endpoint_of(uri)) is not None}
    for place, uri in places.items():
        reason = failure_of(*place)
        if reason is not None:
            host = place[1]
            raise RunError(
                f"the store of {uri} cannot be reached: {host}: {reason}; check the network and the address, and run "
                "the same command again"
            )


def _reads_hub(config: Any) -> bool:
    if not isinstance(config, PrepareHubConfig):
        return False
    from raydet.preparation.sources.hub import is_on_hub

    return is_on_hub(config.dataset)


def _uris_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if "://" in value:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _uris_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _uris_in(item)


def _endpoint_of(uri: str) -> tuple[bool, str] | None:
    """Return whether the endpoint of a URI uses TLS, and its host and port; None for other places."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return None
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    override = options.get("endpoint_override", "")
    if parts.scheme == "s3":
        override = override or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        host = f"s3.{region}.amazonaws.com{'.cn' if region.startswith('cn-') else ''}" if region else "s3.amazonaws.com"
    elif parts.scheme in ("gs", "gcs"):
        override = override or os.environ.get("CLOUD_STORAGE_EMULATOR_ENDPOINT") or ""
        host = "storage.googleapis.com"
    elif parts.scheme in ("abfs", "abfss") and "@" in parts.netloc:
        host = parts.netloc.rpartition("@")[2]
    else:
        return None
    scheme, separator, place = override.rpartition("://")
    if not override:
        # A proxy may reach what this machine cannot.
        return None if has_proxy() else (True, host)
    return (scheme if separator else options.get("scheme", "https")) == "https", place.rstrip("/")
