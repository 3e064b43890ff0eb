"""Paths and Label Studio's addresses of images → files below a folder."""

import re
from urllib.parse import unquote

from raydet.images.files import ImageFolder, list_below

_LOCAL_FILES = "/data/local-files/"
"""Address of files that Label Studio serves from its own disk; their path is the parameter `d`."""
_HASH_PREFIX = re.compile(r"[0-9a-f]{8}-(?=.)")
"""Label Studio puts this before the name of an uploaded file."""
_MOST_PARTS = 64


class FolderFiles:
    """The files of a folder, found by a path on another machine or by the address that Label Studio has for them."""

    def __init__(self, folder: ImageFolder) -> None:
        """List the folder.

        Raises:
            UserError: A subfolder cannot be listed.
        """
        self.refuse_outside = folder.refuse_outside
        self.paths = frozenset(list_below(folder))

    def by_end(self, path: str) -> str | None:
        """Return the file whose path is the longest end of a path, or None."""
        parts = [part for part in path.split("/") if part][-_MOST_PARTS:]
        tails = ("/".join(parts[start:]) for start in range(len(parts)))
        return next((tail for tail in tails if tail in self.paths), None)

    def __call__(self, address: str) -> str | None:
        """Return the file whose path matches the longest end of an address of Label Studio, or None."""
        for path in dict.fromkeys((address_path(address), unquote(address_path(address)))):
            found = self.by_end(path) or self.by_end(_HASH_PREFIX.sub("", path.rpartition("/")[2], count=1))
            if found is not None:
                return found
        return None


def address_path(address: str) -> str:
    """Return the path in an address of Label Studio: a local file, an upload, an object of a store, or a URL."""
    if _LOCAL_FILES in address and "?d=" in address:
        return address.partition("?d=")[2]
    scheme, separator, rest = address.partition("://")
    return (rest.partition("?")[0] if scheme in ("http", "https") else rest) if separator else address
