"""Images and lists from a web server on loopback that can be slow, busy, wrong or hostile."""

import contextlib
import datetime
import gzip
import pickle
import re
import socket
import ssl
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from raydet.cli.main import main
from raydet.common.errors import UserError
from raydet.common.redaction import name_of_url
from raydet.config import PrepareImagesConfig
from raydet.images import http_connections
from raydet.images.files import MissingFileError, ReadError
from raydet.images.http_connections import is_public
from raydet.preparation.prepare import _prepare
from raydet.preparation.sources.lists import ImageList, is_list, read_list
from raydet.preparation.sources.web import WebReader
from raydet.tables.storage import is_web
from raydet.tables.table import open_table

_BOMB = zlib.compress(bytes(10**8))
_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
QUICK = WebReader(
    connect_timeout_s=2.0, silence_timeout_s=0.2, total_timeout_s=30.0, first_wait_s=0.01, longest_wait_s=0.05
)


SIGNED = "size=1&X-Amz-Signature=abcdef&X-Amz-Credential=AKIA%2F20260101&sig=xyz"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, site: "Site", *rest: Any) -> None:
        self.site = site
        super().__init__(*rest)

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        with self.site.lock:
            self.site.asked[path] += 1
            number = self.site.asked[path]
        answer = getattr(self, f"answer_{path.split('/')[1].split('.')[0]}", None)
        if answer is not None:
            answer(number)
        elif path in self.site.files:
            self.send(200, self.site.files[path])
        else:
            self.send(404)

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in ({"Content-Length": str(len(body))} | given).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def answer_busy(self, number: int) -> None:
        self.send(*((200, b"at last") if number == 3 else (503,)))

    def answer_signed(self, _: int) -> None:
        self.send(200, self.site.files["/a.jpg"]) if self.path.endswith(f"?{SIGNED}") else self.send(403)

    def answer_limited(self, number: int) -> None:
        self.send(200, b"at last") if number == 2 else self.send(429, Retry_After="86400")

    def answer_always503(self, _: int) -> None:
        self.send(503)

    def answer_forbidden(self, _: int) -> None:
        self.send(403)

    def answer_silent(self, _: int) -> None:
        self.site.over.wait(10)
        self.close_connection = True

    def answer_drip(self, _: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        while not self.site.over.wait(0.1):
            self.wfile.write(b"x")

    def answer_large(self, _: int) -> None:
        self.send(200, b"x", Content_Length=str(2**40))
        self.close_connection = True

    def answer_endless(self, _: int) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while not self.site.over.is_set():
            self.wfile.write(b"10000\r\n" + bytes(2**16) + b"\r\n")

    def answer_short(self, number: int) -> None:
        if number == 2:
            return self.send(200, b"whole")
        self.send(200, b"wh", Content_Length="5")
        self.close_connection = True
        return None

    def drip(self, start: bytes, part: bytes) -> None:
        self.close_connection = True
        self.wfile.write(start)
        with contextlib.suppress(OSError):
            while not self.site.over.wait(0.05):
                self.wfile.write(part)

    def answer_headers(self, _: int) -> None:
        self.drip(b"HTTP/1.1 200 OK\r\n", b"X")

    def answer_extension(self, _: int) -> None:
        self.drip(_CHUNKED + b"5;", b"x")

    def answer_trailers(self, _: int) -> None:
        self.drip(_CHUNKED + b"1\r\nx\r\n0\r\nX", b"x")

    def answer_chunked(self, _: int) -> None:
        self.wfile.write(_CHUNKED + b"4;a=b\r\none \r\n3\r\ntwo\r\n0\r\nX: y\r\n\r\n")

    def answer_negative(self, _: int) -> None:
        self.raw(_CHUNKED + b"-1\r\n" + b"x" * 1000)

    def answer_longline(self, _: int) -> None:
        self.raw(_CHUNKED + b"1;" + b"x" * 10_000 + b"\r\nx\r\n0\r\n\r\n")

    def answer_manytrailers(self, _: int) -> None:
        self.raw(_CHUNKED + b"1\r\nx\r\n0\r\n" + b"X: y\r\n" * 1000 + b"\r\n")

    def answer_garbage(self, _: int) -> None:
        self.raw(b"what is this\r\n\r\n")

    def raw(self, answer: bytes) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.write(answer)

    def answer_packed(self, _: int) -> None:
        what = self.path.partition("?")[2]
        body = b"x" * 1_000_000
        if what == "bomb":
            return self.send(200, _BOMB, Content_Encoding="deflate")
        packed = zlib.compress(body) if what == "deflate" else gzip.compress(body)
        encoding = {"gzip": "gzip", "deflate": "deflate", "cut": "gzip"}.get(what, "br")
        return self.send(200, packed[:-20] if what == "cut" else packed, Content_Encoding=encoding)

    def answer_elsewhere(self, _: int) -> None:
        self.send(302, Location=self.site.files["/target"].decode())

    def answer_redirect(self, _: int) -> None:
        self.send(302, Location="/a.jpg")

    def answer_circle(self, _: int) -> None:
        self.send(302, Location="/circle")

    def answer_file(self, _: int) -> None:
        self.send(302, Location="file:///etc/hostname")


class Site:
    """A test server: its files, and the number of requests for each."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()
        self.lock, self.over = threading.Lock(), threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def site(test_data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    site = Site()
    for number, path in enumerate(sorted((test_data / "bccd/images").iterdir())[:3]):
        site.files[f"/{'abc'[number]}.jpg"] = path.read_bytes()
    thread = threading.Thread(target=site.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield site
    site.over.set()
    site.server.shutdown()
    thread.join()
    site.server.server_close()


def certificate(folder: Path) -> Path:
    """Write a certificate of localhost, signed by itself, and its key into one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path = folder / "localhost.pem"
    path.write_bytes(key.private_bytes(*form) + signed.public_bytes(serialization.Encoding.PEM))
    return path


def test_a_file_is_read_over_tls_if_the_certificate_is_trusted(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate(tmp_path))
    site.server.socket = context.wrap_socket(site.server.socket, server_side=True)
    url = f"https://localhost:{site.server.server_address[1]}"
    http_connections._tls.cache_clear()
    with pytest.raises(ReadError, match="certificate or encryption cannot be trusted"):
        QUICK.read(f"{url}/a.jpg")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "localhost.pem"))
    http_connections._tls.cache_clear()
    try:
        assert QUICK.read(f"{url}/a.jpg") == QUICK.read(f"{url}/redirect") == site.files["/a.jpg"]
        with pytest.raises(ReadError, match=r"the server is too slow: \d+ bytes in 0.5 s"):
            replace(QUICK, total_timeout_s=0.5).read(f"{url}/drip")
    finally:
        http_connections._tls.cache_clear()


