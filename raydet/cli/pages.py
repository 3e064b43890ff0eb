"""`--open`: the page that a command wrote, in the browser."""

import sys
import webbrowser
from pathlib import Path

from raydet.tables import storage


def open_page(uri: str) -> None:
    """Open a page in the browser of this machine; where that is impossible, say so on stderr."""
    if "://" in uri and not uri.startswith("file://"):
        print(f"raydet: --open: {uri} is not on this machine; copy it here to open it", file=sys.stderr)
        return
    path = Path(storage.resolve(uri)[1])
    if not webbrowser.open(path.as_uri()):
        print(f"raydet: --open: there is no browser on this machine; the page is {path}", file=sys.stderr)
