"""A URL → the bytes of the file, with retries for busy servers and limits for hostile ones.

A list of URLs can name any host that this machine reaches, including those of its own network. Do not prepare a
stranger's list on a machine whose internal hosts must not be contacted. At most five redirects are followed, to http
and https only, and to hosts of this machine and its networks only if the list itself names them.
"""

import base64
import contextlib
import http.client
import random
import ssl
import threading
import time
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import quote, unquote, urljoin, urlsplit

from raydet.images.files import MAX_FILE_BYTES, MissingFileError, ReadError, refuse_size
from raydet.images.http_bodies import PackingError, body_of
from raydet.images.http_connections import (
    ConnectError,
    HttpConnection,
    HttpsConnection,
    PrivateAddressError,
    UnknownHostError,
    WebDeadline,
    is_private_host,
)

_ATTEMPTS = 5
_BUSY = (408, 429, 500, 502, 503, 504)
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 5
_MOST_UNREAD_BYTES = 64 * 2**10
_CONNECTIONS_PER_THREAD = 8
_SAFE = "%/?:=&~+!$,;'@()*[]"
_PORTS = {"http": 80, "https": 443}
_HEADERS = {"User-Agent": "raydet", "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}


class _TransientError(Exception):
    """Failure that a retry may fix; the message is reported if all attempts fail."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _Address(NamedTuple):
    """The parts of a URL that a request needs; `target` is the path with the query, escaped."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def origin(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, kw_only=True)
class WebReader:
    """Reader for files on web servers; thread-safe and cheap to pickle.

    If a server is busy (429, 503 and the like), drops the connection or sends less than announced, the reader retries
    after 0.5, 1, 2 and 4 seconds, or at the time that the server requests. It uses the proxies of the environment
    (`https_proxy`, `no_proxy`).

    Attributes:
        connect_timeout_s: Time limit for establishing the connection.
        silence_timeout_s: Time limit between received bytes.
        total_timeout_s: Time limit for a file, with all look-ups, redirects, retries and waits; the connection is cut
            then.
        first_wait_s: Wait before the second attempt; each further wait is twice as long, ± 25 %.
        longest_wait_s: Limit for every wait, including those that the server requests.
        max_bytes: Larger files are refused, by their announced, received or unpacked size.
        named: Hosts with their ports (`host:port`) that the user's list names; redirects may lead to them although
            they are on this machine or in its networks.
    """

    connect_timeout_s: float = 10.0
    silence_timeout_s: float = 30.0
    total_timeout_s: float = 120.0
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0
    max_bytes: int = MAX_FILE_BYTES
    named: frozenset[str] = frozenset()

    def read(self, url: str) -> bytes:
        """Read one file.

        Raises:
            MissingFileError: The server reports that there is no such file (404, 410).
            ReadError: The file cannot be read, for the reason in the message. A server that is down fails its own
                files only.
        """
        wait_s = self.first_wait_s
        with WebDeadline(self.total_timeout_s) as deadline:
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    return self._read_once(url, deadline)
                except _TransientError as error:
                    pause_s = wait_s * random.uniform(0.75, 1.25) if error.wait_s is None else error.wait_s
                    pause_s = min(pause_s, self.longest_wait_s)
                    if deadline.is_over:
                        received = f"{deadline.num_bytes:,} bytes in {self.total_timeout_s:g} s"
                        raise ReadError(f"the server is too slow: {received}") from None
                    if attempt == _ATTEMPTS or pause_s > deadline.left_s:
                        raise ReadError(f"{error}, after {attempt} attempts") from None
                    time.sleep(pause_s)
                    wait_s *= 2
        raise AssertionError("the last attempt returns or raises")

    def _read_once(self, url: str, deadline: WebDeadline) -> bytes:
        try:
            address = start = address_of(url)
            for _ in range(_MAX_REDIRECTS + 1):
                is_free = address is start or self._is_named(address, start)
                with self._answer(address, deadline, must_be_public=not is_free) as response:
                    location = response.getheader("Location")
                    if response.status not in _REDIRECTS or not location:
                        self._check_answer(response)
                        content = self._content(response, deadline)
                        if deadline.is_over:  # headers that were cut off look like whole ones
                            raise http.client.IncompleteRead(b"")
                        return content
                    url = urljoin(url, location.encode("latin-1").decode(errors="replace"))
                    address = address_of(url)
        except tuple(kind for kind, _, _ in _REASONS) as error:
            raise next(made(text or str(error)) for kind, made, text in _REASONS if isinstance(error, kind)) from None
        raise ReadError(f"more than {_MAX_REDIRECTS} redirects")

    def _is_named(self, address: _Address, start: _Address) -> bool:
        """Return True if a redirect leads to a host that the list names, or from http to https of the same host."""
        is_same_port = address.port == start.port or {address.port, start.port} == set(_PORTS.values())
        return (address.host == start.host and is_same_port) or address.origin in self.named

    @contextlib.contextmanager
    def _answer(
        self, address: _Address, deadline: WebDeadline, *, must_be_public: bool
    ) -> Iterator[http.client.HTTPResponse]:
        """Context manager: request a URL and yield the answer, whose body is not read yet."""
        connection, target, key = self._connection(address, deadline, must_be_public)
        is_reused = connection.sock is not None
        try:
            response = self._request(connection, target, deadline, must_be_public)
        except (ConnectionError, http.client.RemoteDisconnected, TimeoutError):
            connection.close()
            if not is_reused or deadline.is_over:
                raise
            response = self._request(connection, target, deadline, must_be_public)  # it was closed while unused
        except BaseException:
            connection.close()
            raise
        is_whole = False
        try:
            yield response
            if response.fp is not None and not response.chunked and (response.length or 0) <= _MOST_UNREAD_BYTES:
                response.read(_MOST_UNREAD_BYTES)
            is_whole = response.isclosed() and not response.will_close
        finally:
            response.close()
            if is_whole:
                _keep(key, connection)
            else:
                connection.close()

    def _request(
        self, connection: HttpConnection, target: str, deadline: WebDeadline, must_be_public: bool
    ) -> http.client.HTTPResponse:
        connection.prepare(deadline, self.connect_timeout_s, self.silence_timeout_s, must_be_public=must_be_public)
        connection.request("GET", target, headers={**_HEADERS, **connection.proxy_headers})
        return connection.getresponse()

    def _connection(
        self, address: _Address, deadline: WebDeadline, must_be_public: bool
    ) -> tuple[HttpConnection, str, "_Key"]:
        """Return a connection of this thread, the target of the request, and the key of the connection."""
        proxy = _proxy_for(address)
        key = (address.scheme, address.host, address.port, proxy, must_be_public)
        target = address.target
        if proxy is not None:
            if must_be_public and is_private_host(address.host, min(self.connect_timeout_s, deadline.left_s)):
                raise PrivateAddressError
            if address.scheme == "http":
                target = f"http://{_bracketed(address.host)}:{address.port}{address.target}"
        connection = _kept().pop(key, None)
        if connection is not None:
            return connection, target, key
        kind = HttpsConnection if address.scheme == "https" else HttpConnection
        if proxy is None:
            return kind(address.host, address.port), target, key
        parts = urlsplit(proxy)
        connection = kind(parts.hostname or "", parts.port or 80)
        connection.is_proxied = True
        login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}".encode()
        headers = {"Proxy-Authorization": f"Basic {base64.b64encode(login).decode()}"} if parts.username else {}
        if address.scheme == "https":
            connection.set_tunnel(address.host, address.port, headers=headers)
        connection.proxy_headers = headers if address.scheme == "http" else {}
        return connection, target, key

    def _check_answer(self, response: http.client.HTTPResponse) -> None:
        status = response.status
        if status == 200:
            refuse_size(response.length or 0, self.max_bytes)
            return
        if status in (404, 410):
            raise MissingFileError(f"no such file: the server answered {status}")
        if status in _BUSY:
            after = response.getheader("Retry-After") or ""
            is_time = after.isdecimal() and len(after) < 10
            raise _TransientError(f"the server answered {status}", float(after) if is_time else None)
        raise ReadError(f"the server answered {status}")

    def _content(self, response: http.client.HTTPResponse, deadline: WebDeadline) -> bytes:
        """Read the body, unpacked if the server packs it although raydet asks for plain content."""
        parts: list[bytes] = []
        num_bytes = 0
        for part in body_of(response, self.max_bytes):
            num_bytes += len(part)
            deadline.num_bytes = num_bytes
            refuse_size(num_bytes, self.max_bytes)
            parts.append(part)
        return b"".join(parts)


