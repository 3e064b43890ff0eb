"""Hostile model folders."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile import things

Damage = Callable[[Path], None]
WEIGHTS, CONFIG = "model.safetensors", "config.json"
CONFIG_FIELDS = (
    "model_type",
    "architectures",
    "architectures.0",
    "id2label",
    "id2label.0",
    "num_labels",
    "raydet",
    "raydet.categories",
    "raydet.categories.0",
    "raydet.categories.0.id",
    "raydet.categories.0.name",
    "backbone_config",
    "backbone_config.model_type",
    "backbone_config.depths",
    "d_model",
    "num_queries",
    "decoder_layers",
    "feat_strides",
    "dtype",
    "transformers_version",
)
"""Fields of config.json that get every wrong value; a model has more than a hundred."""


class _Harm:
    def __reduce__(self) -> Any:
        return print, ("a pickle was executed",)


def _config(**values: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return damage


def _weights(change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))

    return damage


def _header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the header of the weights; the function returns the new header or its bytes."""

    def damaged(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        content = change(json.loads(data[8 : 8 + length]))
        header = content if isinstance(content, bytes) else json.dumps(content).encode()
        return struct.pack("<Q", len(header)) + header + data[8 + length :]

    return _weights(damaged)


def _first(**values: Any) -> Damage:
    def change(header: dict[str, Any]) -> dict[str, Any]:
        name = next(name for name in header if name != "__metadata__")
        return {**header, name: {**header[name], **values}}

    return _header(change)


def _tensors(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Damage:
    def damage(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def _filled(tensors: dict[str, np.ndarray], number: float) -> dict[str, np.ndarray]:
    return {name: np.full_like(value, number) if value.dtype.kind == "f" else value for name, value in tensors.items()}


def _many_tensors(count: int) -> dict[str, Any]:
    return {f"t{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(count)}


def _many_files(folder: Path) -> None:
    for number in range(3_000):
        (folder / f"{number}.json").write_text("{}")


def _pickled(name: str, *, only: bool = True) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(pickle.dumps(_Harm()))
        if only:
            (folder / WEIGHTS).unlink()

    return damage


def _code(folder: Path) -> None:
    (folder / "modeling_x.py").write_text("open('executed', 'w')\nprint('code of the model was executed')\n")
    names = ("AutoConfig", "AutoModel", "AutoModelForObjectDetection", "AutoImageProcessor")
    _config(auto_map=dict.fromkeys(names, "modeling_x.X"))(folder)


def _foreign_code(folder: Path) -> None:
    _code(folder)
    _config(model_type="x", auto_map={"AutoConfig": "evil/repository--modeling_x.X"})(folder)


def _sharded(name: str) -> Damage:
    def damage(folder: Path) -> None:
        index = {"metadata": {"total_size": 1}, "weight_map": {"model.a": name}}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
        (folder / WEIGHTS).rename(folder.parent / "moved.safetensors")

    return damage


def _beside(name: str, content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def _processor(**values: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "preprocessor_config.json"
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, **values}))

    return damage


MODELS: dict[str, Damage] = {
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "no config": lambda folder: (folder / CONFIG).unlink(),
    "only pickled weights": _pickled("pytorch_model.bin"),
    "a pickle called safetensors": _weights(lambda _: pickle.dumps(_Harm())),
    "a pickle beside the weights": _pickled("pytorch_model.bin", only=False),
    "a pickled training state": _pickled("training_args.bin", only=False),
    "a pickled optimizer": _pickled("optimizer.pt", only=False),
    "its own code": _code,
    "code of another repository": _foreign_code,
    "weights cut to half": _weights(lambda data: data[: len(data) // 2]),
    "weights of 4 bytes": _weights(lambda data: data[:4]),
    "no weights in the file": _weights(lambda _: b""),
    "a header of 2^63 bytes": _weights(lambda data: struct.pack("<Q", 2**63) + data[8:]),
    "a header of 90 MB": _header(lambda content: json.dumps(content).encode() + b" " * 90_000_000),
    "a header that is longer than the file": _weights(lambda data: struct.pack("<Q", len(data)) + data[8:]),
    "a header that is no JSON": _header(lambda _: b"{" * 1000),
    "a header 100,000 deep": _header(lambda _: b'{"a":' * 100_000),
    "a header that is a list": _header(lambda _: []),
    "a header with 200,000 tensors": _header(lambda content: {**_many_tensors(200_000), **content}),
    "a header with escape sequences": _header(lambda content: {things.ESCAPE: {"dtype": "F32"}, **content}),
    "a tensor of 2^60 values": _first(shape=[2**30, 2**30]),
    "a tensor of a negative shape": _first(shape=[-1]),
    "a tensor behind the end": _first(data_offsets=[2**40, 2**40 + 8]),
    "a tensor backward": _first(data_offsets=[100, 0]),
    "a tensor of an unknown type": _first(dtype="X9"),
    "a tensor of text": _first(shape="x"),
    "NaN weights": _tensors(lambda tensors: _filled(tensors, np.nan)),
    "infinite weights": _tensors(lambda tensors: _filled(tensors, np.inf)),
    "missing tensors": _tensors(lambda tensors: dict(list(tensors.items())[::2])),
    "tensors of another shape": _tensors(
        lambda tensors: {name: np.zeros((*value.shape, 1), value.dtype) for name, value in tensors.items()}
    ),
    "foreign tensors": _tensors(lambda tensors: {**tensors, "evil": np.zeros(3, np.float32)}),
    "integers for weights": _tensors(lambda tensors: {name: value.astype(np.int64) for name, value in tensors.items()}),
    "shards outside": _sharded("../moved.safetensors"),
    "shards at an absolute path": _sharded("/etc/hostname"),
    "shards that are missing": _sharded("missing.safetensors"),
    "an index that is no JSON": _beside(f"{WEIGHTS}.index.json", b"{"),
    "an index that is a bomb": _beside(f"{WEIGHTS}.index.json", b"[" * 100_000),
    "an adapter of another repository": _beside(
        "adapter_config.json", json.dumps({"base_model_name_or_path": "evil/model", "peft_type": "LORA"}).encode()
    ),
    "a kernel of another repository": _config(attn_implementation="evil/kernel"),
    "an attention of another repository": _config(_attn_implementation="evil/kernel:forward"),
    "a backbone of another repository": _config(
        backbone="evil/backbone", use_pretrained_backbone=True, backbone_config=None
    ),
    "a timm backbone": _config(backbone="resnet50", use_timm_backbone=True, use_pretrained_backbone=True),
    "a quantisation": _config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "another name": _config(_name_or_path="evil/model"),
    "a million labels": _config(id2label={str(n): f"c{n}" for n in range(1_000_000)}, raydet=None),
    "labels that are numbers": _config(id2label={"0": 1, "1": None}, raydet=None),
    "labels with wrong keys": _config(id2label={"x": "cat", "y": "dog"}, raydet=None),
    "labels with gaps": _config(id2label={"5": "cat", "-7": "dog"}, raydet=None),
    "the same label twice": _config(id2label={"0": "cat", "1": "cat"}, raydet=None),
    "no labels": _config(id2label={}, raydet=None),
    "10^9 queries": _config(num_queries=10**9),
    "10^6 layers": _config(decoder_layers=10**6),
    "a width of 10^9": _config(d_model=10**9),
    "a width of zero": _config(d_model=0, encoder_hidden_dim=0),
    "a model of another task": _config(model_type="bert", architectures=["BertModel"]),
    "a model that transformers does not know": _config(model_type="yolo99"),
    "a model_type with escape sequences": _config(model_type=things.ESCAPE),
    "a model_type outside": _config(model_type="../../outside"),
    "a size of 10^6": _processor(size={"height": 10**6, "width": 10**6}),
    "a size of zero": _processor(size={"height": 0, "width": 0}),
    "a negative size": _processor(size={"height": -64, "width": -64}),
    "a size that is text": _processor(size="large"),
    "a shortest edge": _processor(size={"shortest_edge": 10**9, "longest_edge": 1}),
    "a deviation of zero": _processor(image_std=[0, 0, 0], do_normalize=True),
    "means that are text": _processor(image_mean=["x"] * 3, do_normalize=True),
    "two means": _processor(image_mean=[0.5, 0.5], do_normalize=True),
    "a factor of NaN": _processor(rescale_factor=float("nan"), do_rescale=True),
    "a processor of another repository": _processor(auto_map={"AutoImageProcessor": "evil/repository--p.P"}),
    "an unknown processor": _processor(image_processor_type="EvilProcessor"),
    "a resampling of 99": _processor(resample=99),
    "a padding of 10^9": _processor(do_pad=True, pad_size={"height": 10**9, "width": 10**9}),
    "3,000 files": _many_files,
    "a text of 300 MB": lambda folder: _beside("vocabulary.txt", b"x" * 300_000_000)(folder),
}
"""Damage of a model folder."""
