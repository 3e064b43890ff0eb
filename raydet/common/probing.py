"""A quick answer whether a server can be reached, for clients that would retry for a minute."""

import http.client
import os
import ssl
import threading

from raydet.common.errors import one_line

TIMEOUT_S = 10.0
_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


def has_proxy() -> bool:
    """Return True if the environment names a proxy, which may reach what this machine cannot."""
    return any(os.environ.get(name) for name in _PROXIES)


def failure_of(is_secure: bool, host: str, *, timeout_s: float | None = None) -> str | None:
    """Return why a server does not answer within a time limit, by default `TIMEOUT_S`, or None if it does."""
    timeout_s = timeout_s or TIMEOUT_S
    answers: list[str | None] = []

    def ask() -> None:
        answers.append(_ask(is_secure, host, timeout_s))

    # In a thread, because resolving a name has no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answers[0] if answers else f"no answer within {timeout_s:g} s"


def _ask(is_secure: bool, host: str, timeout_s: float) -> str | None:
    connection: http.client.HTTPConnection
    try:
        if is_secure:
            # Nothing is sent or believed here; the store's own client verifies the certificate.
            context = ssl._create_unverified_context()
            connection = http.client.HTTPSConnection(host, timeout=timeout_s, context=context)
        else:
            connection = http.client.HTTPConnection(host, timeout=timeout_s)
        try:
            connection.request("HEAD", "/")
            connection.getresponse()
        finally:
            connection.close()
    except (OSError, http.client.InvalidURL) as error:
        return one_line(getattr(error, "strerror", None) or error)
    except http.client.HTTPException:
        pass  # it answered, if not in HTTP
    return None
