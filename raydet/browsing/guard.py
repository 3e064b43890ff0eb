"""The door of the page's server: who may ask, from where, and how much.

Any page in the user's browser can send requests to loopback, and so can any process of the machine. A request passes if
its `Host` is loopback, so that no foreign name was made to point here; if it carries the token, in the address of the
first page or in the cookie that this sets; and, if it changes something, if it comes from the page itself.
"""

import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any

from raydet.common.errors import UserError

MAX_BODY_BYTES = 64 * 2**10
_HOSTS = ("127.0.0.1", "localhost")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_Application = Callable[[_Message, _Receive, _Send], Awaitable[None]]


class Guard:
    """ASGI middleware that answers what may not pass, and adds the headers of a page that loads nothing from elsewhere.

    The first page is at `/TOKEN`.

    Attributes:
        token: Random text that the address and the cookie carry.
    """

    def __init__(self, application: _Application) -> None:
        self._application = application
        self.token = secrets.token_urlsafe(32)

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        is_first = secrets.compare_digest(scope["path"].encode(), f"/{self.token}".encode())
        refusal = self._refusal(scope, headers, is_first=is_first)
        if refusal is not None:
            await _answer(send, *refusal)
            return
        is_started = False

        async def send_with_headers(message: _Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                own = dict(_HEADERS)
                if is_first:
                    name = _cookie_name(scope)
                    own["set-cookie"] = f"{name}={self.token}; Path=/; HttpOnly; SameSite=Strict"
                present = {name for name, _ in message["headers"]}
                more = [(name.encode(), value.encode()) for name, value in own.items() if name.encode() not in present]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        try:
            if is_first:
                scope = {**scope, "path": "/", "raw_path": b"/"}
            await self._application(scope, _bounded(receive), send_with_headers)
        except Exception:  # the application has told the page, in one line
            if not is_started:
                await _answer(send, 500, "the request failed")

    def _refusal(self, scope: _Message, headers: dict[str, str], *, is_first: bool) -> tuple[int, str] | None:
        """Return the status and reason of a request that may not pass."""
        host = headers.get("host", "")
        if host.rpartition(":")[0] not in _HOSTS and host not in _HOSTS:
            return 403, "the address must begin with http://127.0.0.1"
        if not is_first and not self._has_cookie(headers.get("cookie", ""), _cookie_name(scope)):
            return 403, "open the address that raydet browse printed"
        if scope["method"] not in ("GET", "HEAD"):
            if headers.get("origin", f"http://{host}") != f"http://{host}":
                return 403, "requests must come from the page itself"
            if not headers.get("content-type", "").startswith("application/json"):
                return 415, "requests must be JSON"
            length = headers.get("content-length", "0")
            if not length.isdigit() or int(length) > MAX_BODY_BYTES:
                return 413, f"requests may have {MAX_BODY_BYTES} bytes"
        return None

    def _has_cookie(self, text: str, name: str) -> bool:
        try:
            cookie = SimpleCookie(text).get(name)
        except CookieError:
            return False
        return cookie is not None and secrets.compare_digest(cookie.value.encode(), self.token.encode())


def _cookie_name(scope: _Message) -> str:
    """Return a name that differs between servers of the machine: cookies do not tell ports apart."""
    return f"raydet-browse-{scope['server'][1]}"


def _bounded(receive: _Receive) -> _Receive:
    """Return a receiver that stops a body that is longer than it said."""
    total = 0

    async def receive_some() -> _Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > MAX_BODY_BYTES:
            raise UserError(f"requests may have {MAX_BODY_BYTES} bytes")
        return message

    return receive_some


async def _answer(send: _Send, status: int, reason: str) -> None:
    body = json.dumps({"error": reason}).encode()
    headers = {**_HEADERS, "content-type": "application/json", "content-length": str(len(body))}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
