"""The fingerprint of a model."""

import os
from pathlib import Path

import fsspec
import pytest

from raydet.common.errors import UserError
from raydet.models.checkpoints import fingerprint

FILES = {
    "config.json": b'{"model_type": "detr"}',
    "preprocessor_config.json": b'{"size": 480}',
    "vocab.txt": b"cat dog",
    "model.safetensors": b"weights",
}


def _save(folder: Path, **changes: bytes) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {**FILES, **changes}.items():
        (folder / name).write_bytes(content)
    return str(folder)


@pytest.mark.parametrize("name", FILES)
def test_it_changes_with_each_file_that_makes_the_model(tmp_path: Path, name: str) -> None:
    before = fingerprint(_save(tmp_path / "model"))
    assert len(before) == 16
    assert int(before, 16) >= 0
    assert fingerprint(_save(tmp_path / "model", **{name: FILES[name].replace(b"e", b"E").upper()})) != before
    (tmp_path / "model" / name).unlink()
    assert fingerprint(str(tmp_path / "model")) != before


def test_it_stays_with_a_copy_at_another_time_and_a_text_for_people(tmp_path: Path) -> None:
    before = fingerprint(_save(tmp_path / "model"))
    copy = _save(tmp_path / "copy", **{"README.md": b"a model"})
    os.utime(Path(copy, "model.safetensors"), (0, 0))
    assert fingerprint(copy) == before


def test_a_store_is_read_up_to_a_limit() -> None:
    memory = fsspec.filesystem("memory")

    def save(weights: bytes) -> None:
        for name, content in {**FILES, "model.safetensors": weights}.items():
            memory.pipe(f"/fingerprints/{name}", content)

    def of(weights: bytes, **options: int) -> str:
        save(weights)
        return fingerprint("memory://fingerprints", **options)

    assert of(b"weights") == of(b"weights")
    assert of(b"WEIGHTS") != of(b"weights")
    assert of(b"longer weights", most_remote_bytes=6) != of(b"weights", most_remote_bytes=6)


def test_a_name_on_the_hub_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_bytes(FILES["config.json"])
        (repository / "refs" / "main").write_text(commit)
        assert fingerprint("owner/model") == commit
    with pytest.raises(UserError, match="owner/other"):
        fingerprint("owner/other")
    # Names without an owner are old: the Hub is never asked for one.
    with pytest.raises(UserError, match=r"model is neither a folder nor a Hub name \(owner/name\)"):
        fingerprint("model")
    repository.rename(tmp_path / "models--model")
    assert fingerprint("model") == "b" * 40
