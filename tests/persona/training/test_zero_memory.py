"""Under ZeRO-3 no worker ever holds the whole LLM, and training is that of one process."""

import sys

import pytest
import torch

from tests.benchmarks.zero_memory import compare

N_WORKERS = 4  # the share of each is far below that of two, let alone the whole
pytestmark = [pytest.mark.soak, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The LLM's bytes (about 200 MB, no tensor above 2 %), and what was measured by number of workers."""
    return compare(tmp_path_factory.mktemp("zero_memory"), [1, N_WORKERS], width=512, layers=16, vocabulary=512)


def test_one_process_holds_the_whole_llm(measured):
    n_bytes, found = measured
    assert found[1]["loading"] > 0.95 * n_bytes


def test_a_worker_loads_its_share_of_the_llm_and_little_more(measured):
    n_bytes, found = measured
    assert found[N_WORKERS]["loading"] < (1 / N_WORKERS + 1 / 8) * n_bytes


def test_a_worker_trains_with_its_share_of_the_llm_and_little_more(measured):
    """Optimizer, activations and libraries take as much as in one process; a gathered part takes the rest."""
    n_bytes, found = measured
    saved = found[1]["training"] - found[N_WORKERS]["training"]
    assert saved > (1 - 1 / N_WORKERS - 1 / 4) * n_bytes


def test_sharded_training_takes_the_steps_of_one_process(measured):
    one, many = measured[1][1], measured[1][N_WORKERS]
    assert many["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert set(many["weights"]) == set(one["weights"])
    for name, weight in one["weights"].items():
        torch.testing.assert_close(many["weights"][name], weight, rtol=1e-3, atol=1e-4)
