"""The guarantees of SECURITY.md: loopback only, no secrets in files, no execution of foreign code."""

import ast
import dataclasses
import io
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import raydet
from raydet.cli.main import main
from raydet.common.errors import UserError
from raydet.common.redaction import refuse_password, without_secrets
from raydet.config import PredictConfig, PrepareVocConfig, TrainConfig, identity, to_yaml
from raydet.images.collection import open_collection
from raydet.images.files import ImageFolder, ReadError
from raydet.images.references import FileReader, Reference
from raydet.preparation.sources.images import read_images
from raydet.preparation.sources.voc import read_voc
from raydet.preparation.sources.yolo import read_yolo
from raydet.preparation.sources.yolo_files import find_in_data_yaml, find_in_folders
from raydet.tables import storage
from raydet.tables.output_folder import RUN_FILE, OutputFolder
from tests import s3_stand_in

PROJECT = Path(__file__).parents[1]
HTTPS = "https://host/a.jpg"
XML = "<annotation><object><name>dog</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>4</ymax></bndbox>\
</object></annotation>"


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 12, 3), 99, np.uint8)).save(path)


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


# Secrets.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://key:pass@bucket/x", "s3://bucket/x"),
        ("https://user@host/x and https://u:p@host/y", "https://host/x and https://host/y"),
        (
            f"{HTTPS}?X-Amz-Credential=A&X-Amz-Signature=b&part=2",
            HTTPS,
        ),
        (f"see {HTTPS}?sv=1&sig=abc#part.", f"see {HTTPS}."),
        ("s3://key:p?a#s/s@w@bucket/x?region=eu&token=t", "s3://bucket/x?region=eu"),
        ("postgresql://u:p?w#d@x/9@db:5432/runs", "postgresql://db:5432/runs"),
        ("s3://a:b@c/x,s3://d/e?k=1", "s3://c/x,s3://d/e"),
        ("Server=x;Password=hello", "Server=x;Password=***"),
        ('cannot open "gs://u:p@b/c", "gs://b?access_token=t"', 'cannot open "gs://b/c", "gs://b"'),
        ("hf_" + "a1B2" * 6, "***"),
        ("AKIA" + "ABCD" * 4, "***"),
        # Not secrets.
        ("abfss://container@account.dfs.core.windows.net/x", "abfss://container@account.dfs.core.windows.net/x"),
        ("hdfs://user@host/x", "hdfs://user@host/x"),
        ("https://host:8080/a@b.jpg", "https://host:8080/a@b.jpg"),
        ("runs/hf_finetuned_on_many_images", "runs/hf_finetuned_on_many_images"),
        ("a@b.c: 10:30, user:pass@host", "a@b.c: 10:30, user:pass@host"),
    ],
)
def test_secrets_are_taken_out_of_texts(text: str, expected: str) -> None:
    assert without_secrets(text) == expected
    assert without_secrets(without_secrets(text)) == expected


def test_the_values_of_secret_variables_are_hidden_and_their_places_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/someone")
    monkeypatch.setenv("MY_PASSWORD", "short")
    text = "token 0123456789abcdef at /home/someone, short"
    assert without_secrets({"line": [text], "password": "p"}) == {
        "line": ["token *** at /home/someone, short"],
        "password": "***",
    }


def test_a_config_is_written_without_secrets_and_known_again(tmp_path: Path) -> None:
    def config(user: str) -> TrainConfig:
        return TrainConfig(train_data=f"s3://{user}b/train", val_data=f"s3://{user}b/val?sig={user}", out="run")

    first, rotated = config("akid:first@"), config("akid:second@")
    text = to_yaml(first)
    assert "first" not in text and "akid" not in text and "s3://b/train" in text
    folder = OutputFolder(str(tmp_path), "train")
    folder.begin(identity(first))
    assert "first" not in folder.read_bytes(RUN_FILE).decode()
    assert folder.admit(identity(rotated)) is not None
    other = TrainConfig(train_data="s3://c/train", val_data="s3://b/val?sig=x", out="run")
    with pytest.raises(UserError, match=r"--train-data.*s3://b/train.*s3://c/train"):
        folder.admit(identity(other))


def test_a_password_that_would_have_to_be_kept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.*password.*s3://bucket/x") as caught:
        refuse_password("s3://key:pass@bucket/x", what="data")
    assert "pass@" not in str(caught.value)
    refuse_password("abfss://container@account.dfs.core.windows.net/x", what="data")
    (tmp_path / "list.txt").write_text("a.jpg\ns3://key:pass@bucket/b.jpg\n")
    picture(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"line 2 .*password"):
        open_collection(str(tmp_path / "list.txt"), index_uri=None)


