"""One tiny checkpoint for all tests here."""

from pathlib import Path

import pytest

from tiny_llama import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))
