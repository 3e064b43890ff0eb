"""Label Studio's addresses of images → files below a folder."""

import re
from urllib.parse import unquote

from raydet.images.files import ImageFolder, list_below

_LOCAL_FILES = "/data/local-files/"
"""Address of files that Label Studio serves from its own disk; their path is the parameter `d`."""
_HASH_PREFIX = re.compile(r"[0-9a-f]{8}-(?=.)")
"""Label Studio puts this before the name of an uploaded file."""
_MOST_PARTS = 64


class FolderFiles:
    """The files of a folder, found by the address that Label Studio has for them."""

    def __init__(self, folder: ImageFolder) -> None:
        """List the folder.

        Raises:
            UserError: A subfolder cannot be listed.
        """
        self.refuse_outside = folder.refuse_outside
        self._paths = set(list_below(folder))

    def __call__(self, address: str) -> str | None:
        """Return the file whose path matches the longest end of an address, or None."""
        for path in dict.fromkeys((address_path(address), unquote(address_path(address)))):
            parts = [part for part in path.split("/") if part][-_MOST_PARTS:]
            original = _HASH_PREFIX.sub("", parts[-1], count=1) if parts else ""
            for tail in (*("/".join(parts[start:]) for start in range(len(parts))), original):
                if tail in self._paths:
                    return tail
        return None


def address_path(address: str) -> str:
    """Return the path in an address of Label Studio: a local file, an upload, an object of a store, or a URL."""
    if _LOCAL_FILES in address and "?d=" in address:
        return address.partition("?d=")[2]
    scheme, separator, rest = address.partition("://")
    return (rest.partition("?")[0] if scheme in ("http", "https") else rest) if separator else address
