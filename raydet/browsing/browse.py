"""The command: open what the config names, serve the page, and wait for Ctrl-C."""

import signal
import time
from dataclasses import dataclass

from raydet.common.console import Console, counted
from raydet.common.notebook.showing import Shown
from raydet.common.packages import require_packages
from raydet.common.signals import noting_stop_requests
from raydet.config import BrowseConfig
from raydet.config.fields import with_options

_LOOK_EVERY_S = 0.1


@dataclass(frozen=True)
class BrowseEnd(Shown):
    """Result of `browse`.

    Attributes:
        num_images: Number of images that were shown.
    """

    num_images: int

    def lines(self) -> list[str]:
        """Return what happened, for the terminal."""
        return ["browse ended"]


@with_options(BrowseConfig)
def browse(config: BrowseConfig, *, console: Console | None = None) -> BrowseEnd:
    """Serve a page about images, detections or evaluated runs on loopback until Ctrl-C, and print its address.

    The boxes are held in memory, up to 300 bytes each; pictures are read when they are shown.

    Args:
        config: What to show, and where.
        console: Where the address is printed; by default on the terminal.

    Raises:
        UserError: A table is missing, damaged or of another kind, options do not fit what was found, the port is
            taken, or the packages of the extra `browse` are missing.
        RunStopped: SIGTERM arrived.
    """
    require_packages("browse")
    # Imported here because the packages of the extra may be missing.
    from raydet.browsing.app import application
    from raydet.browsing.index import build_index
    from raydet.browsing.queries import Queries
    from raydet.browsing.serving import serving
    from raydet.browsing.sources import open_sources

    console = console or Console()
    with console.progress("reading the tables"):
        sources = open_sources(config)
        index = build_index(sources)
    for note in sources.notes:
        console.line(note)
    with (
        noting_stop_requests() as request,
        serving(application(sources, Queries(index), selection=config.selection), config.port) as address,
    ):
        shown = f"{counted(index.num_images, 'image')} with {counted(index.num_boxes, 'box', 'boxes')}"
        console.line(f"{shown}; open {address} in a browser of this machine; Ctrl-C ends")
        while not request:
            time.sleep(_LOOK_EVERY_S)
    if request.signal_number == signal.SIGTERM:
        raise request.to_error("browse stopped")
    return BrowseEnd(index.num_images)
