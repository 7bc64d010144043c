"""What the engine `vllm` refuses before any work begins; tests/vllm tests it with vLLM itself."""

import subprocess
import sys
from dataclasses import replace

import pytest

from persona.engines import vllm
from persona.engines.base import EngineSettings
from persona.engines.options import EngineOptions
from persona.errors import UsageError
from persona.options import Decoding, PromptOptions

OPTIONS = EngineOptions(engine="vllm", tensor_parallel=2)
SETTINGS = EngineSettings(max_input_tokens=32, prompt=PromptOptions(), precision="fp32", batch_size=2, options=OPTIONS)
GREEDY = Decoding(beams=1)
SAMPLED = Decoding(beams=1, sample=True)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(vllm, "_installed", lambda: "0.32.0")


@pytest.mark.parametrize(("version", "said"), [(None, "vLLM is not installed"), ("0.31.2", "vLLM 0.31.2 is installed")])
def test_another_version_is_refused(version, said, llama_folder, monkeypatch):
    monkeypatch.setattr(vllm, "_installed", lambda: version)
    with pytest.raises(UsageError, match=f"{said}, and version 0.32 is needed; pip install"):
        vllm.check(llama_folder, SETTINGS, GREEDY)


@pytest.mark.usefixtures("installed")
def test_what_vllm_cannot_do_with_soft_tokens_is_refused(llama_folder, t5_folder):
    vllm.check(llama_folder, SETTINGS, GREEDY)
    vllm.check(llama_folder, SETTINGS, SAMPLED)
    with pytest.raises(UsageError, match="is an encoder-decoder LLM, .* or take --engine local"):
        vllm.check(t5_folder, SETTINGS, GREEDY)
    with pytest.raises(UsageError, match="give --beams 1 instead of --beams 4"):
        vllm.check(llama_folder, SETTINGS, Decoding())
    with pytest.raises(UsageError, match="--sampling-temperature 0.001 is below 0.01"):
        vllm.check(llama_folder, SETTINGS, replace(SAMPLED, sampling_temperature=0.001))
    with pytest.raises(UsageError, match="trained with --llm-quantization nf4"):
        vllm.check(llama_folder, replace(SETTINGS, quantization="nf4"), GREEDY)


@pytest.mark.usefixtures("installed")
def test_only_sampled_answers_depend_on_the_version():
    assert vllm.identity(GREEDY) == ""
    assert vllm.identity(SAMPLED) == "vllm 0.32.0"


def test_options_are_checked():
    assert replace(OPTIONS, pipeline_parallel=3).n_devices == 6
    with pytest.raises(UsageError, match="--max-model-len 64 has no effect without --engine vllm"):
        EngineOptions(max_model_len=64)
    with pytest.raises(UsageError, match="--tensor-parallel 0"):
        replace(OPTIONS, tensor_parallel=0)
    with pytest.raises(UsageError, match="--gpu-memory-utilization 1.5: must be above 0 and at most 1"):
        replace(OPTIONS, gpu_memory_utilization=1.5)


def test_the_sockets_of_vllm_are_in_a_folder_that_goes_with_the_process(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("VLLM_RPC_BASE_PATH", raising=False)
    code = (
        "import os; from persona.engines import vllm; vllm._prepare_environment(); vllm._prepare_environment()\n"
        "folder = os.environ['VLLM_RPC_BASE_PATH']; open(folder + '/socket', 'w').close(); print(folder)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path}/vllm-")
    assert not list(tmp_path.glob("vllm-*"))