def test_a_file_is_read_by_its_address(site: Site) -> None:
    assert QUICK.read(f"{site.url}/a.jpg") == site.files["/a.jpg"]
    assert QUICK.read(f"{site.url}/redirect") == site.files["/a.jpg"]
    assert pickle.loads(pickle.dumps(QUICK)).read(f"{site.url}/b.jpg?size=full#top") == site.files["/b.jpg"]
    assert is_web("HTTPS://host/a") and not is_web("s3://host/a") and not is_web("http/a") and not is_web("https")


@pytest.mark.parametrize(
    ("path", "reason", "num_asked"),
    [
        ("/none.jpg", "no such file: the server answered 404", 1),
        ("/forbidden", "the server answered 403", 1),
        ("/always503", "the server answered 503, after 5 attempts", 5),
        ("/silent", "the server did not answer in time, after 5 attempts", 5),
        ("/large", "a file of 1,099,512 MB is over the limit of 1,074 MB", 1),
        ("/circle", "more than 5 redirects", 6),
        ("/file", "the URL, or one that the server redirects to, is not an http or https URL", 1),
    ],
)
@pytest.mark.timeout(60)
def test_what_cannot_be_had_gets_a_reason(site: Site, path: str, reason: str, num_asked: int) -> None:
    with pytest.raises(ReadError) as caught:
        QUICK.read(site.url + path)
    assert str(caught.value) == reason
    assert isinstance(caught.value, MissingFileError) == (path == "/none.jpg")
    assert site.asked[path] == num_asked


@pytest.mark.timeout(60)
def test_a_server_that_never_ends_is_left(site: Site) -> None:
    small = WebReader(max_bytes=3 * 2**20, first_wait_s=0.01)
    with pytest.raises(ReadError, match="over the limit of 4 MB"):
        small.read(f"{site.url}/endless")
    slow = WebReader(silence_timeout_s=30.0, total_timeout_s=0.3, first_wait_s=0.01)
    for path in ("drip", "headers", "extension", "trailers", "silent"):
        with pytest.raises(ReadError, match=r"too slow: [\d,]+ bytes in 0.3 s"):
            slow.read(f"{site.url}/{path}")
        assert site.asked[f"/{path}"] == 1


