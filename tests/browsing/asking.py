"""A browser's part of the conversation with the page's server, over a real socket."""

import http.client
import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Answer:
    """Status, headers by name in lower case, and body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def content(self) -> Any:
        return json.loads(self.body)


@dataclass
class Visitor:
    """Someone who opened the printed address, or only knows where the server is.

    Attributes:
        address: As printed.
        headers: Sent with every request; the cookie is set by `enter`.
    """

    address: str
    headers: dict[str, str] = field(default_factory=dict)

    def enter(self) -> Answer:
        answer = self.get(urlsplit(self.address).path)
        self.headers["Cookie"] = answer.headers["set-cookie"].partition(";")[0]
        return answer

    def get(self, path: str, **headers: str) -> Answer:
        return self._send("GET", path, None, headers)

    def post(self, path: str, content: Any, **headers: str) -> Answer:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self._send("POST", path, body, {"Content-Type": "application/json", **headers})

    def _send(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> Answer:
        connection = http.client.HTTPConnection(urlsplit(self.address).netloc, timeout=30)
        try:
            connection.putrequest(method, path, skip_host="Host" in headers)
            everything = {**self.headers, **headers}
            if body is not None:
                everything.setdefault("Content-Length", str(len(body)))
            for name, value in everything.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())
        finally:
            connection.close()