def test_an_error_is_printed_without_secrets(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    uri = "nosuchscheme://user:hunter22@host/x"
    code = main(["predict", "--checkpoint", uri, "--data", uri, "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert code == 2 and "nosuchscheme" in captured.err
    assert "hunter22" not in captured.err + captured.out


SECRETS = {
    "HF_TOKEN": "hf_" + "Qw3rTy" * 6,
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret/key",
    "AWS_SESSION_TOKEN": "planted-session-token",
    "RAY_AUTH_TOKEN": "ab12" * 16,
    "WANDB_API_KEY": "planted-wandb-key",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-password",
}
PASSWORD = "planted-in-the-uri"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_secret_is_in_any_file_that_a_run_leaves(tmp_path: Path, shapes: Path) -> None:
    out, data = tmp_path / "out", tmp_path / "data"
    with s3_stand_in.started() as stand_in:
        place = f"?endpoint_override=127.0.0.1:{stand_in.server.port}&scheme=http&region=us-east-1"
        signed = f"s3://key:{PASSWORD}@runs/shapes/{{}}{place}"
        environment = {**os.environ, **stand_in.environment, **SECRETS, "PYTHONFAULTHANDLER": "1"}
        for split in ("train", "val"):
            storage.publish_folder(str(shapes / split), signed.format(split))
        tiny = ["--model=rt_detr_v2_tiny", "--image-size=64", "--batch-size=8", "--epochs=1", "--trackers=[mlflow]"]
        commands = [
            [
                "train",
                f"--train-data={signed.format('train')}",
                f"--val-data={signed.format('val')}",
                f"--out={out}/run",
            ],
            ["predict", f"--checkpoint={out}/run/checkpoint", f"--data={signed.format('val')}", f"--out={out}/found"],
            ["evaluate", f"--truth={signed.format('val')}", f"--detections={out}/found", f"--out={out}/metrics"],
            ["report", f"--metrics={out}/metrics", f"--out={out}/report.html"],
            ["evaluate", f"--truth={signed.format('none')}", f"--detections={out}/found"],
        ]
        commands[0] += tiny
        printed = []
        for command in commands:
            done = subprocess.run(
                [sys.executable, "-m", "raydet", *command],
                env=environment,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == (2 if "none" in command[1] else 0), f"{command}\n{done.stdout}\n{done.stderr}"
            printed.append(done.stdout + done.stderr)
    written = [path for folder in (out, data) for path in folder.rglob("*") if path.is_file()]
    assert {"config.yaml", ".run.json", ".job.json", "report.html", "meta.yaml"} <= {path.name for path in written}
    planted = [secret.encode() for secret in (*SECRETS.values(), PASSWORD)]
    leaks = [(str(path), secret) for path in written for secret in planted if secret in path.read_bytes()]
    leaks += [("the console", secret) for secret in planted if secret.decode() in "".join(printed)]
    assert leaks == []


# Hostile files.


def test_folders_do_not_lead_out_through_links(tmp_path: Path) -> None:
    picture(tmp_path / "outside" / "secret.png")
    picture(tmp_path / "images" / "a.png")
    link(tmp_path / "images" / "b.png", tmp_path / "outside" / "secret.png")
    link(tmp_path / "images" / "c", tmp_path / "outside")
    link(tmp_path / "images" / "d.png", tmp_path / "images" / "a.png")
    link(tmp_path / "way", tmp_path / "images")
    for folder in ("images", "way"):  # a link named by the user is followed
        refusals = {item.path: item.refusal for item in read_images(ImageFolder(str(tmp_path / folder))).images}
        refused = [path for path, refusal in refusals.items() if refusal is not None]
        assert refused == ["b.png", "c"]
        assert "symbolic link" in str(refusals["b.png"])
        rows = list(open_collection(str(tmp_path / folder), index_uri=None).read(0, 4))
        assert [row.path for row in rows if row.data is None] == refused
        assert all("--allow-root" in str(row.error) for row in rows if row.data is None)
        allowed = [str(tmp_path / "outside")]
        folder_allowed = ImageFolder(str(tmp_path / folder), allow_root=allowed)
        assert [item.refusal for item in read_images(folder_allowed).images] == [None] * 4
        rows = list(open_collection(str(tmp_path / folder), index_uri=None, allow_root=allowed).read(0, 4))
        assert [row.path for row in rows if row.data] == ["a.png", "b.png", "c/secret.png", "d.png"]


def test_voc_does_not_lead_out(tmp_path: Path) -> None:
    picture(tmp_path / "outside" / "secret.png")
    (tmp_path / "outside" / "secret.xml").write_text(XML)
    for name in ("a", "c"):
        picture(tmp_path / "img" / f"{name}.png")
    link(tmp_path / "img" / "b.png", tmp_path / "outside" / "secret.png")
    (tmp_path / "xml").mkdir()
    for name in ("a", "b"):
        (tmp_path / "xml" / f"{name}.xml").write_text(XML)
    link(tmp_path / "xml" / "c.xml", tmp_path / "outside" / "secret.xml")
    (tmp_path / "split.txt").write_text(f"a\nb\nc\n../outside/secret\n{tmp_path}/outside/secret\n")
    config = PrepareVocConfig(annotations=str(tmp_path / "xml"), images=str(tmp_path / "img"), out="unused")
    for split in (None, str(tmp_path / "split.txt")):
        source = read_voc(dataclasses.replace(config, split=split), ImageFolder(config.images))
        records = {item.path: item for item in source.images}
        accepted = [path for path, item in records.items() if item.refusal is None]
        assert accepted == ["a.png"]
        assert "symbolic link" in str(records["b.png"].refusal)
        assert "its XML file: " in str(records["c.png"].refusal) and "symbolic link" in str(records["c.png"].refusal)
        assert records["c.png"].objects is not None and records["c.png"].objects.ids == []
        assert len(records) == (3 if split is None else 5)


def test_yolo_does_not_lead_out(tmp_path: Path) -> None:
    picture(tmp_path / "outside" / "secret.png")
    (tmp_path / "outside" / "secret.txt").write_text("0 .5 .5 .1 .1\n")
    for name in ("a", "c"):
        picture(tmp_path / "set" / "images" / f"{name}.png")
    link(tmp_path / "set" / "images" / "b.png", tmp_path / "outside" / "secret.png")
    labels = tmp_path / "set" / "labels"
    labels.mkdir()
    for name in ("a", "b"):
        (labels / f"{name}.txt").write_text("0 .5 .5 .1 .1\n")
    link(labels / "c.txt", tmp_path / "outside" / "secret.txt")
    source = read_yolo(find_in_folders(str(tmp_path / "set" / "images"), str(labels), ["dog"]))
    refusals = [str(item.refusal) for item in source.images]
    assert refusals[0] == "None" and "symbolic link" in refusals[1]
    assert refusals[2].startswith("its label file: ") and "symbolic link" in refusals[2]


def test_a_yolo_list_does_not_lead_out(tmp_path: Path) -> None:
    picture(tmp_path / "outside" / "secret.png")
    picture(tmp_path / "set" / "images" / "a.png")
    (tmp_path / "set" / "labels").mkdir()
    (tmp_path / "set" / "labels" / "a.txt").write_text("0 .5 .5 .1 .1\n")
    (tmp_path / "set" / "data.yaml").write_text("train: list.txt\nnames: [dog]\n")
    inside = [f"{tmp_path}/set/images/a.png"]
    outside = ["../outside/secret.png", f"{tmp_path}/outside/secret.png", f"{tmp_path}/set/../outside/secret.png"]
    (tmp_path / "set" / "list.txt").write_text("\n".join(inside + outside + ["/etc/secret.png"]))
    source = read_yolo(find_in_data_yaml(str(tmp_path / "set" / "data.yaml"), "train"))
    records = list(source.images)
    assert source.num_images == len(records) == 3
    assert [item.path for item in records] == ["a.png", "/etc/secret.png", f"{tmp_path}/outside/secret.png"]
    assert [item.refusal is None for item in records] == [True, False, False]
    assert all("outside the data set" in str(item.refusal) for item in records[1:])
    (tmp_path / "set" / "list.txt").write_text("\n".join(outside))
    with pytest.raises(UserError, match=r"train.*secret\.png.*outside"):
        find_in_data_yaml(str(tmp_path / "set" / "data.yaml"), "train")


def test_members_of_tar_files_with_names_that_lead_out_are_not_read(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    names = ["a.png", "./b.png", "../c.png", "/etc/d.png", "sub/../../e.png"]
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, kind, target in (("f.png", tarfile.SYMTYPE, "/etc/passwd"), ("g.png", tarfile.LNKTYPE, "a.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    rows = list(open_collection(str(tmp_path / "shard.tar"), index_uri=None).read(0, 5))
    assert [(row.path, row.data == data) for row in rows] == [
        ("shard.tar/a.png", True),
        ("shard.tar/b.png", True),
        ("shard.tar/../c.png", False),
        ("shard.tar//etc/d.png", False),
        ("shard.tar/sub/../../e.png", False),
    ]
    assert all(row.error and "file name" in row.error for row in rows if row.data is None)


def test_labels_and_pictures_are_never_written_outside_of_the_output(tmp_path: Path) -> None:
    from raydet.config import ExportYoloConfig
    from raydet.tables.schema import Category, build_schema
    from raydet.tables.table import TableWriter

    picture(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    objects = {"id": [1], "bbox": [[1.0, 1.0, 4.0, 4.0]], "category": [0], "area": [16.0], "iscrowd": [False]}
    paths = ["../../evil.png", "/abs/evil.png", "..", "a/../../../evil.png"]
    schema = build_schema("images", (Category(1, "dog"),))
    with TableWriter(str(tmp_path / "table"), schema, config_hash="x") as writer:
        for number, path in enumerate(paths):
            image = {"bytes": data, "path": path}
            writer.write_rows([{"image_id": number, "image": image, "width": 12, "height": 8, "objects": objects}])
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    raydet.export_yolo(ExportYoloConfig(data=str(tmp_path / "table"), out=str(tmp_path / "deep" / "er" / "out")))
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert len([path for path in written if path.suffix == ".txt"]) == len(paths)
    assert all(path.is_relative_to(tmp_path / "deep" / "er" / "out") for path in written)


def test_a_file_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    huge = tmp_path / "huge.jpg"
    with huge.open("wb") as file:
        file.truncate(2**30 + 1)  # sparse: uses no disk space
    with pytest.raises(ReadError, match=r"1,074 MB"):
        ImageFolder(str(tmp_path)).read("huge.jpg")
    with pytest.raises(ReadError, match=r"1,074 MB"):
        FileReader().read(Reference(str(huge)))


# Hostile models.

_HOSTILE = "from pathlib import Path\nPath({marker!r}).touch()\nclass Hostile: ...\n"
_SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
_TINY = {
    "yolos": {**_SIZES, "image_size": [32, 32], "num_detection_tokens": 4},
    "owlvit": {"text_config": _SIZES, "vision_config": {**_SIZES, "image_size": 64}, "projection_dim": 8},
}


def hostile_folder(folder: Path, marker: Path, *, model_type: str) -> str:
    """Write a model folder that requests the execution of its own code."""
    folder.mkdir()
    (folder / "hostile.py").write_text(_HOSTILE.format(marker=str(marker)))
    names = ("AutoConfig", "AutoModelForObjectDetection", "AutoModelForZeroShotObjectDetection", "AutoProcessor")
    auto_map = dict.fromkeys((*names, "AutoImageProcessor", "AutoTokenizer"), "hostile.Hostile")
    content = {"model_type": model_type, "auto_map": auto_map, "id2label": {"0": "dog"}, **_TINY.get(model_type, {})}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "preprocessor_config.json").write_text(json.dumps({"auto_map": auto_map}))
    header = b'{"__metadata__":{"format":"pt"}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return str(folder)


@pytest.mark.parametrize("model_type", ["hostile", "yolos", "owlvit"])
def test_code_in_a_model_folder_is_not_run(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shapes: Path
) -> None:
    marker = tmp_path / "was-run"
    folder = hostile_folder(tmp_path / "model", marker, model_type=model_type)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # answers to the question of transformers
    if model_type == "hostile":
        from raydet.models.loading import load_detector

        commands = [["predict", "--checkpoint", folder, "--data", str(shapes / "val"), "--out", str(tmp_path / "out")]]
        commands += [["predict", "--model", folder, "--labels", "dog", *commands[0][3:]]]
        for command in commands:
            assert main(command) == 2
            assert capsys.readouterr().err.count("\n") == 1
        with pytest.raises(UserError) as caught:
            load_detector(folder)
        assert "\n" not in str(caught.value)
    elif model_type == "owlvit":
        from raydet.engines.zero_shot_models.loading import load_model

        with pytest.raises(UserError, match="zero-shot model"):
            load_model(folder)
    else:  # a known model type: transformers runs its own code, not that of the folder
        from raydet.models.loading import build_detector, load_detector
        from raydet.tables.schema import Category

        detector = build_detector(folder, [Category(1, "dog")], image_size=64, seed=0)
        assert type(detector.model).__module__.startswith("transformers.")
        with pytest.raises(UserError, match="weights"):  # it has none
            load_detector(folder)
    assert not marker.exists()


def test_weights_that_are_no_safetensors_are_not_read(tmp_path: Path) -> None:
    import torch

    from raydet.models.loading import load_detector

    folder = Path(hostile_folder(tmp_path / "model", tmp_path / "was-run", model_type="yolos"))
    (folder / "model.safetensors").unlink()
    torch.save({"weights": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="model"):
        load_detector(str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": "facebook/dinov2-small", "backbone_config": None, "use_timm_backbone": False},
        {"attn_implementation": "someone/evil-kernels"},
        {"_attn_implementation": "someone/evil-kernels:flash"},
        {"backbone_config": {"model_type": "resnet", "attn_implementation": {"": "a/b"}}},
        {"quantization_config": {"quant_method": "fbgemm_fp8"}},
        {"use_kernels": True},
        {"adapter": True},
        {"decoder_layers": 10**6},
    ],
    ids=str,
)
def test_a_local_model_fetches_nothing(
    tmp_path: Path, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that a folder is refused with one line, and that the Hub receives no request."""
    from raydet.models.loading import build_detector, load_detector
    from raydet.tables.schema import Category

    with socket.socket() as hub:
        hub.bind(("127.0.0.1", 0))
        hub.listen()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        folder = tmp_path / "model"
        build_detector("conditional_detr_tiny", [Category(1, "dog")], image_size=64, seed=0).save(str(folder))
        if "adapter" in changes:
            adapter = {"base_model_name_or_path": "someone/base", "peft_type": "LORA"}
            (folder / "adapter_config.json").write_text(json.dumps(adapter))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        dog = [Category(1, "dog")]
        with pytest.raises(UserError) as loading:
            load_detector(str(folder))
        with pytest.raises(UserError) as building:
            build_detector(str(folder), dog, image_size=64, seed=0)
        for message in (str(loading.value), str(building.value)):
            assert "\n" not in message and str(folder) in message
        hub.setblocking(False)
        with pytest.raises(BlockingIOError):
            hub.accept()


def test_each_promise_names_a_test_that_exists() -> None:
    names = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (PROJECT / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(names) >= 20
    for path, name in names:
        assert f"\ndef {name}(" in (PROJECT / path).read_text(encoding="utf-8"), f"{path}::{name}"


def calls_in(path: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(ast.unparse(call.func), call) for call in calls]


def test_no_option_and_no_call_lets_foreign_code_in() -> None:
    """Check the source: nothing that executes code is called, and every loader is told not to, by a constant."""
    loads_models = []
    for path in sorted((PROJECT / "raydet").rglob("*.py")):
        for name, call in calls_in(path):
            given = {item.arg: ast.unparse(item.value) for item in call.keywords}
            where = f"{path.name}:{call.lineno}: {name}"
            if name.endswith(".from_pretrained"):
                loads_models.append(where)
                assert given.get("trust_remote_code") == "False", where
                assert ".Auto" not in name or "Model" not in name or given.get("use_safetensors") == "True", where
            if name == "torch.load":
                assert given.get("weights_only") == "True", where
            if name in ("np.load", "numpy.load"):
                assert given.get("allow_pickle") == "False", where
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "os.system"), where
            assert given.get("shell") != "True" and given.get("trust_remote_code") in (None, "False"), where
    assert len(loads_models) >= 5
    names = {name for config in (TrainConfig, PredictConfig) for name in config.__dataclass_fields__}
    assert not {name for name in names if "trust" in name or "remote" in name}


# Listening sockets.

_LISTENERS = """
import os, psutil, ray
from raydet.cluster import board, session
with session.session({log!r}):
    actor = board.Board.remote()
    ray.get(actor.show.remote())
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = set()
    for process in processes:
        try:
            connections = process.net_connections(kind="inet")
        except psutil.Error:
            continue
        found |= {{(item.laddr.ip, process.name()) for item in connections if item.status == psutil.CONN_LISTEN}}
    assert len(processes) > 3
    print("LISTENERS", *sorted(f"{{ip}}={{name}}" for ip, name in found))
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_local_cluster_listens_on_loopback_only(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", _LISTENERS.format(log=str(tmp_path / "log"))],
        env={**environment, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=350,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("LISTENERS")]
    listeners = [word.partition("=") for word in line.split()[1:]]
    assert listeners
    loopback = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    assert [(ip, name) for ip, _, name in listeners if ip not in loopback] == []
    # Only the user can read the Ray token.
    token = tmp_path / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o077 == 0