@pytest.mark.timeout(60)
def test_waits_and_retries_end_with_the_file_s_own_time(site: Site) -> None:
    impatient = WebReader(first_wait_s=20.0, total_timeout_s=10.0)
    with pytest.raises(ReadError, match="the server answered 503, after 1 attempts"):
        impatient.read(f"{site.url}/always503")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("negative", "the server's answer is not valid HTTP"),
        ("longline", "the server's answer is not valid HTTP"),
        ("manytrailers", "the server's answer is not valid HTTP"),
        ("garbage", "the server's answer is not valid HTTP"),
        ("packed?brotli", "the server packs the file in a way that raydet did not ask for"),
        ("packed?bomb", "over the limit of 2 MB"),
        ("packed?cut", "the connection was dropped"),
    ],
)
@pytest.mark.timeout(60)
def test_answers_that_are_not_what_they_say(site: Site, path: str, reason: str) -> None:
    with pytest.raises(ReadError, match=re.escape(reason)):
        replace(QUICK, max_bytes=2_000_000).read(f"{site.url}/{path}")


def test_packed_and_chunked_answers_are_read(site: Site) -> None:
    assert QUICK.read(f"{site.url}/packed?gzip") == b"x" * 1_000_000
    assert QUICK.read(f"{site.url}/packed?deflate") == b"x" * 1_000_000
    assert QUICK.read(f"{site.url}/chunked") == b"one two" == QUICK.read(f"{site.url}/chunked")


@pytest.mark.timeout(60)
def test_redirects_lead_into_no_private_network_that_the_list_does_not_name(site: Site, tmp_path: Path) -> None:
    other = Site()
    other.files["/secret.jpg"] = b"secret"
    thread = threading.Thread(target=other.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    port = other.server.server_address[1]
    hosts = ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433", "127.1"]
    try:
        for host in hosts:
            site.files["/target"] = f"http://{host}:{port}/secret.jpg".encode()
            with pytest.raises(ReadError, match=r"an address of this machine or its networks"):
                QUICK.read(f"{site.url}/elsewhere")
        assert not other.asked
        site.files["/target"] = f"{other.url}/secret.jpg".encode()
        (tmp_path / "list.txt").write_text(f"{site.url}/elsewhere\n{other.url}/other.jpg\n")
        images = ImageList(str(tmp_path / "list.txt"), web=QUICK)
        records = list(read_list(images).images)
        assert pickle.loads(pickle.dumps(images)).read(records[0].path) == b"secret"
    finally:
        other.over.set()
        other.server.shutdown()
        thread.join()
        other.server.server_close()


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("192.168.0.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("0.0.0.0", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::a00:1", False),
        ("64:ff9b::808:808", True),
        ("2002:a00:1::", False),
    ],
)
def test_public_addresses(address: str, *, expected: bool) -> None:
    assert is_public(address) == expected


def test_busy_servers_are_asked_again(site: Site) -> None:
    assert QUICK.read(f"{site.url}/busy") == b"at last"
    assert QUICK.read(f"{site.url}/short") == b"whole"
    # The requested wait of a day is cut to `longest_wait_s`.
    assert QUICK.read(f"{site.url}/limited") == b"at last"
    assert (site.asked["/busy"], site.asked["/short"], site.asked["/limited"]) == (3, 2, 2)


def test_servers_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    gone = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    gone.server_close()
    with pytest.raises(ReadError, match=r"^cannot connect to the server, after 5 attempts$"):
        QUICK.read(f"http://127.0.0.1:{gone.server_address[1]}/a.jpg")
    for address in ("http://", "http://[", "http://host:port/"):
        with pytest.raises(ReadError, match=r"is not an http or https URL|unknown host"):
            QUICK.read(address)


def test_several_threads_read_side_by_side(site: Site) -> None:
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(QUICK.read(f"{site.url}/a.jpg"))) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [site.files["/a.jpg"]] * 24


