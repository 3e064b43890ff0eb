"""A stand-in for Google Cloud Storage on loopback, for tests that read and write through `storage`."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import ThreadingHTTPServer

BUCKET = "gs://anonymous@runs"
"""Without the name of nobody in it, pyarrow's client first asks Google who it is."""


@contextmanager
def started() -> Iterator[str]:
    """The server, with an empty bucket; gives the URL that CLOUD_STORAGE_EMULATOR_ENDPOINT has to name."""
    # A process of its own: pyarrow keeps Python's lock while it waits for the answer to some requests.
    with subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            assert port, "the server has not started"
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def _serve() -> None:
    from gcp_storage_emulator.handlers.buckets import create_bucket
    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    files = Storage(use_memory_fs=True)
    create_bucket(BUCKET.partition("@")[2], files)
    # The emulator's own server answers one connection at a time, and pyarrow keeps several open.
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RequestHandler, files))
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _serve()
