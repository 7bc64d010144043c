"""Tiny models and empty stores for unit tests. Tests must not change the models."""

import random
from pathlib import Path

import pytest
import torch

from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import ModelFolder, resolve
from persona.storage import join
from persona.store.store import Store
from tests.models import tiny_encoder, tiny_llama, tiny_t5
from tests.stores import IDENTITY

# For models this small, starting threads takes longer than computing.
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
    """A fresh store with four buckets, on disk and on S3 in turn."""
    return Store.create(join(root, "store"), IDENTITY, 4)


@pytest.fixture
def local(tmp_path: Path) -> Store:
    """A fresh store with four buckets, on disk."""
    return Store.create(str(tmp_path / "store"), IDENTITY, 4)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between attempts."""
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.0)
