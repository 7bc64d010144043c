"""Estimated operations equal those that torch counts when the models run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from persona import cost
from tests.models import tiny_encoder, tiny_llama, tiny_t5


def counted(model: Any, **batch: Any) -> int:
    """Operations of a forward pass, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch)
    return counter.get_total_flops()


def load(kind: Any, folder: Path) -> Any:
    return kind.from_pretrained(folder, attn_implementation="eager").eval()


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = AutoConfig.from_pretrained(folder).to_dict()
    return found


def ids(n_rows: int, n_tokens: int) -> torch.Tensor:
    return torch.ones(n_rows, n_tokens, dtype=torch.long)


def test_an_encoder_costs_what_torch_counts(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "encoder")
    model = load(AutoModel, folder)
    model.pooler = None
    assert cost.encoder_flops(config(folder), n_texts=3, tokens=20) == counted(model, input_ids=ids(3, 20))


def test_a_decoder_costs_what_torch_counts(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "llama")
    expected = counted(load(AutoModelForCausalLM, folder), input_ids=ids(3, 20))
    found = cost.llm_flops(config(folder), n_requests=3, inputs=15, outputs=5)
    assert found == pytest.approx(expected, rel=0.01)  # torch counts a few products of the rotary embedding


def test_an_encoder_decoder_costs_what_torch_counts(tmp_path: Path) -> None:
    folder = tiny_t5(tmp_path / "t5")
    model = load(AutoModelForSeq2SeqLM, folder)
    expected = counted(model, input_ids=ids(3, 20), decoder_input_ids=ids(3, 5))
    assert cost.llm_flops(config(folder), n_requests=3, inputs=20, outputs=5) == pytest.approx(expected, rel=1e-6)


def test_training_goes_through_the_frozen_model_and_back(tmp_path: Path) -> None:
    llm, encoder = config(tiny_llama(tmp_path / "llama")), config(tiny_encoder(tmp_path / "encoder"))
    forward = cost.llm_flops(llm, n_requests=7, inputs=30, outputs=5)
    queries = cost.encoder_flops(encoder, n_texts=7, tokens=10)
    found = cost.training_flops(llm, encoder, n_requests=7, inputs=30, outputs=5, query=10, epochs=2)
    assert found == 2 * (2 * forward + 3 * queries)


def test_beams_multiply_the_cost_of_the_output_only(tmp_path: Path) -> None:
    llm = config(tiny_llama(tmp_path / "llama"))
    greedy, four, read = (
        cost.llm_flops(llm, n_requests=1, inputs=50, outputs=outputs, beams=beams)
        for outputs, beams in ((10, 1), (10, 4), (0, 1))
    )
    assert greedy - read < four - read < 4.1 * (greedy - read)


def test_hours_fall_with_the_rate() -> None:
    assert cost.gpu_hours(3600 * 40e12, tflops=40) == 1.0
    assert cost.gpu_hours(3600 * 40e12, tflops=80) == 0.5
    with pytest.raises(ValueError, match="must be above 0"):
        cost.gpu_hours(1e12, tflops=0)
