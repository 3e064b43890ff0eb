"""The description of a folder with adapters, read without loading torch.

It lets the driver refuse a wrong folder in one line before any worker starts.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raydet.common.errors import UserError
from raydet.common.untrusted.opening import refusal_in_folder
from raydet.models.checkpoints import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    CONFIG,
    categories_in,
    check_config,
    fingerprint,
    read_config_file,
)
from raydet.tables import storage
from raydet.tables.schema import Category

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_NAME = re.compile(r"\w[\w.-]*")
_MOST_NAME = 200
_UNSUPPORTED = ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "lora_bias", "trainable_token_indices")
"""Entries of peft's config that change what an adapted layer computes."""


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """A folder with LoRA adapters in peft's format.

    Attributes:
        name: Name of the output: that of the folder, or of its run if the folder is a run's `adapter`.
        uri: Absolute path.
        base: The model that was adapted, as recorded; None if it is not recorded.
        rank: Rank r of all adapters.
        scale: Factor of the product B·A.
        content: The content of its `config.json`, the config of the adapted model; empty without one.
        categories: The classes of the adapted model by index; empty if they are those of the base.
        fingerprint: Fingerprint of all its files, see `raydet.models.checkpoints.fingerprint`.
    """

    name: str
    uri: str
    base: str | None
    rank: int
    scale: float
    content: Mapping[str, Any] = field(repr=False)
    categories: tuple[Category, ...]
    fingerprint: str

    @property
    def model_type(self) -> str | None:
        """Model type in its `config.json`; None without one."""
        return self.content.get("model_type")


def read_adapters(uris: Sequence[str]) -> tuple[AdapterFolder, ...]:
    """Read the descriptions of folders with adapters, in the order of their names.

    Raises:
        UserError: A folder holds no adapter that raydet supports, or two have the same name.
    """
    by_name: dict[str, AdapterFolder] = {}
    for uri in uris:
        adapter = _read(storage.absolute_uri(uri))
        same = by_name.setdefault(adapter.name.casefold(), adapter)  # some file systems ignore the case
        if same is not adapter:
            raise UserError(
                f"--adapter: {same.uri} and {adapter.uri} would both write OUT/{adapter.name}; rename or copy one of "
                "the folders, or name each once"
            )
    return tuple(by_name[name] for name in sorted(by_name))


def _read(uri: str) -> AdapterFolder:
    own = _own_config(uri)
    content: Mapping[str, Any] = {}
    if storage.exists(storage.join(uri, CONFIG)):
        content = check_config(uri)
        if not isinstance(content.get("model_type"), str):
            raise UserError(f"--adapter {uri}: its {CONFIG} names no model_type")
    rank, scale = _rank_and_scale(own, uri)
    base = own.get("base_model_name_or_path")
    return AdapterFolder(
        name=_name_of(uri),
        uri=uri,
        base=base if isinstance(base, str) and base else None,
        rank=rank,
        scale=scale,
        content=content,
        categories=categories_in(content),
        fingerprint=fingerprint(uri),
    )


def _own_config(uri: str) -> dict[str, Any]:
    """Read peft's config in a folder, after checking what the folder holds."""
    if "://" in uri:
        raise UserError(f"--adapter {uri}: an adapter must be a local folder; copy it to one that all nodes see")
    if not storage.is_folder(uri):
        hint = "; separate several folders by blanks" if "," in uri else ""
        raise UserError(f"--adapter {uri}: no such folder; use the OUT/{ADAPTER_FOLDER} of `raydet train --lora`{hint}")
    reason = refusal_in_folder(storage.resolve(uri)[1])
    if reason is not None:
        raise UserError(f"--adapter {uri} cannot be used: {reason}")
    if not storage.exists(storage.join(uri, ADAPTER_CONFIG)):
        inside = storage.join(uri, ADAPTER_FOLDER)
        beside = storage.join(storage.split(uri)[0], ADAPTER_FOLDER)
        hint = f"use the OUT/{ADAPTER_FOLDER} of `raydet train --lora`"
        for place in (inside, beside):
            if storage.exists(storage.join(place, ADAPTER_CONFIG)):
                hint = f"did you mean {place}?"
                break
        what = "a whole model" if storage.exists(storage.join(uri, CONFIG)) else "no adapter"
        raise UserError(f"--adapter {uri} holds {what} (no {ADAPTER_CONFIG}); {hint}")
    if not storage.exists(storage.join(uri, ADAPTER_WEIGHTS)):
        raise UserError(f"--adapter {uri} holds no weights (no {ADAPTER_WEIGHTS}); save it as safetensors")
    return read_config_file(storage.join(uri, ADAPTER_CONFIG))


def _rank_and_scale(own: Mapping[str, Any], uri: str) -> tuple[int, float]:
    """Return rank and scale of the adapters, if peft's config asks for nothing that raydet does not compute."""
    kind = own.get("peft_type")
    if kind != "LORA":
        raise UserError(f"--adapter {uri} is of the type {kind!s:.40}; raydet supports LORA only: merge it with peft")
    other = [name for name in _UNSUPPORTED if own.get(name)]
    if other:
        raise UserError(
            f"--adapter {uri} uses {other[0]} of peft, which raydet does not support: merge it with peft, and give the "
            "result as --checkpoint"
        )
    rank, alpha = own.get("r"), own.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not math.isfinite(float(alpha or 0)):
        raise UserError(f"--adapter {uri}: its {ADAPTER_CONFIG} states no rank r and lora_alpha")
    return rank, float(alpha or 0) / (math.sqrt(rank) if own.get("use_rslora") else rank)


def _name_of(uri: str) -> str:
    parent, name = storage.split(uri)
    if name == ADAPTER_FOLDER:
        name = storage.split(parent)[1]
    if not _NAME.fullmatch(name) or name.startswith("_") or len(name) > _MOST_NAME:
        raise UserError(
            f"--adapter {uri}: its output folder would be {name!r:.100}; rename the folder, so that its name has only "
            "letters, digits, `.`, `-` and `_`, and starts with a letter or a digit"
        )
    return name
