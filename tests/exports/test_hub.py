"""Pushes to a stand-in for the Hub: requests, model card, and the message of each refusal."""

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import ModelCard, close_session, constants
from huggingface_hub.utils import sha

import raydet
from raydet.cli.main import main
from raydet.common.errors import UserError
from raydet.config import EvaluateConfig, PushConfig, ResolvedTrainConfig, to_yaml
from raydet.models.loading import build_detector, load_detector
from raydet.tables.schema import Category

TOKEN = "hf_" + "Secret0123456789abcdefXYZ"
NAMES = ("car|van", "*star_ [x](y)", "<b>`tick`$")
MODEL_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")


@dataclass
class Branch:
    sha: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool
    branches: dict[str, Branch]


@dataclass
class Hub:
    """State of the stand-in and the requests it has received.

    `failures` maps the start of a request's "METHOD path" to the status and message of its answer.
    """

    endpoint: str = ""
    role: str = "write"
    offers_xet: bool = False
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, bytes]] = field(default_factory=list)
    commits: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)

    def save(self, repo: str, folder: Path, branch: str = "main") -> None:
        """Write the files of a branch to a folder, as a download does."""
        for name, content in self.repos[repo].branches[branch].files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    def asked(self, beginning: str) -> list[tuple[str, bytes]]:
        return [item for item in self.requests if item[0].startswith(beginning)]

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, dict[str, Any], dict[str, str]]:
        request = f"{method} {path}"
        self.requests.append((request, body))
        for beginning, (status, said) in self.failures.items():
            if request.startswith(beginning):
                return status, {"error": said}, {}
        if method == "PUT" and path.startswith("/lfs/"):
            # A signed URL: the token must not be sent to the storage behind it.
            assert not token
            self.blobs[path.removeprefix("/lfs/")] = body
            return 200, {}, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"}
        parts = path.strip("/").split("/")
        content = json.loads(body) if body and not path.count("/commit/") else {}
        match parts:
            case ["api", "whoami-v2"]:
                return 200, {"name": "ann", "auth": {"accessToken": {"role": self.role}}}, {}
            case ["api", "validate-yaml"]:
                metadata = _metadata(ModelCard(content["content"]))
                if metadata.get("license") == "no-such-licence":
                    return 400, {"errors": [{"message": '"license" must be one of a list'}], "warnings": []}, {}
                return 200, {"errors": [], "warnings": []}, {}
            case ["api", "repos", "create"]:
                return self._create(content)
            case ["api", "models" | "datasets", owner, name, *rest] if f"{owner}/{name}" in self.repos:
                return self._of_repo(f"{owner}/{name}", [unquote(part) for part in rest], content, body)
            case [*_, "info", "lfs", "objects", "batch"]:
                return 200, self._batch(content), {}
            case ["verify"]:
                assert len(self.blobs[content["oid"]]) == content["size"]
                return 200, {}, {}
        return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}

    def _create(self, content: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        name = f"{content['organization']}/{content['name']}"
        answer = {"url": f"{self.endpoint}/{name}"}
        if name in self.repos:
            return 409, {**answer, "error": "You already created this model repo"}, {}
        main = Branch("0" * 40, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.repos[name] = Repo(content.get("visibility") == "private", {"main": main})
        return 200, answer, {}

    def _of_repo(
        self, name: str, rest: list[str], content: dict[str, Any], body: bytes
    ) -> tuple[int, dict[str, Any], dict[str, str]]:
        repo = self.repos[name]
        match rest:
            case ["branch", branch]:
                if branch in repo.branches:
                    return 409, {"error": "Reference already exists"}, {}
                repo.branches[branch] = dataclasses.replace(repo.branches["main"])
                return 200, {}, {}
            case ["revision", branch]:
                at = repo.branches[branch]
                siblings = [{"rfilename": file} for file in at.files]
                return 200, {"id": name, "sha": at.sha, "private": repo.private, "siblings": siblings}, {}
            case ["xet-write-token", _] if self.offers_xet:
                answer = {"casUrl": f"{self.endpoint}/cas", "exp": 4_000_000_000, "accessToken": "xet"}
                headers = {
                    "casUrl": "X-Xet-Cas-Url",
                    "exp": "X-Xet-Token-Expiration",
                    "accessToken": "X-Xet-Access-Token",
                }
                return 200, answer, {headers[key]: str(value) for key, value in answer.items()}
            case ["preupload", branch]:
                return 200, {"files": [self._preupload(repo.branches[branch], file) for file in content["files"]]}, {}
            case ["commit", branch]:
                return self._commit(name, branch, [json.loads(line) for line in body.splitlines()])
        return 404, {"error": "Not found"}, {}

    def _preupload(self, branch: Branch, file: dict[str, Any]) -> dict[str, Any]:
        is_large, held = file["path"].endswith((".safetensors", ".parquet")), branch.files.get(file["path"])
        answer = {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
        if held is not None:
            answer["oid"] = hashlib.sha256(held).hexdigest() if is_large else sha.git_hash(held)
        return answer

    def _batch(self, content: dict[str, Any]) -> dict[str, Any]:
        objects = []
        for item in content["objects"]:
            actions = {
                "upload": {"href": f"{self.endpoint}/lfs/{item['oid']}?X-Amz-Signature=signed"},
                "verify": {"href": f"{self.endpoint}/verify"},
            }
            objects.append({**item} if item["oid"] in self.blobs else {**item, "actions": actions})
        return {"transfer": "basic", "objects": objects}

    def _commit(
        self, name: str, branch: str, lines: list[dict[str, Any]]
    ) -> tuple[int, dict[str, Any], dict[str, str]]:
        at = self.repos[name].branches[branch]
        header, files = lines[0]["value"], dict(at.files)
        if header.get("parentCommit", at.sha) != at.sha:
            return 412, {"error": "A commit has happened since"}, {}
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.blobs[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        new = hashlib.sha1(json.dumps(lines).encode()).hexdigest()
        self.repos[name].branches[branch] = Branch(new, files)
        self.commits.append((name, branch, {line["value"].get("path", ""): line["key"] for line in lines[1:]}))
        return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/{new}", "commitOid": new}, {}


@contextlib.contextmanager
def _serving(hub: Hub) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            token = self.headers.get("Authorization", "")
            status, content, headers = hub.answer(self.command, urlsplit(self.path).path, token, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Type": "application/json", "Content-Length": len(data)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _respond  # noqa: N815 — the names that http.server calls

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing, because the tests check the output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running stand-in, with the client configured for it and a token."""
    hub = Hub()
    with _serving(hub):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield hub
        close_session()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder that also contains private files."""
    folder = tmp_path_factory.mktemp("model")
    categories = [Category(id=7 + index, name=name) for index, name in enumerate(NAMES)]
    build_detector("rt_detr_v2_tiny", categories, image_size=64, seed=0).save(str(folder))
    for name in ("training_state.pt", "notes.txt", ".env", "optimizer.safetensors"):
        (folder / name).write_text(TOKEN)
    return folder


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    """A run folder with that model as its checkpoint, trained on tables in a private home folder and bucket."""
    folder = tmp_path / "run"
    shutil.copytree(model, folder / "checkpoint")
    config = ResolvedTrainConfig(
        train_data="/home/alice/private/parking-train",
        val_data="s3://AKIAKEY:s3cret@bucket/parking-val?endpoint_override=inner.example",
        out=str(folder),
        model="someone/base-detector",
        epochs=3,
        learning_rate=3e-4,
        augmentation=[{"TemplateTransform": {"templates": "/home/alice/picture.png"}}],
        num_workers=[1, 4],
    )
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "log").mkdir()
    (folder / "log" / "history.json").write_text(json.dumps([_epoch(1, 0.25), _epoch(2, 0.75), _epoch(3, 0.5)]))
    return folder


def _epoch(number: int, value: float) -> dict[str, Any]:
    names = ("AP", "AP50", "AP75", "APs", "APm", "AR1", "AR10", "AR100", "ARs", "ARm")
    numbers = {name: value + index / 1000 for index, name in enumerate(names)}
    by_class = {name: value - index / 100 for index, name in enumerate(NAMES)}
    return {"epoch": number, "loss": 1.0, **numbers, "APl": None, "ARl": None, "AP_by_class": by_class}


def _evaluation(folder: Path, names: tuple[str, ...] = NAMES, **options: Any) -> Path:
    """Write a metrics folder with `raydet evaluate`: one of two boxes of the first class is found, no others."""
    boxes = [(1, 1, [10, 10, 40, 40]), (2, 1, [5, 5, 50, 50]), (2, 2, [60, 60, 20, 20])]
    truth = {
        "images": [{"id": number, "file_name": f"{number}.jpg", "width": 100, "height": 100} for number in (1, 2)],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for number, (image, category, box) in enumerate(boxes, start=1)
        ],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, start=1)],
    }
    found = [{"image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 40], "score": 0.9}]
    folder.mkdir(exist_ok=True)
    (folder / "parking-test.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(found))
    truth_file, results_file = str(folder / "parking-test.json"), str(folder / "results.json")
    out = str(folder / "metrics")
    raydet.evaluate(EvaluateConfig(truth=truth_file, detections=results_file, out=out, bootstrap=20, **options))
    return folder / "metrics"


def _config(run: Path, **options: Any) -> PushConfig:
    return PushConfig(checkpoint=str(run / "checkpoint"), repo="ann/parking_model", **options)


def _card(hub: Hub, branch: str = "main") -> ModelCard:
    return ModelCard(hub.repos["ann/parking_model"].branches[branch].files["README.md"].decode())


def _metadata(card: ModelCard) -> dict[str, Any]:
    """Return the YAML metadata at the head of a card."""
    content: dict[str, Any] = yaml.safe_load(str(card).split("---\n")[1])
    return content


def _metrics(card: ModelCard) -> dict[str, float]:
    (index,) = _metadata(card)["model-index"]
    (result,) = index["results"]
    assert result["task"]["type"] == "object-detection" and index["name"] == "parking_model"
    return {item["type"]: item["value"] for item in result["metrics"]}


def test_one_commit_holds_the_model_and_its_card_and_nothing_else(hub: Hub, run: Path, tmp_path: Path) -> None:
    result = raydet.push(_config(run))
    files = hub.repos["ann/parking_model"].branches["main"].files
    assert set(files) == {*MODEL_FILES, "README.md", ".gitattributes"}
    assert all(files[name] == (run / "checkpoint" / name).read_bytes() for name in MODEL_FILES)
    kinds = {**dict.fromkeys(("README.md", "config.json", "preprocessor_config.json"), "file")}
    assert hub.commits == [("ann/parking_model", "main", {**kinds, "model.safetensors": "lfsFile"})]
    assert not hub.repos["ann/parking_model"].private
    assert (set(result.files), result.already_done) == ({*MODEL_FILES, "README.md"}, False)
    assert result.url == f"{hub.endpoint}/ann/parking_model" and result.url in result.lines()[-1]
    assert not any(TOKEN.encode() in body or TOKEN in request for request, body in hub.requests)
    assert json.loads(files["config.json"])["raydet"]["categories"][0] == {"id": 7, "name": NAMES[0]}
    for name in MODEL_FILES:
        (tmp_path / name).write_bytes(files[name])
    assert [item.id for item in load_detector(str(tmp_path)).categories] == [7, 8, 9]


def test_links_are_not_pushed(hub: Hub, run: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes((run / "checkpoint" / "model.safetensors").read_bytes())
    (run / "checkpoint" / "model.safetensors").unlink()
    (run / "checkpoint" / "model.safetensors").symlink_to(secret)
    with pytest.raises(UserError, match="link"):
        raydet.push(_config(run))
    assert not hub.repos


def test_pushing_again_changes_only_what_is_new(hub: Hub, run: Path) -> None:
    first = raydet.push(_config(run))
    again = raydet.push(_config(run))
    assert again.already_done and again.commit == first.commit and len(hub.commits) == 1
    # Weights of another layout, which could be loaded instead of the new ones.
    main = hub.repos["ann/parking_model"].branches["main"]
    main.files |= {"model-00001-of-00002.safetensors": b"old", "picture.png": b"kept"}
    third = raydet.push(_config(run, license="mit"))
    changes = {"README.md": "file", "model-00001-of-00002.safetensors": "deletedFile"}
    assert hub.commits[1:] == [("ann/parking_model", "main", changes)]
    assert third.commit != first.commit and _metadata(_card(hub))["license"] == "mit"
    assert hub.repos["ann/parking_model"].branches["main"].files["picture.png"] == b"kept"
    assert len(hub.asked("PUT")) == 1


def test_a_branch_and_a_private_repository(hub: Hub, run: Path) -> None:
    result = raydet.push(_config(run, private=True, revision="trial/one"))
    repo = hub.repos["ann/parking_model"]
    assert repo.private and set(repo.branches["main"].files) == {".gitattributes"}
    assert set(MODEL_FILES) < set(repo.branches["trial/one"].files)
    assert result.url.endswith("/ann/parking_model/tree/trial/one")
    assert 'revision="trial/one"' in _card(hub, "trial/one").text
    repo.private = False
    num_commits = len(hub.commits)
    with pytest.raises(UserError, match=r"public.*--private"):
        raydet.push(_config(run, private=True))
    assert len(hub.commits) == num_commits


def test_the_card_tells_of_training(hub: Hub, run: Path) -> None:
    raydet.push(_config(run, license="apache-2.0"))
    card = _card(hub)
    data = _metadata(card)
    assert data["tags"] == ["object-detection", "raydet", "rt_detr_v2"]
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "object-detection")
    assert (data["base_model"], data["license"]) == ("someone/base-detector", "apache-2.0")
    metrics = _metrics(card)
    assert metrics["AP"] == 0.75 and metrics["AP50"] == 0.751 and len(metrics) == 10
    assert "after epoch 2 of 3, the best by AP" in card.text and "| AP | 0.750 | .50:.95 | all | 100 |" in card.text
    assert "| APl | – |" in card.text
    assert "| training | parking-train | – |" in card.text and "| validation | parking-val | – |" in card.text
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)[1])  # type: ignore[index]
    assert (recipe["learning_rate"], recipe["epochs"]) == (3e-4, 3)
    assert recipe["augmentation"] == [{"TemplateTransform": {"templates": "picture.png"}}]
    assert not {"num_workers", "out", "train_data", "model"} & set(recipe)
    for secret in ("alice", "AKIA", "s3cret", "bucket", "inner.example", str(run), str(Path.home())):
        assert secret not in str(card)
    assert "raydet predict --checkpoint ann/parking_model" in card.text


def test_class_names_stay_what_they_are_in_markdown(hub: Hub, run: Path) -> None:
    raydet.push(_config(run))
    text = _card(hub).text
    rows = [r"car\|van", r"\*star\_ \[x\](y)", r"\<b\>\`tick\`\$"]
    assert all(f"| {index} | {name} |" in text for index, name in enumerate(rows))
    assert all(f"| {name} | 0.7" in text for name in rows)


def test_of_several_evaluations_in_a_folder_the_card_takes_the_last_of_this_checkpoint(
    hub: Hub, run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "evaluated"
    _evaluation(folder, run="own", split="own-data", model=str(run / "checkpoint"))
    metrics = _evaluation(folder, ("cat", "dog", "cow"), run="other", split="other-data", model="other")
    raydet.push(_config(run, metrics=str(metrics)))
    assert "on own-data, 2 images." in _card(hub).text and "other-data" not in _card(hub).text


def test_the_card_tells_of_an_evaluation(hub: Hub, run: Path, tmp_path: Path) -> None:
    metrics = _evaluation(tmp_path / "evaluated")
    raydet.push(_config(run, metrics=str(metrics)))
    card = _card(hub)
    numbers = _metrics(card)
    # One of two boxes of the first class is found, none of the second; the third has no boxes.
    assert numbers["AR100"] == 0.25 and numbers["AP"] == pytest.approx((51 / 101 + 0) / 2)
    assert "Measured with `raydet evaluate` on parking-test, 2 images." in card.text
    assert "| evaluation | parking-test | 2 |" in card.text
    assert r"| car\|van | 0.505 | 0.505 |" in card.text and "after epoch" not in card.text
    assert str(tmp_path) not in str(card)


def test_a_lone_checkpoint_has_a_card_too(hub: Hub, model: Path) -> None:
    raydet.push(PushConfig(checkpoint=str(model), repo="ann/parking_model"))
    card = _card(hub)
    assert "Not measured." in card.text and "## Recipe" not in card.text and "## Data" not in card.text
    assert not {"model-index", "base_model", "license", "model_name"} & set(_metadata(card))


def test_the_newest_checkpoint_has_the_newest_numbers(hub: Hub, run: Path) -> None:
    (run / "checkpoint").rename(run / "last")
    raydet.push(PushConfig(checkpoint=str(run / "last"), repo="ann/parking_model"))
    assert _metrics(_card(hub))["AP"] == 0.5 and "after epoch 3 of 3" in _card(hub).text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo": "parking"}, "--repo .*parking"),
        ({"repo": "https://huggingface.co/ann/parking"}, "--repo .*https://huggingface.co/ann/parking"),
        ({"repo": "ann/no good"}, "--repo .*ann/no good"),
        ({"checkpoint": "absent"}, "absent"),
        ({"checkpoint": "tests"}, r"tests.*config\.json"),
        ({"revision": "a..b"}, r"--revision .*a\.\.b"),
        ({"license": "Apache 2"}, "--license .*Apache 2"),
        ({"metrics": "tests"}, "--metrics tests .*`raydet evaluate`"),
        ({"metrics": "OTHER"}, "--metrics .*evaluate.* cat, dog"),
    ],
)
def test_mistakes_are_told_before_the_hub_is_asked(
    options: dict[str, Any], message: str, hub: Hub, model: Path, tmp_path: Path
) -> None:
    if options.get("metrics") == "OTHER":
        options = {"metrics": str(_evaluation(tmp_path / "evaluated", ("cat", "dog")))}
    with pytest.raises(UserError, match=message) as caught:
        raydet.push(PushConfig(**{"checkpoint": str(model), "repo": "ann/parking_model", **options}))
    assert "\n" not in str(caught.value)
    assert hub.requests == []


def test_without_a_token_it_says_how_to_get_one(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"token.*HF_TOKEN.*hf auth login"):
        raydet.push(_config(run))
    assert hub.requests == []


@pytest.mark.parametrize(
    ("request_", "status", "said", "message"),
    [
        ("GET /api/whoami-v2", 401, "Invalid token", "the token: set HF_TOKEN"),
        ("POST /api/repos/create", 403, "You don't have the rights", "write access to ann/parking_model"),
        ("POST /api/repos/create", 500, "Internal error", "status 500"),
        ("POST /api/repos/create", 404, "No such namespace", "ann/parking_model does not exist"),
        ("POST /api/repos/create", 402, "Payment required", "status 402 (Payment required)"),
        ("GET /api/models/ann/parking_model/xet-write-token", 403, "Quota", "write access"),
        ("PUT /lfs", 403, f"bad signature for {TOKEN}", "(bad signature for (token))"),
        ("POST /api/models/ann/parking_model/commit", 409, "A commit has happened since", "changed on the Hub"),
        ("POST /api/models/ann/parking_model/commit", 500, f"two\nlines, {TOKEN}", "(two lines, (token))"),
        ("POST /api/models/ann/parking_model/commit", 413, "Storage limit reached", "(Storage limit reached)"),
    ],
)
def test_a_refusal_is_one_line_without_secrets(
    request_: str, status: int, said: str, message: str, hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.failures[request_] = (status, said)
    code = main(["push", "--checkpoint", str(run / "checkpoint"), "--repo", "ann/parking_model"])
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert message in captured.err and captured.err.startswith("raydet: error: ") and captured.err.count("\n") == 1
    assert TOKEN not in captured.err and "signed" not in captured.err
    assert hub.commits == []


def test_a_token_that_only_reads_and_a_card_that_the_hub_refuses_make_no_repository(hub: Hub, run: Path) -> None:
    with pytest.raises(UserError, match='"license" must be one of a list'):
        raydet.push(_config(run, license="no-such-licence"))
    hub.role = "read"
    with pytest.raises(UserError, match="read access"):
        raydet.push(_config(run))
    assert hub.repos == {}


def test_a_hub_that_is_not_there(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_port
    monkeypatch.setenv("HF_ENDPOINT", f"http://name:password@127.0.0.1:{port}")
    with pytest.raises(UserError, match=r"cannot reach the Hugging Face Hub at 127\.0\.0\.1") as caught:
        raydet.push(_config(run))
    assert "password" not in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        raydet.push(_config(run))


def test_xet_is_used_only_where_it_is_offered(hub: Hub, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    raydet.push(_config(run))
    batches = "POST /ann/parking_model.git/info/lfs"
    assert len(hub.asked(batches)) == 1 and not any("/cas/" in request for request, _ in hub.requests)
    hub.offers_xet = True
    # The stand-in has no xet storage, so the push fails; the test checks the requests up to then.
    with pytest.raises(UserError) as caught:
        raydet.push(PushConfig(checkpoint=str(run / "checkpoint"), repo="ann/another"))
    assert len(hub.asked(batches)) == 1 and any("/cas/" in request for request, _ in hub.requests)
    assert "\n" not in str(caught.value) and len(hub.commits) == 1
    assert capfd.readouterr().err == ""


def test_the_command_in_a_process_of_its_own(hub: Hub, run: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "raydet", "push", "--checkpoint", str(run / "checkpoint")]
    done = subprocess.run(
        [*command, "--repo", "ann/parking_model"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"model: {hub.endpoint}/ann/parking_model"
    assert TOKEN not in done.stdout and len(hub.commits) == 1
    left = [path for path in (tmp_path / "hf").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in left)
