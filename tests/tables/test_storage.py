"""Reads and writes through `storage` survive temporary server failures, on a stand-in for S3."""

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydet.common.errors import UserError
from raydet.tables import storage
from tests.s3_stand_in import BUCKET, Failure, StandIn, started

PART_BYTES = 10 * 2**20
"""Part size of an upload; larger files are uploaded in several parts."""


@pytest.fixture(scope="module")
def stand_in() -> Iterator[StandIn]:
    with started() as server:
        yield server


@pytest.fixture
def server(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in.use(monkeypatch)
    yield stand_in
    stand_in.fail("503", 0)


def _read_row_group(uri: str) -> list[int]:
    filesystem, path = storage.resolve(uri)
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        column: list[int] = file.read_row_group(3)["n"].to_pylist()
    return column


# Without raydet's retry settings the client gives up after six seconds.
@pytest.mark.parametrize(("failure", "seconds"), [("503", 8.0), ("drop", 2.0)])
def test_whatever_is_done_outlasts_a_server_that_fails(server: StandIn, failure: Failure, seconds: float) -> None:
    storage.write_bytes(f"{BUCKET}/in/bytes", b"0123456789")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": np.arange(50_000)}), sink, row_group_size=10_000, compression=None)
    storage.write_bytes(f"{BUCKET}/in/table.parquet", sink.getvalue().to_pybytes())
    large = np.arange(PART_BYTES // 7).tobytes()
    server.fail(failure, seconds)
    with ThreadPoolExecutor(6) as pool:
        done: list[Future[Any]] = [
            pool.submit(lambda: storage.read_bytes(f"{BUCKET}/in/bytes")),
            pool.submit(lambda: storage.read_range(f"{BUCKET}/in/bytes", 4, 3)),
            pool.submit(lambda: storage.list_files(f"{BUCKET}/in")),
            pool.submit(lambda: _read_row_group(f"{BUCKET}/in/table.parquet")),
            pool.submit(lambda: storage.write_bytes(f"{BUCKET}/out/small", b"small")),
            pool.submit(lambda: storage.write_bytes(f"{BUCKET}/out/large", large)),
        ]
    assert server.num_refused > 0
    assert [future.result() for future in done] == [
        b"0123456789",
        b"456",
        ["bytes", "table.parquet"],
        list(range(30_000, 40_000)),
        None,
        None,
    ]
    assert storage.read_bytes(f"{BUCKET}/out/small") == b"small"
    assert storage.read_bytes(f"{BUCKET}/out/large") == large


def test_many_readers_outlast_it_together(server: StandIn) -> None:
    storage.write_bytes(f"{BUCKET}/in/bytes", b"0123456789")
    filesystem, path = storage.resolve(f"{BUCKET}/in/bytes")
    server.fail("503", 3.5)
    with ThreadPoolExecutor(100) as pool:
        contents = list(pool.map(lambda _: filesystem.open_input_file(path).read(), range(100)))
    assert contents == [b"0123456789"] * 100
    # More than the shared retry budget of the client's "standard" strategy.
    assert server.num_refused > 500 / 5


def test_a_dead_server_ends_in_an_error_within_about_a_minute(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 45 < sum(0.025 * 2**attempt for attempt in range(storage.S3_ATTEMPTS)) < 65
    monkeypatch.setattr(storage, "S3_ATTEMPTS", 3)
    server.fail("503", 100)
    with pytest.raises(OSError, match="503"):
        storage.read_bytes(f"{BUCKET}/in/bytes")
    assert server.num_refused == 4
    with pytest.raises(OSError, match="SLOW_DOWN"):
        storage.write_bytes(f"{BUCKET}/dead", b"x")
    server.fail("503", 0)
    assert not storage.exists(f"{BUCKET}/dead")


def test_what_is_absent_or_forbidden_is_said_at_once(server: StandIn, tmp_path: Path) -> None:
    started = time.monotonic()
    for uri in (f"{BUCKET}/absent", str(tmp_path / "absent")):
        with pytest.raises(FileNotFoundError):
            storage.read_bytes(uri)
        with pytest.raises(FileNotFoundError):
            storage.read_range(uri, 0, 1)
    server.fail("403", 100)
    with pytest.raises(OSError, match=r"ACCESS_DENIED|403"):
        storage.read_bytes(f"{BUCKET}/in/bytes")
    assert server.num_refused == 1
    assert time.monotonic() - started < 6


def test_an_upload_that_is_killed_leaves_what_was_there(server: StandIn) -> None:
    storage.write_bytes(f"{BUCKET}/kill/old", b"old")
    script = (
        "import sys, threading\n"
        "from raydet.tables import storage\n"
        f"write = lambda name: storage.write_bytes('{BUCKET}/kill/' + name, bytes({PART_BYTES + 1}))\n"
        "threads = [threading.Thread(target=write, args=(name,)) for name in ('old', 'new')]\n"
        "[thread.start() for thread in threads]\n"
    )
    server.fail("hang", 100, only="partNumber=2")
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 30
    while server.num_refused < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.num_refused >= 2
    process.kill()
    process.wait()
    server.fail("503", 0)
    assert storage.list_files(f"{BUCKET}/kill") == ["old"]
    assert storage.read_bytes(f"{BUCKET}/kill/old") == b"old"


def test_an_upload_that_is_interrupted_leaves_no_object(server: StandIn) -> None:
    with pytest.raises(TypeError):
        storage.write_bytes(f"{BUCKET}/interrupted", cast(bytes, "no bytes"))
    assert not storage.exists(f"{BUCKET}/interrupted")


def test_options_in_the_uri_keep_their_meaning(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{BUCKET}/in/bytes", b"0123456789")
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    options = f"endpoint_override=127.0.0.1:{server.server.port}&scheme=http&region=us-east-1"
    for more in ("", "&tls_verify_certificates=false"):
        assert storage.read_bytes(f"s3://key:secret@runs/in/bytes?{options}{more}") == b"0123456789"


@pytest.mark.parametrize(
    ("query", "limit_s"),
    [("", storage.GCS_RETRY_S), ("?scheme=http", storage.GCS_RETRY_S), ("?retry_limit_seconds=5", 5)],
)
def test_google_cloud_storage_is_asked_for_a_minute_unless_the_uri_says_otherwise(query: str, limit_s: int) -> None:
    filesystem, path = storage.resolve(f"gs://anonymous@bucket/file{query}")
    _, (options,) = filesystem.__reduce__()[:2]
    assert (path, options["retry_time_limit"].total_seconds()) == ("bucket/file", limit_s)


@pytest.mark.parametrize(
    "uri", ["s3://", "gs:///", "s3://?region=eu-west-1", "ftp://host/out", "://", "gopher://host/x"]
)
def test_a_uri_that_names_no_place_is_refused(uri: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"names no bucket|cannot open"):
        storage.resolve(uri)
    assert capfd.readouterr().err == ""


def test_a_part_of_a_local_file(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "file"), b"0123456789")
    assert storage.read_range(str(tmp_path / "file"), 8, 5) == b"89"
