"""Connections to web servers that end at a deadline, and that can be kept out of private networks."""

import contextlib
import http.client
import ipaddress
import os
import socket
import ssl
import threading
import time
from concurrent.futures import Future
from functools import lru_cache
from typing import Any, Self

_MAX_ADDRESSES = 4
"""Addresses of a host that are tried."""


class PrivateAddressError(OSError):
    """The host is on this machine or in one of its networks."""


class UnknownHostError(OSError):
    """The host has no address."""


class ConnectError(OSError):
    """No address of the host accepts connections."""


def look_up(host: str, port: int | None, timeout_s: float) -> list[tuple[Any, ...]]:
    """Look up the addresses of a host, as `socket.getaddrinfo` returns them.

    The system's resolver has no time limit of its own, so it runs in a thread, which is left behind if it takes longer.

    Raises:
        UnknownHostError: The host has no address, or none was found in time.
    """
    found: Future[list[tuple[Any, ...]]] = Future()

    def resolve() -> None:
        try:
            found.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.set_exception(error)

    threading.Thread(target=resolve, name="look-up", daemon=True).start()
    try:
        return found.result(max(0.001, timeout_s))
    except TimeoutError:
        raise UnknownHostError("the address of the server was not found in time") from None
    except (OSError, UnicodeError):
        raise UnknownHostError("unknown host") from None


class WebDeadline:
    """Context manager: a time limit that cuts the connection in use, whatever waits for it.

    Attributes:
        num_bytes: Bytes received, counted by the reader.
    """

    def __init__(self, seconds: float) -> None:
        self.num_bytes = 0
        self._ends_at = time.monotonic() + seconds
        self._lock, self._is_over = threading.Lock(), False
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._watch(None)

    @property
    def is_over(self) -> bool:
        """True once the time is over."""
        return self._is_over or self.left_s <= 0

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return self._ends_at - time.monotonic()

    def watch(self, connected: socket.socket) -> None:
        """Cut this connection at the end, instead of the previous one."""
        # Another descriptor of the connection, which closing or wrapping the socket elsewhere does not affect.
        self._watch(socket.socket(fileno=os.dup(connected.fileno())))

    def _watch(self, watched: socket.socket | None) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = watched
            if self._is_over:
                self._cut()

    def _end(self) -> None:
        with self._lock:
            self._is_over = True
            self._cut()

    def _cut(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


class HttpConnection(http.client.HTTPConnection):
    """A connection that is opened within the limits of its request.

    Attributes:
        proxy_headers: Headers for the proxy, if the connection leads to one that passes on plain requests.
        is_proxied: True if the connection leads to a proxy, which the user chose; set before connecting.
    """

    def __init__(self, host: str, port: int, *args: Any, **options: Any) -> None:
        super().__init__(host, port, *args, **options)
        self.proxy_headers: dict[str, str] = {}
        self.is_proxied = False
        self._create_connection = self._dial

    def prepare(
        self, deadline: WebDeadline, connect_timeout_s: float, silence_timeout_s: float, *, must_be_public: bool
    ) -> None:
        """Set the limits of the next request."""
        self._deadline, self._must_be_public = deadline, must_be_public
        self._connect_timeout_s, self._silence_timeout_s = connect_timeout_s, silence_timeout_s
        if self.sock is not None:
            self.sock.settimeout(silence_timeout_s)
            deadline.watch(self.sock)

    def _dial(self, address: tuple[str, int], *_: object) -> socket.socket:
        found = look_up(*address, self._time_to_connect_s())
        if self._must_be_public and not self.is_proxied and any(not is_public(item[4][0]) for item in found):
            raise PrivateAddressError
        for family, kind, protocol, _name, place in found[:_MAX_ADDRESSES]:
            dialling = socket.socket(family, kind, protocol)
            try:
                dialling.settimeout(self._time_to_connect_s())
                dialling.connect(place)
            except OSError:
                dialling.close()
                continue
            dialling.settimeout(self._silence_timeout_s)
            self._deadline.watch(dialling)
            return dialling
        raise ConnectError

    def _time_to_connect_s(self) -> float:
        return max(0.001, min(self._connect_timeout_s, self._deadline.left_s))


class HttpsConnection(http.client.HTTPSConnection, HttpConnection):
    """The same, encrypted."""

    def __init__(self, host: str, port: int) -> None:
        # `http.client` passes what it does not need on to the class above.
        super().__init__(host, port, context=_tls())


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def is_private_host(host: str, timeout_s: float) -> bool:
    """Return True if an address of a host is on this machine or in its networks; False if none is known here."""
    try:
        return any(not is_public(item[4][0]) for item in look_up(host, None, timeout_s))
    except UnknownHostError:
        return False


def is_public(address: str | int) -> bool:
    """Return True for an address of the internet: not loopback, private, link-local, reserved or multicast.

    IPv6 addresses that carry one of IPv4 (mapped, 6to4, Teredo, NAT64) are as public as that.
    """
    own = ipaddress.ip_address(str(address).partition("%")[0])
    carried: list[ipaddress.IPv4Address] = []
    if isinstance(own, ipaddress.IPv6Address):
        carried = [item for item in (own.ipv4_mapped, own.sixtofour, *(own.teredo or ())) if item is not None]
        if own in _NAT64:
            carried.append(ipaddress.IPv4Address(own.packed[-4:]))
        if own.ipv4_mapped is not None:
            return is_public(str(own.ipv4_mapped))
        if own.is_site_local:
            return False
    is_own = own.is_global and not own.is_multicast and not own.is_reserved
    return (is_own or own in _NAT64) and all(is_public(str(item)) for item in carried)


_NAT64 = ipaddress.ip_network("64:ff9b::/96")