def test_a_list_may_name_paths_and_addresses(site: Site, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "50% #1.jpg").write_bytes(b"local")
    lines = ["# mine", "", f"{site.url}/a.jpg", "  sub/50% #1.jpg ", f"{site.url}/none.jpg", str(tmp_path / "none.jpg")]
    (tmp_path / "list.txt").write_text("\ufeff" + "\r\n".join([*lines, (tmp_path / "sub/50% #1.jpg").as_uri()]))
    images = ImageList(str(tmp_path / "list.txt"), web=QUICK)
    source = read_list(images)
    records = list(source.images)
    assert [record.path for record in source.images] == [record.path for record in records]
    assert [(record.image_id, record.path) for record in records] == [
        (0, lines[2]),
        (1, "sub/50% #1.jpg"),
        (2, lines[4]),
        (3, lines[5]),
        (4, (tmp_path / "sub/50% #1.jpg").as_uri()),
    ]
    assert [record.extra for record in records] == [{"source_id": record.path} for record in records]
    copy = pickle.loads(pickle.dumps(images))
    assert [copy.read(records[place].path) for place in (0, 1, 4)] == [site.files["/a.jpg"], b"local", b"local"]
    for record in records[2:4]:
        with pytest.raises(MissingFileError, match="no such file"):
            copy.read(record.path)
    assert images.uri_of("sub/50% #1.jpg") == str(tmp_path / "sub/50% #1.jpg")


def test_signatures_of_addresses_are_used_and_not_kept(site: Site, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{site.url}/signed.jpg?{SIGNED}\n")
    (tmp_path / "list.csv").write_text(f"url,token\n{site.url}/signed.jpg?{SIGNED},1\n")
    for name in ("list.txt", "list.csv"):
        out = str(tmp_path / name.replace(".", "-"))
        assert main(["prepare", "images", "--images", str(tmp_path / name), "--out", out]) == 0
        row = open_table(out, "images").read().to_pylist()[0]
        shown = name_of_url(f"{site.url}/signed.jpg?size=1")
        assert row["image"] == {"bytes": site.files["/a.jpg"], "path": shown} and row["source_id"] == shown


def test_images_that_differ_in_their_query_keep_different_names(site: Site, tmp_path: Path) -> None:
    queries = ("id=1", "id=2", "id=2&token=hunter2", "")
    (tmp_path / "list.txt").write_text("".join(f"{site.url}/a.jpg?{query}\n" for query in queries))
    out = str(tmp_path / "out")
    assert main(["prepare", "images", "--images", str(tmp_path / "list.txt"), "--out", out]) == 0
    paths = [row["image"]["path"] for row in open_table(out, "images").read().to_pylist()]
    assert len(set(paths[:2])) == 2 and paths[1] == paths[2] and paths[3] == f"{site.url}/a.jpg"
    assert all(re.fullmatch(re.escape(site.url) + r"/a~[0-9a-f]{12}\.jpg", path) for path in paths[:3])


def test_a_look_up_of_an_address_ends_with_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait(60) and [])
    monkeypatch.setenv("no_proxy", "*")
    try:
        hasty = replace(QUICK, connect_timeout_s=0.05)
        with pytest.raises(ReadError, match=r"^the address of the server was not found in time, after 5 attempts$"):
            hasty.read("http://slow.test/a.jpg")
        with pytest.raises(ReadError, match=r"^the server is too slow"):
            replace(hasty, connect_timeout_s=9.0, total_timeout_s=0.1).read("http://slow.test/a.jpg")
    finally:
        answered.set()


