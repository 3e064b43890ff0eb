"""The description of a checkpoint, read from its `config.json` without loading torch.

It lets the driver refuse a wrong path or an unsupported model in one line before any worker starts.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from raydet.common.class_names import UNUSED_NAME
from raydet.common.errors import RunError, UserError, first_line
from raydet.common.untrusted.documents import DocumentError, parse_json
from raydet.common.untrusted.opening import refusal_in_folder
from raydet.tables import storage
from raydet.tables.schema import Category

STATES_FOLDER = "states"
"""Folder in OUT of a training run: the states from which the run can resume."""
ADAPTER_FOLDER = "adapter"
"""Folder in OUT of a training run with adapters: those of OUT/checkpoint, in peft's format."""
HISTORY_FILE = "log/history.json"
"""File in OUT of a training run: one entry per epoch."""
STEPS_FILE = "log/steps.json"
"""File in OUT of a training run that was stopped within an epoch: the entry of that epoch so far."""
OWN_FILE = "raydet.json"
"""File in a checkpoint: the operating point that `fit` wrote, and how it was exported. It is no part of the model."""
GRAPH_FILES = ("model.xml", "model.bin")
"""Files in a folder of `export openvino`: the graph with its weights, in place of those of a checkpoint."""
MOST_REMOTE_BYTES = 512 * 2**20
"""The fingerprint of larger files in an object store uses their size and time instead of their content."""

