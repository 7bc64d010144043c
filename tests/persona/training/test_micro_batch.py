"""The size of a pass for --micro-batch auto: what memory allows, found without a trace."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from persona.errors import InputError
from persona.options import TrainingOptions
from persona.training.deepspeed import trainable
from persona.training.micro_batch import choose, largest_on_all, largest_that_fits, settled, sizes
from tests.plugs import ROWS, new_model

AUTO = TrainingOptions(global_batch=12, micro_batch="auto")
# Of each text the longest one.
LONGEST = {**ROWS[3], "input": ROWS[5]["input"], "rejected": "bad " * 9}


@contextmanager
def memory_left(n_bytes: int) -> Iterator[None]:
    """This process can take this much more memory."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_a_pass_is_a_divisor_of_the_share():
    assert sizes(12) == [12, 6, 4, 3, 2, 1]
    assert sizes(1) == [1]


@pytest.mark.parametrize(("share", "expected"), [(64, 8), (12, 6), (7, 7), (22, 2), (1, 1)])
def test_without_a_gpu_a_pass_has_at_most_eight_requests(encoder_folder, llama, share, expected):
    assert choose(new_model(encoder_folder, llama), LONGEST, AUTO, share) == expected


def test_a_number_and_a_resumed_run_need_no_trial():
    number = TrainingOptions(micro_batch=4)
    assert (settled(number, 16, 8), settled(number, 2, 0)) == (4, 2)
    assert (settled(AUTO, 16, 8), settled(AUTO, 16, 0)) == (8, None)
    assert settled(AUTO, 12, 8) is None  # it has another number of workers now


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of the process")
def test_the_largest_size_that_fits_is_taken(encoder_folder, llama):
    model = new_model(encoder_folder, llama)
    with memory_left(2**28):
        assert largest_that_fits(model, LONGEST, AUTO, [4096, 6, 1]) == 6
        assert largest_that_fits(model, LONGEST, AUTO, [4096]) == 0
    assert largest_that_fits(model, LONGEST, AUTO, [12, 6]) == 12


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of the process")
def test_when_no_size_fits_the_error_says_what_needs_less_memory(encoder_folder, llama):
    model = new_model(encoder_folder, llama)
    with (
        memory_left(2**28),
        pytest.raises(InputError, match="^--micro-batch auto: .* the longest request; take --activation-checkpointing"),
    ):
        largest_on_all(model, LONGEST, AUTO, [4096])
    assert largest_on_all(model, LONGEST, AUTO, [6, 1]) == 6


@pytest.mark.parametrize("losses", [{}, {"contrast": 0.5}, {"preference": 0.1}])
def test_a_trial_leaves_no_trace(encoder_folder, llm, losses):
    model = new_model(encoder_folder, llm)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    calls: list[int] = []
    model.llm.model.register_forward_hook(lambda *_: calls.append(torch.rand(1).numel()))  # draws a random number
    options = TrainingOptions(global_batch=6, micro_batch="auto", **losses)
    assert largest_that_fits(model, LONGEST, options, [6, 3]) == 6
    assert calls == [1]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainable(model).values())


@pytest.fixture
def llama(llama_folder):
    """A fresh Llama."""
    from persona.models.frozen_llm import FrozenLLM

    return FrozenLLM.load(llama_folder, precision="fp32", device="cpu")
