"""A data set that the Hugging Face `datasets` library opens → its images; `hub_rows` reads its labels.

The data set can be a name on the Hub, a folder that `load_dataset` understands (`imagefolder`, Parquet files), a folder
that `save_to_disk` wrote, an images table, or Parquet files by name or pattern. The library downloads or converts it
once into its cache (`HF_HOME`) and opens it as a memory map, so that memory does not grow with the data. Images are not
decoded; their bytes pass unchanged. There is no streaming: ids and classes must be known before the first row is
written, which would take a second download. Code in a data set is never run. Private data sets need `HF_TOKEN` or
`hf auth login`; an option for a token would end up in logs.
"""

import io
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from raydet.common.errors import UserError, one_line
from raydet.common.redaction import name_of_url
from raydet.common.untrusted.documents import DocumentError, check_json_lines
from raydet.common.untrusted.opening import ANYWHERE, LocalRoots, OutsideError, refusal_in_folder, refusal_of_name
from raydet.config import PrepareHubConfig
from raydet.images.files import ReadError, is_image_name, read_error, readable, refuse_name, refuse_size
from raydet.preparation.sources.web import WebReader
from raydet.tables import storage
from raydet.tables.table import is_table, open_table, refuse_folder_of_tables

_REMOTE = "hf://"
_MOST_METADATA_BYTES = 512 * 2**20
_METADATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".xml")
"""Text files, which the library reads into memory whole, or by lines of any length."""
_OUTSIDE = "the path leads out of the data set; --allow-root permits folders outside"


class HubImages:
    """The images of an opened data set, read by row number; thread-safe and picklable.

    Attributes:
        dataset: A `datasets.Dataset` that returns Arrow tables.
        folder: Its absolute path; None for a data set on the Hub.
        roots: Folders in which the files that rows name must lie.
    """

    is_local = True
    """Images are on this machine, mostly in a memory map."""

    def __init__(
        self,
        dataset: Any,
        folder: str | None,
        *,
        column: str = "image",
        allow_root: Sequence[str] | None = None,
        allow_web: bool = False,
    ) -> None:
        self.dataset, self.folder, self.column = dataset, folder, column
        self.roots = LocalRoots(*(_caches() if folder is None else (folder,)), *(allow_root or ()))
        self._web = WebReader() if allow_web else None

    def read(self, row: str) -> bytes:
        """Read the image of a row.

        Raises:
            ReadError: The row has no image, or it cannot be read.
        """
        data, path = self._cell(row)
        if data is not None:
            refuse_size(len(data))
            return data
        if not path:
            raise ReadError("the row has neither the bytes of an image nor a path")
        if storage.is_web(path):
            if self._web is None:
                raise ReadError("the row names a web URL; --allow-web permits to fetch it")
            return self._web.read(path)
        try:
            return self.roots.read(self._absolute(path), refuse_size)
        except OSError as error:
            if isinstance(error, OutsideError):
                raise ReadError(_OUTSIDE) from None
            raise read_error(error) or ReadError(f"cannot be read: {error.strerror}") from None

    def uri_of(self, row: str) -> str:
        """Return the absolute path of a row's image, for a table that refers to it.

        Raises:
            ReadError: There is no permanent file: the image is embedded in the data set or lies in the library's cache.
        """
        data, path = self._cell(row)
        if data is not None or not path or storage.is_web(path) or self.folder is None:
            raise ReadError("there is no file to refer to: the image is embedded, on the web or in a cache")
        found = self._absolute(path)
        if not self.roots.contain(os.path.realpath(found)):
            raise ReadError(_OUTSIDE)
        return found

    def name_of(self, path: str | None, number: int) -> str:
        """Return the name of an image in the table: its path in the folder, its file name, or the row number."""
        if not path:
            return f"{number:08d}"
        if storage.is_web(path):
            return readable(name_of_url(path))
        if not Path(path).is_absolute():
            return readable(path)
        if self.folder is not None and Path(path).is_relative_to(self.folder):
            return readable(str(Path(path).relative_to(self.folder)))
        return readable(Path(path).name)

    def _cell(self, row: str) -> tuple[bytes | None, str | None]:
        """Return the bytes and the path in a row, which stores a struct of both, or only one."""
        number = int(row)
        value = self.dataset[number : number + 1][self.column][0].as_py()
        if isinstance(value, dict):
            return value.get("bytes"), value.get("path")
        return (None, value) if isinstance(value, str) else (value, None)

    def _absolute(self, path: str) -> str:
        """Return the absolute path of a file; the paths of a data set on the Hub are those of its cache."""
        if refuse_name(path):
            raise ReadError("the file name is not valid text")
        if self.folder is None and not Path(path).is_absolute():
            raise ReadError(_OUTSIDE)
        return path if self.folder is None else str(Path(self.folder, path))