CONFIG = "config.json"
"""File in a model folder, by which transformers builds the model."""
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Files of an image processor, under its earlier name and its present one."""
ADAPTER_CONFIG = "adapter_config.json"
"""File in a folder with adapters, in peft's format."""
_MOST_CONFIG_BYTES = 8 * 2**20
_MOST_JSON_BYTES = 64 * 2**20
"""Other JSON files, such as vocabularies; transformers reads them into memory."""
_MOST_LAYERS = 1000
_FOREIGN_PARTS = ("quantization_config", "use_kernels", "kernel_config")
_MODEL_SUFFIXES = (".json", ".safetensors", ".txt")


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk or on the Hub.

    Attributes:
        name: Absolute path of the folder, or the name on the Hub.
        model_type: Model type, as in the model's config.
        categories: The classes by index, with the ids that they had in the training data; empty if the checkpoint does
            not name them.
        content: The content of its `config.json`.
    """

    name: str
    model_type: str
    categories: tuple[Category, ...]
    content: Mapping[str, Any] = field(default_factory=dict, repr=False)


def read_checkpoint(name: str, *, takes_graph: bool = False) -> Checkpoint:
    """Read the description of a local model folder, or of a name on the Hub.

    With `takes_graph`, the folder may also hold a graph of `export openvino` instead of weights.

    Raises:
        UserError: There is no model there.
    """
    is_folder = storage.exists(name)
    content = (
        _folder_config(name, takes_graph) if is_folder else _parsed(storage.read_bytes(hub_config_path(name)), name)
    )
    if not isinstance(content.get("model_type"), str):
        raise UserError(f"{name} holds no transformers model: its config.json names no model_type")
    absolute = storage.absolute_uri(name) if is_folder else name
    return Checkpoint(absolute, content["model_type"], categories_in(content), content)


def holds_graph(name: str) -> bool:
    """Return True for a folder with a graph of `export openvino` and no weights."""
    return storage.exists(storage.join(name, GRAPH_FILES[0])) and not _weights_in(name)


def only_graph(name: str) -> UserError:
    """Make the error for a command that needs weights."""
    return UserError(
        f"the folder {name} holds an OpenVINO graph without weights, which predict --engine openvino runs; use the "
        "checkpoint that it was exported from"
    )


def _weights_in(folder: str) -> list[str]:
    return [name for name in storage.list_files(folder) if name.endswith(".safetensors")]


def fingerprint(name: str, *, most_remote_bytes: int = MOST_REMOTE_BYTES) -> str:
    """Identify a model by its weights, its config and its processor.

    Args:
        name: A model folder, local or in an object store, or a name on the Hub.
        most_remote_bytes: Size of the largest file that is read from an object store.

    Returns:
        For a folder, the first 16 hex digits of the SHA-256 over the names and contents of its `.safetensors`, `.json`
        and `.txt` files except `raydet.json`, and of its OpenVINO graph; files above `most_remote_bytes` in an object
        store count with their size and modification time. For the Hub, the current commit, without fetching weights.

    Raises:
        UserError: There is no model there.
    """
    if not storage.exists(name):
        # The path in the cache is …/snapshots/COMMIT/config.json.
        return Path(hub_config_path(name)).parent.name
    digest = hashlib.sha256()
    files = [file for file in storage.list_files(name) if file.endswith(_MODEL_SUFFIXES) or file in GRAPH_FILES]
    files = [file for file in files if file != OWN_FILE]
    for file in files:
        digest.update(f"{file}\n{_file_digest(storage.join(name, file), most_remote_bytes)}\n".encode())
    return digest.hexdigest()[:16]


def _file_digest(uri: str, most_remote_bytes: int) -> str:
    filesystem, path = storage.resolve(uri)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        info = filesystem.get_file_info(path)
        if info.size is None or info.size > most_remote_bytes:
            return f"{info.size} bytes of {info.mtime_ns}"
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path, compression=None) as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def categories_in(content: Mapping[str, Any]) -> tuple[Category, ...]:
    """Return the classes in the content of a `config.json`, from raydet's own entry or from `id2label`.

    The result is empty if the labels are the placeholders of transformers (LABEL_0 and so on). An index that
    `id2label` skips is named N/A.
    """
    own = content.get("raydet")
    try:
        if own:
            return tuple(Category(id=int(item["id"]), name=str(item["name"])) for item in own["categories"])
        labels = {int(index): str(label) for index, label in (content.get("id2label") or {}).items()}
    except (TypeError, ValueError, LookupError, AttributeError):
        raise UserError("the config.json of the model lists its classes in a form that raydet does not know") from None
    if all(label == f"LABEL_{index}" for index, label in labels.items()):
        return ()
    return tuple(Category(id=index, name=labels.get(index, UNUSED_NAME)) for index in range(len(labels)))


def _folder_config(folder: str, takes_graph: bool) -> dict[str, Any]:
    # Other libraries open these files by name.
    reason = refusal_in_folder(storage.resolve(folder)[1]) if storage.is_local(folder) else None
    if reason is not None:
        raise UserError(f"the model folder {folder} cannot be used: {reason}")
    path = storage.join(folder, CONFIG)
    if not storage.exists(path):
        inside = [name for name in storage.list_folders(folder) if storage.exists(storage.join(folder, name, CONFIG))]
        # A training run holds two: the best model, and the last one.
        place = storage.join(folder, "checkpoint" if "checkpoint" in inside else inside[0]) if inside else ""
        hint = f"did you mean {place}?" if inside else "use the OUT/checkpoint of a training run"
        raise UserError(f"the folder {folder} holds no model (no {CONFIG}); {hint}")
    if holds_graph(folder):
        if not takes_graph:
            raise only_graph(folder)
    elif not _weights_in(folder):
        raise UserError(f"the folder {folder} holds no model weights (no .safetensors file)")
    return check_local_config(folder)


def check_local_config(folder: str) -> dict[str, Any]:
    """Read the `config.json` of a model folder, which must not make transformers fetch anything.

    Raises:
        UserError: It is damaged, or refers to an adapter, kernels or a quantiser, or another JSON file is too large.
    """
    if storage.exists(storage.join(folder, ADAPTER_CONFIG)):
        raise UserError(
            f"{folder} holds an adapter of another model ({ADAPTER_CONFIG}); use a merged model, such as "
            "the OUT/checkpoint beside it, or score it by --checkpoint BASE --adapter"
        )
    return check_config(folder)


def check_config(folder: str) -> dict[str, Any]:
    """Read a `config.json` as `check_local_config` does, also that of a folder with adapters."""
    _refuse_large_files(folder)
    path = storage.join(folder, CONFIG)
    content = read_config_file(path)
    _refuse_hostile_parts(content, path)
    return content


def read_config_file(path: str) -> dict[str, Any]:
    """Read a small JSON object that describes a model or an adapter.

    Raises:
        UserError: It cannot be read, is too large, or is no JSON object.
    """
    try:
        data = storage.read_bytes(path, max_bytes=_MOST_CONFIG_BYTES)
    except OSError as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from None
    return _parsed(data, path)


def _refuse_large_files(folder: str) -> None:
    filesystem, path = storage.resolve(folder)
    for info in filesystem.get_file_info(pafs.FileSelector(path)):
        if info.base_name.endswith(".json") and (info.size or 0) > _MOST_JSON_BYTES:
            raise UserError(
                f"the model folder {folder} cannot be used: {info.base_name} is larger than "
                f"{_MOST_JSON_BYTES // 2**20} MiB"
            )


def _parsed(data: bytes, where: str) -> dict[str, Any]:
    try:
        content = parse_json(data, max_bytes=_MOST_CONFIG_BYTES)
    except DocumentError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where} is not the config of a model: expected a JSON object")
    return content


def _refuse_hostile_parts(content: Any, where: str) -> None:
    """Refuse a local model whose config makes transformers fetch and run code, or build layers without end.

    The code is that of kernels and quantisers from the Hub.

    Raises:
        UserError: There is such an entry, at any depth.
    """
    if isinstance(content, list):
        for item in content:
            _refuse_hostile_parts(item, where)
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        is_kernel = key.endswith("_implementation") and any(mark in json.dumps(value) for mark in "/:|@")
        if is_kernel or (key in _FOREIGN_PARTS and value):
            raise UserError(
                f"{where} has the entry {key}, for which transformers may fetch code from the Hub; remove it, or use a "
                "plain fp32 checkpoint"
            )
        if key.endswith("layers") and isinstance(value, int) and value > _MOST_LAYERS:
            raise UserError(f"{where} has {value:,} {key}; expected at most {_MOST_LAYERS:,}")
        _refuse_hostile_parts(value, where)


def hub_config_path(name: str) -> str:
    """Return the path in the cache of the `config.json` of a model on the Hub, after downloading it if necessary.

    Raises:
        UserError: There is no such model.
        RunError: The Hub cannot be reached, and the model is not in the cache.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from raydet.common.hub_client import require_hub

    try:
        # No detector on the Hub has a name without an owner: a mistyped folder is refused without asking the Hub.
        is_cached = isinstance(try_to_load_from_cache(name, CONFIG), str)
        if "/" not in name and not is_cached:
            raise HFValidationError
        try:
            require_hub()
        except RunError:
            if not is_cached:
                raise
            return hf_hub_download(name, CONFIG, local_files_only=True)
        return hf_hub_download(name, CONFIG)
    except HFValidationError:
        raise UserError(f"no such checkpoint: {name} is neither a folder nor a Hub name (owner/name)") from None
    except LocalEntryNotFoundError:
        raise UserError(f"no such checkpoint: there is no folder {name}, and the Hub cannot be reached") from None
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"no such checkpoint: there is no folder {name}, and the Hub says: {first_line(error)}"
        ) from None
