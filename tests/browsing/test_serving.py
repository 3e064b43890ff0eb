"""The page's server: who may ask what, and that nothing in names or parameters leads anywhere else."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from raydet.browsing.app import application
from raydet.browsing.filters import ImageFilter
from raydet.browsing.guard import MAX_BODY_BYTES
from raydet.browsing.index import build_index
from raydet.browsing.pictures import PictureError, Pictures, RecentlyUsed
from raydet.browsing.queries import Queries
from raydet.browsing.serving import serving
from raydet.browsing.sources import open_sources
from raydet.common.errors import UserError
from raydet.config import BrowseConfig
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter
from tests.browsing.asking import Visitor
from tests.browsing.made import EVIL, EVIL_PATHS, NAMES, write_detections, write_images
from tests.small_sets import files_below, save_image

NUM_IMAGES = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    write_detections(folder / "found", write_images(folder / "images", NUM_IMAGES))
    return folder


@pytest.fixture(scope="module")
def queries(folder: Path) -> Queries:
    return Queries(build_index(open_sources(config_of(folder))))


def config_of(folder: Path) -> BrowseConfig:
    return BrowseConfig(data=str(folder / "found"), images=str(folder / "images"))


@pytest.fixture(scope="module")
def visitor(folder: Path, queries: Queries) -> Iterator[Visitor]:
    pages = application(open_sources(config_of(folder)), queries, selection=str(folder / "selection"))
    with serving(pages) as address:
        visitor = Visitor(address)
        visitor.enter()
        yield visitor


def test_the_first_page_sets_the_cookie_and_allows_only_its_own_files(visitor: Visitor) -> None:
    answer = Visitor(visitor.address).enter()
    assert answer.status == 200 and b"<title>raydet browse</title>" in answer.body
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    names = re.findall(r'(?:src|href)="([^"#]+)"', answer.body.decode())
    assert names and all(visitor.get(name).status == 200 for name in names)
    assert not re.search(r"<script>|\son\w+=|style=", answer.body.decode())


def test_nothing_is_answered_without_the_token(visitor: Visitor) -> None:
    stranger = Visitor(visitor.address)
    for path in ("/", "/app.js", "/api/about", "/thumbnail/0", "/picture/0", "/nothing", "/" + "A" * 43):
        assert stranger.get(path).status == 403
    wrong = visitor.headers["Cookie"][:-1] + ("A" if visitor.headers["Cookie"][-1] != "A" else "B")
    for cookie in (wrong, "raydet-browse=1", visitor.headers["Cookie"].partition("=")[0] + "=", '"\x7f"; =;;'):
        assert stranger.get("/api/about", Cookie=cookie).status == 403
    assert stranger.post("/api/select", {"is_selected": True, "images": [0]}).status == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{}", "127.0.0.1.evil.example:{}", "[::1]:{}", "", "0.0.0.0:{}"]
)
def test_names_that_were_made_to_point_here_are_refused(visitor: Visitor, host: str) -> None:
    port = visitor.address.split(":")[2].partition("/")[0]
    assert visitor.get("/api/about", Host=host.format(port)).status in (400, 403)
    assert visitor.get("/api/about", Host=f"localhost:{port}").status == 200


def test_other_pages_cannot_change_anything(visitor: Visitor) -> None:
    asked = {"is_selected": True, "images": [0]}
    for headers, status in (
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ):
        assert visitor.post("/api/select", asked, **headers).status == status
    assert visitor.get("/api/select").status == 405
    assert visitor.post("/api/facets", {"images": "selected"}).content["images"] == 0


def test_it_listens_on_loopback_only(visitor: Visitor) -> None:
    port = int(visitor.address.split(":")[2].partition("/")[0])
    listening = [
        line.split()[1]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and int(line.split()[1].partition(":")[2], 16) == port
    ]
    assert listening == [f"0100007F:{port:04X}"]


HOSTILE: list[tuple[str, Any]] = [
    ("/api/facets", {"classes": ["1) OR 1=1 --"]}),
    ("/api/facets", {"classes": [10**30]}),
    ("/api/facets", {"classes": list(range(201))}),
    ("/api/facets", {"classes": [-1]}),
    ("/api/facets", {"scores": [0, float("nan")]}),
    ("/api/facets", {"scores": ["0", "1"]}),
    ("/api/facets", {"scores": [0, 1, 2]}),
    ("/api/facets", {"sides": [99]}),
    ("/api/facets", {"groups": [[10**6, 0]]}),
    ("/api/facets", {"groups": [["slice_0; DROP TABLE images", 0]]}),
    ("/api/facets", {"images": "selected OR 1=1"}),
    ("/api/facets", {"text": "x" * 201}),
    ("/api/facets", {"no such field": 1}),
    ("/api/facets", []),
    ("/api/facets", b""),
    ("/api/facets", b"{" * 10_000),
    ("/api/facets", b'{"text": "\xff"}'),
    ("/api/page", {"count": 10**6}),
    ("/api/page", {"count": 0}),
    ("/api/page", {"start": -1}),
    ("/api/page", {"start": 2**70}),
    ("/api/page", {"sort": "image_id; DROP TABLE images"}),
    ("/api/page", {"sort": ["id"]}),
    ("/api/select", {"is_selected": True, "images": list(range(10_001))}),
    ("/api/select", {"is_selected": "yes"}),
    ("/api/save", {"selection": "/etc/passwd"}),
]


@pytest.mark.parametrize(("path", "asked"), HOSTILE, ids=[str(number) for number in range(len(HOSTILE))])
def test_requests_that_are_not_what_the_page_sends_are_refused_in_one_line(
    visitor: Visitor, queries: Queries, path: str, asked: Any
) -> None:
    before = queries.facets(ImageFilter())
    answer = visitor.post(path, asked)
    assert answer.status in (400, 413) and "\n" not in answer.content["error"] and len(answer.content["error"]) < 300
    assert queries.facets(ImageFilter()) == before


@pytest.mark.parametrize(
    "text", ["'", '"', "' OR '1'='1", "%", "\\", "'; DROP TABLE images; --", EVIL, "../", "\u0000", "💥"]
)
def test_texts_are_compared_and_never_run(visitor: Visitor, text: str) -> None:
    paths = [*EVIL_PATHS, *(f"folder/picture {number:04d}.png" for number in range(len(EVIL_PATHS), NUM_IMAGES))]
    answer = visitor.post("/api/page", {"filter": {"text": text}, "count": 120})
    assert answer.status == 200
    assert [card["path"] for card in answer.content["images"]] == [
        path for path in paths if text.lower() in path.lower()
    ]
    found = visitor.get("/api/classes?text=" + "".join(f"%{byte:02x}" for byte in text.encode())).content
    assert found["classes"] == [index for index, name in enumerate(NAMES) if text.lower() in name.lower()]


def test_bodies_are_bounded_whatever_they_say(visitor: Visitor) -> None:
    assert visitor.post("/api/facets", b" " * (MAX_BODY_BYTES + 1)).status == 413
    assert visitor.post("/api/facets", b"{}", **{"Content-Length": "9" * 30}).status in (400, 413)
    assert visitor.post("/api/facets", b"{}", **{"Content-Length": "-1"}).status in (400, 413)
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    port = int(visitor.address.split(":")[2].partition("/")[0])
    head = f"POST /api/facets HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nCookie: {visitor.headers['Cookie']}\r\n"
    head += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(head.encode() + chunk + chunk + b"0\r\n\r\n")
        assert connection.recv(64).startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/assets/../browse.py",
        "/app.js/../guard.py",
        "/browse.py",
        "/thumbnail/../../etc/passwd",
        "/thumbnail/-1",
        "/thumbnail/1e3",
        "/thumbnail/999999999999999999999999",
        "/picture/1;2",
    ],
)
def test_no_path_leads_to_a_file(visitor: Visitor, path: str) -> None:
    assert visitor.get(path).status == 404


def test_pictures_are_encoded_again_and_errors_have_a_reason(visitor: Visitor) -> None:
    for path, side in (("/thumbnail/0", 320), ("/picture/0", 2048)):
        answer = visitor.get(path)
        assert answer.headers["content-type"] == "image/jpeg" and answer.headers["x-content-type-options"] == "nosniff"
        with Image.open(io.BytesIO(answer.body)) as picture:
            assert picture.format == "JPEG" and max(picture.size) <= side
    assert "not an image" in visitor.get("/thumbnail/5").content["error"]
    assert visitor.get(f"/thumbnail/{NUM_IMAGES}").content["error"] == "no such image"


def test_only_images_of_the_named_folder_are_read(tmp_path: Path) -> None:
    """Check that a link out of it, a page that is called a picture, and a pipe give a reason."""
    secret = tmp_path / "secret.png"
    for path in (secret, tmp_path / "photos" / "0.png", tmp_path / "photos" / "1.png"):
        save_image(path)
    (tmp_path / "photos" / "2.png").symlink_to(secret)
    (tmp_path / "photos" / "3.png").write_bytes(b"<svg onload=alert(1)>")
    os.mkfifo(tmp_path / "photos" / "4.png")
    nothing: dict[str, list[Any]] = {"bbox": [], "score": [], "category": []}
    schema = build_schema("detections", [Category(1, "cat")])
    with TableWriter(str(tmp_path / "found"), schema, config_hash="x") as writer:
        writer.write_rows(
            [
                {"image_id": number, "path": str(secret), "width": 40, "height": 30, "detections": nothing}
                for number in range(6)
            ]
        )
    sources = open_sources(BrowseConfig(data=str(tmp_path / "found"), images=str(tmp_path / "photos")))
    pictures = Pictures(sources)
    assert pictures.thumbnail(0) and pictures.picture(1)
    for number, reason in enumerate(("symbolic link", "not an image", "named pipe", "not in the collection"), 2):
        with pytest.raises(PictureError, match=reason):
            pictures.picture(number)


def test_memory_for_pictures_is_bounded() -> None:
    kept = RecentlyUsed[bytes](100)
    for number in range(20):
        kept.put(number, b"x", 30)
        assert kept.get(number) == b"x"
    assert [number for number in range(20) if kept.get(number)] == [17, 18, 19]
    kept.put("large", b"x", 101)
    assert kept.get("large") is None and kept.get(19) is not None


def test_a_selection_is_written_where_the_command_says_and_nowhere_else(visitor: Visitor, folder: Path) -> None:
    before = set(files_below(folder))
    assert visitor.post("/api/save", {}).status == 400
    assert visitor.post("/api/select", {"is_selected": True, "images": [1, 3, 10**6]}).content == {"selected": 2}
    saved = visitor.post("/api/save", {}).content
    assert saved == {"files": [f"{folder}/selection.parquet"], "selected": 2}
    assert {name for name in files_below(folder) if not name.startswith(".")} - before == {"selection.parquet"}
    assert visitor.post("/api/select", {"is_selected": False, "filter": {}}).content == {"selected": 0}


def test_a_port_that_is_taken_is_one_line(visitor: Visitor, folder: Path, queries: Queries) -> None:
    port = int(visitor.address.split(":")[2].partition("/")[0])
    pages = application(open_sources(config_of(folder)), queries, selection=str(folder / "selection"))
    with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is in use"), serving(pages, port):
        pass


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_it_ends_at_once_with_one_line(folder: Path, number: signal.Signals, code: int) -> None:
    command = [sys.executable, "-m", "raydet", "browse", "--data", str(folder / "images")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/[\w-]{43}", line)
        assert found is not None, line
        Visitor(found[0]).enter()
        started = time.monotonic()
        process.send_signal(number)
        rest = process.stdout.read().splitlines() + process.stderr.read().splitlines()
        assert process.wait(30) == code and len(rest) == 1 and "Traceback" not in rest[0]
    print(f"[ended in {time.monotonic() - started:.2f} s]")
