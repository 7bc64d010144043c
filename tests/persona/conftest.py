"""Tiny models that the tests of models, plug and LLM share; nobody may change them."""

import pytest
import torch

from persona.llm import FrozenLLM
from persona.models import ModelFolder, resolve
from tests.models import tiny_encoder, tiny_llama, tiny_t5

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
