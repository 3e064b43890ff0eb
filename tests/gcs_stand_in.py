"""A local Google Cloud Storage emulator on loopback, for tests that read and write through `storage`."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import ThreadingHTTPServer

BUCKET = "gs://anonymous@runs"
"""Without `anonymous`, pyarrow's client first asks Google for credentials."""


@contextmanager
def started() -> Iterator[str]:
    """Context manager: run a server with an empty bucket; yield the URL for CLOUD_STORAGE_EMULATOR_ENDPOINT."""
    # A separate process, because pyarrow holds the GIL while it waits for some responses.
    with subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            assert port, "the server did not start"
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def _serve() -> None:
    from gcp_storage_emulator.handlers.buckets import create_bucket
    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    files = Storage(use_memory_fs=True)
    create_bucket(BUCKET.partition("@")[2], files)
    # The emulator's own server handles one connection at a time, but pyarrow keeps several open.
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RequestHandler, files))
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _serve()