def test_a_list_on_the_web_and_its_relative_paths(site: Site) -> None:
    site.files["/lists/new.txt"] = b"../a.jpg\nb.jpg\n/c.jpg"
    site.files["/lists/b.jpg"] = b"beside the list"
    images = ImageList(f"{site.url}/lists/new.txt?token=7")
    records = list(read_list(images).images)
    assert [images.read(record.path) for record in records[:2]] == [site.files["/a.jpg"], b"beside the list"]
    with pytest.raises(UserError, match=r"cannot read .*/none.txt: no such file: the server answered 404"):
        read_list(ImageList(f"{site.url}/none.txt"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_lists_may_be_in_utf_16(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "list.txt").write_text("Köter.jpg\nb.jpg\n", encoding=encoding)
    (tmp_path / "list.csv").write_text("path,camera\nKöter.jpg,1\nb.jpg,2\n", encoding=encoding)
    for name in ("list.txt", "list.csv"):
        assert [record.path for record in read_list(ImageList(str(tmp_path / name))).images] == ["Köter.jpg", "b.jpg"]


def test_a_csv_names_images_and_carries_further_columns(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("camera,URL,night,width\nnorth,a.jpg,true,7\n,b.jpg,false,8\n")
    source = read_list(ImageList(str(tmp_path / "list.csv")))
    assert [(field.name, str(field.type)) for field in source.extra_fields] == [
        ("source_id", "string"),
        ("camera", "string"),
        ("night", "bool"),
    ]
    first, second = source.images
    assert (first.path, second.path) == ("a.jpg", "b.jpg")
    assert first.extra == {"source_id": "a.jpg", "camera": "north", "night": True}
    assert second.extra == {"source_id": "b.jpg", "camera": "", "night": False}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"# nothing\n\n", "is an empty list"),
        ("a.txt", b"images/\n", "image 1 of .*a.txt is a folder: images/"),
        ("a.txt", b"x.jpg\nnews://host/x.jpg\n", "image 2 of .*a.txt: cannot open news://host"),
        ("a.lst", b"\xff\xfe\x00", "is not text in UTF-8"),
        ("a.csv", b"", "is not a CSV file"),
        ("a.csv", b"name,size\nx,1\n", "has none of the columns url, .*; it has name, size"),
        ("a.csv", b"path,size\nx.jpg,1\n,2\n", "the column path of .* has rows without an image"),
        ("a.csv", b"path,size\nx.jpg\n", "is not a CSV file"),
        ("a.json", b"[]", "is not a list: name a folder, or a list"),
    ],
)
def test_lists_of_no_use_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_list(ImageList(str(tmp_path / name)))
    assert "\n" not in str(caught.value)
    assert is_list(str(tmp_path / name)) == (name != "a.json")
    assert not is_list(str(tmp_path))


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such list: .*none.txt"):
        read_list(ImageList(str(tmp_path / "none.txt")))
    with pytest.raises(UserError, match=r"is not a list: name a list of URLs"):
        read_list(ImageList("https://127.0.0.1/images/"))


@pytest.mark.timeout(60)
def test_a_table_is_made_of_a_list_and_what_fails_is_rejected(site: Site, tmp_path: Path) -> None:
    site.files["/page.html"] = b"<html>not found, says a server with code 200</html>"
    names = ["a.jpg", "none.jpg", "busy.jpg", "always503", "page.html", "redirect", "b.jpg", "a.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(f"{site.url}/{name}" for name in names))
    images = ImageList(str(tmp_path / "list.txt"), web=QUICK)
    config = PrepareImagesConfig(images=str(tmp_path / "list.txt"), out=str(tmp_path / "out"))
    report = _prepare(config, lambda _: (read_list(images), images))
    rows = open_table(str(tmp_path / "out"), "images").read().to_pylist()
    assert [row["image_id"] for row in rows] == [0, 5, 6, 7]
    assert [row["image"]["path"] for row in rows] == [f"{site.url}/{names[place]}" for place in (0, 5, 6, 7)]
    assert rows[1]["image"]["bytes"] == rows[0]["image"]["bytes"] == site.files["/a.jpg"]
    rejected = open_table(str(tmp_path / "out" / "__rejected"), "rejected").read().to_pylist()
    assert {row["path"].rpartition("/")[2]: row["reason"] for row in rejected} == {
        "none.jpg": "no such file: the server answered 404",
        "busy.jpg": "not an image Pillow can read (it is text)",
        "always503": "the server answered 503, after 5 attempts",
        "page.html": "not an image Pillow can read (it is text)",
    }
    assert (report.found, report.accepted, report.rejected) == (8, 4, 4)


def test_the_web_has_no_folders_and_nothing_to_refer_to(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.txt").write_text(f"{site.url}/a.jpg")
    (tmp_path / "secret.txt").write_text("https://me:geheim@127.0.0.1/a.jpg")
    coco = ["prepare", "coco", "--annotations", "x.json", "--images", site.url]
    for command, words in [
        (["prepare", "images", "--images", f"{site.url}/images/"], "is not a list: name a list of URLs"),
        (coco, "is a web URL"),
        (
            ["prepare", "images", "--images", str(tmp_path / "list.txt"), "--image-storage", "reference"],
            "requires files",
        ),
        (["prepare", "images", "--images", str(tmp_path / "secret.txt")], "contains a password"),
    ]:
        assert main([*command, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and "geheim" not in error
    site.files["/list.txt"] = b"a.jpg\nfile:///etc/hostname"
    with pytest.raises(UserError, match=r"image 2 of .* is not a web URL"):
        read_list(ImageList(f"{site.url}/list.txt"))