_Key = tuple[str, str, int, str | None, bool]
_local = threading.local()


def _kept() -> dict[_Key, HttpConnection]:
    """Return the idle connections of this thread."""
    connections: dict[_Key, HttpConnection] | None = getattr(_local, "connections", None)
    if connections is None:
        connections = _local.connections = {}
    return connections


def _keep(key: _Key, connection: HttpConnection) -> None:
    connections = _kept()
    connections[key] = connection
    if len(connections) > _CONNECTIONS_PER_THREAD:
        connections.pop(next(iter(connections))).close()


def address_of(url: str) -> _Address:
    """Split an http or https URL for a request.

    Raises:
        ValueError: It is another URL.
    """
    parts = urlsplit(url.strip())
    scheme, host = parts.scheme.lower(), parts.hostname or ""
    if scheme not in _PORTS or not host:
        raise ValueError(url)
    host = host if host.isascii() else host.encode("idna").decode()
    target = quote(parts.path or "/", safe=_SAFE) + (f"?{quote(parts.query, safe=_SAFE)}" if parts.query else "")
    port = _PORTS[scheme] if parts.port is None else parts.port
    return _Address(scheme, host, port, target)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _proxy_for(address: _Address) -> str | None:
    if urllib.request.proxy_bypass(address.host):
        return None
    proxy = urllib.request.getproxies().get(address.scheme)
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"


_PRIVATE = "the server redirects to an address of this machine or its networks, which the list lacks"
_NO_URL = "the URL, or one that the server redirects to, is not an http or https URL"
_DROPPED = "the connection was dropped"
_REASONS: tuple[tuple[type[BaseException], type[Exception], str], ...] = (
    (PrivateAddressError, ReadError, _PRIVATE),
    (PackingError, ReadError, "the server packs the file in a way that raydet did not ask for"),
    (UnknownHostError, _TransientError, ""),
    (ConnectError, _TransientError, "cannot connect to the server"),
    (ssl.SSLError, ReadError, "the server's certificate or encryption cannot be trusted"),
    (http.client.RemoteDisconnected, _TransientError, _DROPPED),
    (http.client.IncompleteRead, _TransientError, _DROPPED),
    (ValueError, ReadError, _NO_URL),
    (http.client.InvalidURL, ReadError, _NO_URL),
    (TimeoutError, _TransientError, "the server did not answer in time"),
    (http.client.HTTPException, _TransientError, "the server's answer is not valid HTTP"),
    (zlib.error, _TransientError, "the server's answer is not valid HTTP"),
    (OSError, _TransientError, _DROPPED),
)
"""The first matching class of an error decides whether a retry may help, and what is reported; "" reports the error."""
