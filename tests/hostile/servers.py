"""Hostile web servers on loopback: each answers the request for one of two images, b.png, in a way of its own."""

import gzip
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.hostile.case import Scene

Answer = Callable[[bytes, int, str], Iterator[bytes]]
"""Function of a good image, the port and the path → pieces of the answer."""
_OK = b"HTTP/1.1 200 OK\r\n"
_GAP_S = 0.2


def good_answer(image: bytes) -> bytes:
    """Return a correct answer."""
    return _OK + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(image) + image


def _slowly(pieces: Iterator[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        time.sleep(_GAP_S)


def _redirect(target: str) -> Answer:
    def answer(_: bytes, port: int, path: str) -> Iterator[bytes]:
        place = target.replace("@PORT@", str(port)).replace("@PATH@", path)
        yield b"HTTP/1.1 302 Found\r\nLocation: " + place.encode() + b"\r\nContent-Length: 0\r\n\r\n"

    return answer


def _chunked(pieces: Callable[[bytes], Iterator[bytes]]) -> Answer:
    def answer(image: bytes, *_: object) -> Iterator[bytes]:
        yield _OK + b"Transfer-Encoding: chunked\r\n\r\n"
        yield from pieces(image)

    return answer


def _plain(make: Callable[[bytes], Iterator[bytes]]) -> Answer:
    return lambda image, *_: make(image)


def _bytes_of(text: bytes) -> Iterator[bytes]:
    return (text[number : number + 1] for number in range(len(text)))


ANSWERS: dict[str, Answer] = {
    "silence": _plain(lambda _: _slowly(itertools.repeat(b""))),
    "closes at once": _plain(lambda _: iter(())),
    "a status dripped": _plain(lambda _: _slowly(_bytes_of(_OK * 1000))),
    "headers dripped": _plain(lambda _: _slowly(itertools.chain([_OK], _bytes_of(b"X-A: b\r\n" * 10_000)))),
    "a header without end": _plain(lambda _: itertools.chain([_OK + b"X-A: "], itertools.repeat(b"x" * 65_536))),
    "headers without end": _plain(lambda _: itertools.chain([_OK], itertools.repeat(b"X-A: b\r\n" * 8_000))),
    "100 Continue without end": _plain(lambda _: _slowly(itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n"))),
    "100 Continue quickly": _plain(lambda _: itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n" * 1_000)),
    "a body dripped": _plain(
        lambda image: _slowly(itertools.chain([_OK + b"Content-Length: 100000\r\n\r\n"], _bytes_of(image * 100)))
    ),
    "a body without end": _plain(lambda _: itertools.chain([_OK + b"\r\n"], itertools.repeat(bytes(2**20)))),
    "a length of 10^18": _plain(lambda image: iter([_OK + b"Content-Length: 1%s\r\n\r\n" % (b"0" * 18), image])),
    "a length of 5,000 digits": _plain(
        lambda image: iter([_OK + b"Content-Length: %s\r\n\r\n" % (b"9" * 5_000), image])
    ),
    "a negative length": _plain(lambda image: iter([_OK + b"Content-Length: -5\r\n\r\n", image])),
    "a length too small": _plain(lambda image: iter([_OK + b"Content-Length: 10\r\n\r\n", image])),
    "a length too large": _plain(lambda image: iter([_OK + b"Content-Length: 999999\r\n\r\n", image])),
    "two lengths": _plain(lambda image: iter([_OK + b"Content-Length: 5\r\nContent-Length: 9\r\n\r\n", image])),
    "chunks dripped": _chunked(lambda image: _slowly(_bytes_of(b"1\r\nx\r\n" * 10_000))),
    "a chunk size dripped": _chunked(lambda _: _slowly(itertools.repeat(b"0"))),
    "a chunk extension without end": _chunked(lambda _: itertools.chain([b"1;"], itertools.repeat(b"x" * 65_536))),
    "a chunk extension dripped": _chunked(lambda _: _slowly(itertools.chain([b"1;"], itertools.repeat(b"x")))),
    "a chunk of 2^60": _chunked(lambda image: iter([b"1000000000000000\r\n", image])),
    "a negative chunk": _chunked(lambda image: iter([b"-5\r\n", image])),
    "trailers without end": _chunked(
        lambda image: itertools.chain([b"%x\r\n%s\r\n0\r\n" % (len(image), image)], itertools.repeat(b"X: y\r\n" * 999))
    ),
    "trailers dripped": _chunked(
        lambda image: _slowly(
            itertools.chain([b"%x\r\n%s\r\n0\r\n" % (len(image), image)], itertools.repeat(b"X: y\r\n"))
        )
    ),
    "chunks without end": _chunked(lambda _: itertools.repeat(b"100000\r\n" + bytes(2**20) + b"\r\n")),
    "a gzip bomb": _plain(
        lambda _: iter([_OK + b"Content-Encoding: gzip\r\n\r\n", gzip.compress(bytes(600_000_000), 1)])
    ),
    "deflate that is none": _plain(lambda image: iter([_OK + b"Content-Encoding: deflate\r\n\r\n", image])),
    "fifty encodings": _plain(
        lambda image: iter([_OK + b"Content-Encoding: " + b"gzip, " * 50 + b"gzip\r\n\r\n", image])
    ),
    "not HTTP": _plain(lambda _: iter([b"SSH-2.0-OpenSSH_9.0\r\n"])),
    "HTTP/0.9": _plain(lambda image: iter([image])),
    "HTTP/9.9": _plain(lambda image: iter([b"HTTP/9.9 200 OK\r\n\r\n" + image])),
    "status 999": _plain(lambda image: iter([b"HTTP/1.1 999 x\r\n\r\n" + image])),
    "status with escape sequences": _plain(lambda _: iter([b"HTTP/1.1 404 \x1b[31m\x07\r\n\r\n"])),
    "status of 100 KB": _plain(lambda _: iter([b"HTTP/1.1 404 " + b"x" * 100_000 + b"\r\n\r\n"])),
    "busy": _plain(lambda _: iter([b"HTTP/1.1 503 x\r\nContent-Length: 0\r\n\r\n"])),
    "busy for a year": _plain(
        lambda _: iter([b"HTTP/1.1 503 x\r\nRetry-After: 31536000\r\nContent-Length: 0\r\n\r\n"])
    ),
    "busy for 5,000 digits": _plain(
        lambda _: iter([b"HTTP/1.1 429 x\r\nRetry-After: " + b"9" * 5_000 + b"\r\nContent-Length: 0\r\n\r\n"])
    ),
    "unauthorised": _plain(
        lambda _: iter([b'HTTP/1.1 401 x\r\nWWW-Authenticate: Basic realm="x"\r\nContent-Length: 0\r\n\r\n'])
    ),
    "no content": _plain(lambda _: iter([b"HTTP/1.1 204 x\r\n\r\n"])),
    "partial content": _plain(lambda image: iter([b"HTTP/1.1 206 x\r\nContent-Range: bytes 0-5/9\r\n\r\n", image])),
    "not modified": _plain(lambda _: iter([b"HTTP/1.1 304 x\r\n\r\n"])),
    "redirect to itself": _redirect("http://127.0.0.1:@PORT@@PATH@"),
    "redirect without end": _redirect("http://127.0.0.1:@PORT@@PATH@x"),
    "redirect to a file": _redirect("file:///etc/hostname"),
    "redirect to FTP": _redirect("ftp://127.0.0.1:@PORT@/a.png"),
    "redirect to data": _redirect("data:image/png;base64,AAAA"),
    "redirect to another port": _redirect("http://127.0.0.1:@OTHER@/secret.png"),
    "redirect to localhost": _redirect("http://localhost:@OTHER@/secret.png"),
    "redirect to 0.0.0.0": _redirect("http://0.0.0.0:@OTHER@/secret.png"),
    "redirect to IPv6": _redirect("http://[::ffff:127.0.0.1]:@OTHER@/secret.png"),
    "redirect to a decimal address": _redirect("http://2130706433:@OTHER@/secret.png"),
    "redirect to a private address": _redirect("http://10.255.255.1/secret.png"),
    "redirect to metadata": _redirect("http://169.254.169.254/latest/meta-data/"),
    "redirect to nothing": _redirect(""),
    "redirect with a password": _redirect("http://user:hunter2hunter2@127.0.0.1:1/a.png"),
    "redirect with escape sequences": _redirect("http://127.0.0.1:1/\x1b[31m.png"),
    "redirect of 100 KB": _redirect("http://127.0.0.1:1/" + "x" * 100_000),
    "redirect to no port": _redirect("http://127.0.0.1:99999/a.png"),
    "redirect to another host": _redirect("http://nowhere.invalid/a.png"),
    "cookies without end": _plain(
        lambda image: itertools.chain([_OK], (b"Set-Cookie: a%d=b\r\n" % n for n in range(90)), [b"\r\n" + image])
    ),
}
"""Answers to the request for b.png; any other path gets a good image."""


def listen() -> socket.socket:
    """Return a socket that listens on loopback."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("127.0.0.1", 0))
    server.listen(16)
    return server


def add(scene: Scene, answer: Answer, good: bytes) -> int:
    """Let a server run beside the command; return its port.

    A second server on loopback, which no list names, serves the secret picture.
    """
    server, other = listen(), listen()
    secret = (scene.outside / "secret.png").read_bytes()
    other_port = other.getsockname()[1]

    def hostile(image: bytes, port: int, path: str) -> Iterator[bytes]:
        if not path.startswith(("/b.png", "/hostile")):
            return iter([good_answer(image)])
        return (piece.replace(b"@OTHER@", b"%d" % other_port) for piece in answer(image, port, path))

    def serve() -> None:
        threading.Thread(target=_serve, args=(other, secret, lambda image, *_: iter([good_answer(image)]))).start()
        _serve(server, good, hostile)

    scene.beside.append(serve)
    scene.ports.add(int(server.getsockname()[1]))
    return int(server.getsockname()[1])


def _serve(server: socket.socket, good: bytes, answer: Answer) -> None:
    while True:
        connection, _ = server.accept()
        threading.Thread(target=_answer, args=(connection, good, answer), daemon=True).start()


def _answer(connection: socket.socket, good: bytes, answer: Answer) -> None:
    with connection:
        try:
            request = b""
            while b"\r\n\r\n" not in request and (data := connection.recv(65_536)):
                request += data
            path = request.split(b" ")[1].decode()
            for piece in answer(good, connection.getsockname()[1], path):
                connection.sendall(piece)
        except (OSError, IndexError):
            return


def good_image(folder: Path) -> bytes:
    """Return the good image of the base."""
    return (folder / "images" / "a.png").read_bytes()
