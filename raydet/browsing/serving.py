"""An application on a port of loopback, in a thread."""

import contextlib
import errno
import socket
import threading
from collections.abc import Iterator

import uvicorn

from raydet.browsing.guard import Guard
from raydet.common.errors import RunError, UserError

_ADDRESS = "127.0.0.1"
_MOST_CONNECTIONS = 64
_STOPS_WITHIN_S = 3.0


@contextlib.contextmanager
def serving(application: Guard, port: int = 0) -> Iterator[str]:
    """Context manager: serve an application, on a free port if `port` is 0; yield the address of the page.

    Raises:
        UserError: The port is taken, or needs rights that the process does not have.
        RunError: The server does not start.
    """
    with _bound(port) as listener:
        server = uvicorn.Server(
            uvicorn.Config(
                application,
                http="h11",
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=_MOST_CONNECTIONS,
                timeout_graceful_shutdown=1,
            )
        )
        thread = threading.Thread(target=server.run, args=([listener],), name="browse", daemon=True)
        thread.start()
        try:
            while not server.started:
                thread.join(0.02)
                if not thread.is_alive():
                    raise RunError("the server of the page did not start")
            yield f"http://{_ADDRESS}:{listener.getsockname()[1]}/{application.token}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join(_STOPS_WITHIN_S)


@contextlib.contextmanager
def _bound(port: int) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((_ADDRESS, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(f"port {port} of {_ADDRESS} is in use; choose another --port, or 0") from None
            raise UserError(f"port {port} of {_ADDRESS} cannot be used: {error.strerror}") from None
        yield listener
