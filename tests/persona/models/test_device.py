"""Device and precision of a model."""

import pytest
import torch

from persona.errors import UsageError
from persona.models.device import choose_device, choose_precision, to_device

CPU = torch.device("cpu")


def test_an_unknown_precision_is_refused():
    assert choose_precision("fp32", CPU) is torch.float32
    assert choose_precision("bf16", CPU) is torch.bfloat16
    assert choose_precision("auto", CPU) in (torch.float32, torch.bfloat16)
    with pytest.raises(UsageError, match="auto, bf16, fp32, got 'fp8'"):
        choose_precision("fp8", CPU)


@pytest.mark.parametrize(("available", "expected"), [(True, "cuda"), (False, "cpu")])
def test_the_default_device_is_a_gpu_if_there_is_one(monkeypatch, available, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert choose_device() == torch.device(expected)
    assert choose_device("cpu") == CPU


def test_a_tensor_on_a_cpu_stays_there():
    tensor = torch.arange(3)
    assert to_device(tensor, CPU) is tensor