def _caches() -> tuple[str, ...]:
    """Return the folders into which the library downloads."""
    from datasets import config
    from huggingface_hub import constants

    return tuple(map(str, (config.HF_CACHE_HOME, config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)))


def load_hub(config: PrepareHubConfig) -> HubImages:
    """Open a data set on the Hub or at a path; the split may be a slice such as `train[:10%]`.

    Raises:
        UserError: There is no such data set or split, or the Hub cannot be reached.
    """
    dataset, subset, split = config.dataset, config.subset, config.split
    if "://" in dataset and not dataset.startswith(_REMOTE):
        raise UserError(f"{dataset}: --dataset must be a name on the Hugging Face Hub or a path on this machine")
    opened = partial(HubImages, allow_root=config.allow_root, allow_web=config.allow_web)
    path = Path(storage.absolute_uri(dataset))
    is_pattern = _is_pattern(dataset)
    if is_on_hub(dataset):
        return opened(_opened(dataset, dataset, name=subset, split=split, revision=config.revision), None)
    if not is_pattern and not path.exists():
        raise UserError(f"no such path: {path}; --dataset must be a path, or a name on the Hugging Face Hub")
    folder = Path(os.path.realpath(path if path.is_dir() else path.parent))
    _refuse_special_files(path)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return opened(_saved_to_disk(path, split), str(folder))
    if path.is_dir() and not is_table(str(path)):
        refuse_folder_of_tables(str(path), "images")  # `datasets` would mix them
        return opened(_opened(dataset, str(path), name=subset, split=split), str(folder))
    if path.is_dir():
        files = [str(path / name) for name in open_table(str(path), "images").files]
    elif path.suffix == ".parquet":
        files = [str(path)]
    else:
        raise UserError(f"{path} is neither a folder nor a Parquet file")
    # The files are given explicitly, so that split names in their file names are ignored.
    return opened(_opened(dataset, "parquet", data_files={"train": files}, split=split), str(folder))


def is_on_hub(dataset: str) -> bool:
    """Return True for a name on the Hub, False for a path or a pattern of paths, which need not exist."""
    is_path = dataset.startswith((".", "/", "~")) or dataset.count("/") > 1 or _is_pattern(dataset)
    return dataset.startswith(_REMOTE) or not (is_path or Path(storage.absolute_uri(dataset)).exists())


def _is_pattern(dataset: str) -> bool:
    return "*" in dataset and not Path(storage.absolute_uri(dataset)).exists()


def _refuse_special_files(path: Path) -> None:
    """Refuse pipes and devices, for which the library would wait, and text files that would fill the memory."""
    reason = None
    if path.is_dir():  # the library leaves images closed; `HubImages` opens them
        special = refusal_in_folder(str(path), is_opened=lambda name: not is_image_name(name))
        reason = special or _unusable_text_in(path)
    if path.exists() and not path.is_dir() and (kind := refusal_of_name(str(path))) is not None:
        reason = f"it {kind}"
    if reason is not None:
        raise UserError(f"cannot load the data set {path}: {one_line(reason)}")


def _unusable_text_in(folder: Path) -> str | None:
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            if name.lower().endswith(_METADATA_SUFFIXES) and path.stat().st_size > _MOST_METADATA_BYTES:
                return f"{str(path)!r} is larger than {_MOST_METADATA_BYTES // 2**20} MiB; write its rows as Parquet"
            if name.lower().endswith(".jsonl"):
                try:
                    with io.BufferedReader(ANYWHERE.open(str(path))) as file:
                        check_json_lines(file)
                except (OSError, DocumentError) as error:
                    return f"{str(path)!r} cannot be read: {one_line(error)}"
    return None


def _opened(dataset: str, loader: str, **options: Any) -> Any:
    datasets = _library()
    try:
        return datasets.load_dataset(loader, **options).with_format("arrow")
    except Exception as error:  # dozens of types are possible
        raise UserError(f"cannot load the data set {dataset}: {one_line(error)}") from None


def _saved_to_disk(path: Path, split: str) -> Any:
    datasets = _library()
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:
        cause = error.__cause__ if type(error).__name__.startswith("DatasetGeneration") else None
        raise UserError(f"cannot load the data set {path}: {one_line(cause or error, limit=300)}") from None
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise UserError(f"{path} has no split {split}; it has {', '.join(map(str, saved))}")
        saved = saved[split]
    return saved.with_format("arrow")


def _library() -> Any:
    """Import the library, which takes seconds; the console shows the progress, and its errors are raised too."""
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    return datasets
