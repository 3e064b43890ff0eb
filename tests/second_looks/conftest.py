"""Images, detections and models of the tests of `crops`."""

from pathlib import Path
from typing import Any

import pytest

from tests.second_looks.scored import write_scored
from tests.second_looks.tiny_models import write_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images table `images` and detections table `found`."""
    return write_scored(tmp_path_factory.mktemp("crops"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Function that returns the folder of a tiny model, written once."""
    folder = tmp_path_factory.mktemp("models")

    def model(name: str) -> str:
        return str(folder / name) if (folder / name).exists() else write_model(name, folder / name)

    return model
