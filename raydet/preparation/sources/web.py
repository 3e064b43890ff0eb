"""A URL → the bytes of the file, with retries for busy servers and limits for hostile ones.

A list of URLs can name any host that this machine reaches, including those of its own network. Do not prepare a
stranger's list on a machine whose internal hosts must not be contacted. At most five redirects are followed, to http
and https only.
"""

import random
import threading
import time
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import urllib3

from raydet.common.errors import UserError
from raydet.images.files import MAX_FILE_BYTES, MissingFileError, ReadError, refuse_size

_ATTEMPTS = 5
_BUSY = (408, 429, 500, 502, 503, 504)
_MAX_REDIRECTS = 5
_CHUNK_BYTES = 2**20
_HOSTS_AT_ONCE = 64


class _TransientError(Exception):
    """Failure that a retry may fix; the message is reported if all attempts fail."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True, kw_only=True)
class WebReader:
    """Reader for files on web servers; thread-safe and cheap to pickle.

    If a server is busy (429, 503 and the like), drops the connection or sends less than announced, the reader retries
    after 0.5, 1, 2 and 4 seconds, or at the time that the server requests. It uses the proxies of the environment
    (`https_proxy`, `no_proxy`).

    Attributes:
        connect_timeout_s: Time limit for establishing the connection.
        silence_timeout_s: Time limit between received bytes.
        total_timeout_s: Time limit per attempt, for servers that send a byte per second.
        first_wait_s: Wait before the second attempt; each further wait is twice as long, ± 25 %.
        longest_wait_s: Limit for every wait, including those that the server requests.
        max_bytes: Larger files are refused, by their announced or received size.
    """

    connect_timeout_s: float = 10.0
    silence_timeout_s: float = 30.0
    total_timeout_s: float = 300.0
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0
    max_bytes: int = MAX_FILE_BYTES

    def read(self, url: str) -> bytes:
        """Read one file.

        Raises:
            MissingFileError: The server reports that there is no such file (404, 410).
            ReadError: The file cannot be read, for the reason in the message. A server that is down fails its own
                files only.
        """
        wait_s = self.first_wait_s
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._read_once(url)
            except _TransientError as error:
                if attempt == _ATTEMPTS:
                    raise ReadError(f"{error}, after {_ATTEMPTS} attempts") from None
                pause_s = wait_s * random.uniform(0.75, 1.25) if error.wait_s is None else error.wait_s
                time.sleep(min(pause_s, self.longest_wait_s))
                wait_s *= 2
        raise AssertionError("the last attempt returns or raises")

    def _read_once(self, url: str) -> bytes:
        deadline = time.monotonic() + self.total_timeout_s
        timeout = urllib3.Timeout(connect=self.connect_timeout_s, read=self.silence_timeout_s)
        # urllib3 only handles redirects here: it does not retry when a body breaks off.
        retries = urllib3.Retry(total=None, connect=0, read=0, other=0, status=0, redirect=_MAX_REDIRECTS)
        response: urllib3.BaseHTTPResponse | None = None
        try:
            response = _pool_for(url).request(
                "GET", url, headers=_HEADERS, timeout=timeout, retries=retries, preload_content=False
            )
            self._check_answer(response)
            return self._body(response, deadline)
        except urllib3.exceptions.MaxRetryError as error:
            raise _reason(error.reason or error) from None
        except (urllib3.exceptions.HTTPError, ValueError, OSError) as error:
            raise _reason(error) from None
        finally:
            if response is not None:
                # Needed if the body was not read to its end; otherwise the connection is back in the pool already.
                response.close()

    def _check_answer(self, response: urllib3.BaseHTTPResponse) -> None:
        status = response.status
        if status == 200:
            stated = response.headers.get("Content-Length", "")
            if stated.isdecimal():
                refuse_size(int(stated), self.max_bytes)
            return
        if status in (404, 410):
            raise MissingFileError(f"no such file: the server answered {status}")
        if status in _BUSY:
            after = response.headers.get("Retry-After", "")
            raise _TransientError(f"the server answered {status}", float(after) if after.isdecimal() else None)
        raise ReadError(f"the server answered {status}")

    def _body(self, response: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
        chunks: list[bytes] = []
        num_bytes = 0
        while chunk := response.read1(_CHUNK_BYTES, decode_content=False):
            num_bytes += len(chunk)
            refuse_size(num_bytes, self.max_bytes)
            chunks.append(chunk)
            if time.monotonic() > deadline:
                raise _TransientError(f"the server is too slow: {num_bytes:,} bytes in {self.total_timeout_s:g} s")
        return b"".join(chunks)


_HEADERS = {"User-Agent": "raydet", "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}
_pools: dict[str | None, urllib3.PoolManager] = {}
_pools_lock = threading.Lock()


def _pool_for(url: str) -> urllib3.PoolManager:
    """Return the connection pool of this process for a URL, by its proxy."""
    parts = urlsplit(url)
    proxy: str | None = None
    if parts.hostname and not urllib.request.proxy_bypass(parts.hostname):
        proxy = urllib.request.getproxies().get(parts.scheme.lower())
    with _pools_lock:
        if proxy not in _pools:
            options: dict[str, Any] = {"num_pools": _HOSTS_AT_ONCE, "maxsize": 32, "block": False}
            _pools[proxy] = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
        return _pools[proxy]


def _reason(error: BaseException) -> Exception:
    """Convert an error of urllib3 or the network to one short line."""
    names = urllib3.exceptions
    if isinstance(error, names.ResponseError) and "redirect" in str(error):
        return ReadError(f"more than {_MAX_REDIRECTS} redirects")
    if isinstance(error, ValueError):  # all errors of urllib3 about URLs are ValueErrors too
        return ReadError("the URL, or one that the server redirects to, is not an http or https URL")
    if isinstance(error, names.SSLError):
        return ReadError("the server's certificate or encryption cannot be trusted")
    if isinstance(error, names.NameResolutionError):
        return _TransientError("unknown host")
    if isinstance(error, names.NewConnectionError):
        return _TransientError("cannot connect to the server")
    if isinstance(error, names.TimeoutError | TimeoutError):
        return _TransientError("the server did not answer in time")
    if isinstance(error, names.ProtocolError | names.IncompleteRead | OSError):
        return _TransientError("the connection was dropped")
    return ReadError(f"cannot be read: {type(error).__name__}")


def read_web_list(url: str) -> bytes:
    """Read a list file from the web.

    Raises:
        UserError: The list cannot be read.
    """
    try:
        return WebReader().read(url)
    except ReadError as error:
        raise UserError(f"cannot read {url}: {error}") from None
