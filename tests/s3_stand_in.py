"""A local S3 server on loopback that can simulate failures, for tests that read and write through `storage`."""

import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import pytest

Failure = Literal["503", "403", "drop", "hang"]
BUCKET = "s3://runs"


class StandIn:
    """An S3 server on loopback that can simulate failures.

    Attributes:
        put_delay_s: Seconds that each upload of an object, or of a part of one, takes longer.
    """

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self._app = DomainDispatcherApplication(create_backend_app)
        self._failure: Failure = "503"
        self._until, self._only = 0.0, ""
        self.put_delay_s = 0.0
        self.num_refused = 0
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def fail(self, failure: Failure, seconds: float, *, only: str = "") -> None:
        """Fail each request whose query contains `only`, for the given number of seconds from now."""
        self._failure, self._until, self._only, self.num_refused = failure, time.monotonic() + seconds, only, 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if self.put_delay_s and environ["REQUEST_METHOD"] == "PUT":
            time.sleep(self.put_delay_s)
        if time.monotonic() >= self._until or self._only not in environ["QUERY_STRING"]:
            return cast(Iterable[bytes], self._app(environ, start_response))
        self.num_refused += 1
        if self._failure == "drop":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        if self._failure == "hang":
            time.sleep(max(0.0, self._until - time.monotonic()))
        code = "AccessDenied" if self._failure == "403" else "SlowDown"
        start_response(f"{'403' if self._failure == '403' else '503'} {code}", [("Connection", "close")])
        return [f"<Error><Code>{code}</Code><Message>simulated</Message></Error>".encode()]

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which a process uses this server as S3."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server.port}",
            "AWS_ACCESS_KEY_ID": "stand-in",
            "AWS_SECRET_ACCESS_KEY": "stand-in",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def use(self, patch: pytest.MonkeyPatch) -> None:
        """Make this process use the server as S3 until the patch is undone."""
        for name, value in self.environment.items():
            patch.setenv(name, value)


@contextmanager
def started() -> Iterator[StandIn]:
    """Context manager: run a server with an empty bucket while the block runs."""
    stand_in = StandIn()
    # All servers of a process share their content.
    for method, path in (("POST", "moto-api/reset"), ("PUT", "runs")):
        urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{stand_in.server.port}/{path}", method=method)
        ).close()
    try:
        yield stand_in
    finally:
        stand_in.server.shutdown()
