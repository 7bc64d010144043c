"""Tiny models and empty stores for the tests of classes; nobody may change the models."""

from pathlib import Path

import pytest
import torch

from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import ModelFolder, resolve
from persona.storage import join, retry
from persona.store.store import Store
from tests.models import tiny_encoder, tiny_llama, tiny_t5
from tests.stores import IDENTITY

# Models so small are computed faster than threads can be started, and another process may need the cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return resolve(str(tiny_encoder(tmp_path_factory.mktemp("encoder"))), flag="--encoder")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return resolve(str(tiny_llama(tmp_path_factory.mktemp("llama"))), flag="--llm")


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return resolve(str(tiny_t5(tmp_path_factory.mktemp("t5"))), flag="--llm")


@pytest.fixture(params=["llama", "t5"])
def llm_folder(request: pytest.FixtureRequest) -> ModelFolder:
    """Each kind of LLM in turn."""
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture
def llm(llm_folder: ModelFolder) -> FrozenLLM:
    """A fresh LLM of each kind in turn, in float32."""
    return FrozenLLM.load(llm_folder, precision="fp32", device="cpu")


@pytest.fixture
def store(root: str) -> Store:
    """A fresh store of four buckets, once on the disk and once on the S3 server."""
    return Store.create(join(root, "store"), IDENTITY, 4)


@pytest.fixture
def local(tmp_path: Path) -> Store:
    """A fresh store of four buckets on the disk."""
    return Store.create(str(tmp_path / "store"), IDENTITY, 4)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause between two attempts to commit."""
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: 0.0)
