"""The edge of the command line: one harmless line and the right exit code for every exception."""

import errno
import http.server
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from raydet.cli import main as cli
from raydet.cli.failures import TRACEBACK_VARIABLE, lines_of
from raydet.cli.reachable import check_reachable
from raydet.common import probing
from raydet.common.errors import RunError, UserError, printable
from raydet.config import EvaluateConfig, PrepareHubConfig, PushConfig


@pytest.mark.parametrize(
    ("error", "code", "fact"),
    [
        (UserError("a\nb"), 2, "a b"),
        (RunError("x"), 1, "x"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a"), 1, "No space left"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "/a"), 1, "Read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), 1, "/a"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/a"), 2, "too long"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/a"), 2, "/a"),
        (OSError("the store does not answer"), 1, "does not answer"),
        (MemoryError(), 1, "out of memory"),
        (ValueError("embedded null byte"), 2, "NUL"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates"), 2, "Unicode"),
        (RecursionError("too deep"), 1, "RecursionError"),
        (KeyError("x"), 1, TRACEBACK_VARIABLE),
        (UserError("s3://key:pa/ss@bucket/x?token=1"), 2, "s3://bucket/x"),
        (UserError("x" * 100_000), 2, "…"),
    ],
    ids=str,
)
def test_every_exception_is_one_line(error: Exception, code: int, fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    (line,), found = lines_of(error)
    assert found == code and fact in line and line.startswith("raydet: error: ")
    assert "\n" not in line and len(line) <= 2000


def test_a_long_name_keeps_its_start_and_end_and_the_advice_stays() -> None:
    name = f"/data/{'n' * 5_000}.png"
    (line,), _ = lines_of(UserError(f"no such file: {name}; check --images {'1, ' * 5_000}and run it again"))
    assert line.startswith("raydet: error: no such file: /data/nnn") and line.endswith("1, and run it again")
    assert "n.png; check --images 1, 1, " in line and len(line) <= 2000


def test_the_traceback_is_there_for_those_who_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACEBACK_VARIABLE, "1")
    lines, _ = lines_of(KeyError("x"))
    assert "KeyError" in lines[0] and len(lines) == 2


@pytest.mark.parametrize(
    "text", ["\x1b[31mred", "\x9b1m", "\x07", "a\rb", "\u202egnp.exe", "\u2066x", "\u200b", "\u2028", "\ud800", "\x7f"]
)
def test_no_control_or_bidirectional_character_reaches_the_terminal(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = printable(text)
    assert shown != text and shown.isprintable()
    assert cli.main([f"train{text}"]) == 2
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1 and captured.strip().isprintable()


def test_ordinary_text_stays_as_it_is() -> None:
    text = "Zebra – 斑馬 – חמור – AP₅₀\n\tx"
    assert printable(text) == text


# Stores.


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.fixture
def closed() -> int:
    """A port on which nobody listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
    return port


@pytest.fixture
def refusing() -> Iterator[int]:
    """The port of a server that answers every request with 403, as a store without credentials does."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(403)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def _config(scheme: str, port: int) -> EvaluateConfig:
    uri = f"{scheme}://key:secret@bucket/x?endpoint_override=127.0.0.1:{port}&scheme=http"
    return EvaluateConfig(truth=uri, detections=uri)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_store_on_which_nobody_listens_is_told_at_once(scheme: str, closed: int) -> None:
    with pytest.raises(RunError, match=r"cannot be reached.*refused") as caught:
        check_reachable(_config(scheme, closed))
    lines, code = lines_of(caught.value)
    assert code == 1 and "secret" not in lines[-1]


def test_a_store_that_never_answers_is_told_within_its_time(silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probing.TIMEOUT_S <= 15
    monkeypatch.setattr(probing, "TIMEOUT_S", 0.5)
    with pytest.raises(RunError, match="cannot be reached"):
        check_reachable(_config("s3", silent))


def test_a_hub_that_does_not_answer_is_told_within_its_time(
    silent: int, closed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raydet.models.checkpoints import read_checkpoint

    monkeypatch.setattr(probing, "TIMEOUT_S", 0.5)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for port in (silent, closed):
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        for config in (PushConfig(checkpoint="x", repo="a/b"), PrepareHubConfig(dataset="a/b", out="x")):
            with pytest.raises(RunError, match="cannot reach the Hugging Face Hub"):
                check_reachable(config)
        with pytest.raises(RunError, match="cannot reach the Hugging Face Hub"):
            read_checkpoint("nobody/nothing")


def test_a_store_that_refuses_is_reachable_and_other_places_are_not_asked(refusing: int, closed: int) -> None:
    check_reachable(_config("s3", refusing))
    check_reachable(EvaluateConfig(truth=f"http://127.0.0.1:{closed}/x", detections="/nowhere"))
    check_reachable(EvaluateConfig(truth="file:///nowhere", detections="memory://x"))
