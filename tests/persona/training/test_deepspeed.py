"""What DeepSpeed gets: exactly the plug's parameters, two learning rates, consistent batch sizes."""

from dataclasses import replace

import pytest
import torch

from persona.models.resolve import resolve
from persona.options import TrainingOptions
from persona.training.deepspeed import deepspeed_settings, new_optimizer, trainable
from tests.encoders import sentence_transformer
from tests.plugs import new_model

OPTIONS = TrainingOptions()
LAYER = [
    f"{part}.{kind}"
    for part in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "attention.output.LayerNorm",
        "intermediate.dense",
        "output.dense",
        "output.LayerNorm",
    )
    for kind in ("weight", "bias")
]
QUERY_ENCODER = [
    *(f"plug.query_encoder.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")),
    *(f"plug.query_encoder.embeddings.LayerNorm.{kind}" for kind in ("weight", "bias")),
    *(f"plug.query_encoder.encoder.layer.{number}.{name}" for number in range(2) for name in LAYER),
]
PROJECTOR = [f"{layer}.{kind}" for layer in ("inner", "outer") for kind in ("weight", "bias")]
ALWAYS = [f"plug.projector.{name}" for name in PROJECTOR]
TRAINED = {
    "the paper's": ({}, [*ALWAYS, "plug.instruction", *QUERY_ENCODER]),
    "mean": ({"weights": "mean"}, [*ALWAYS, "plug.instruction"]),
    "mean, no instruction": ({"weights": "mean", "instruction": "none"}, ALWAYS),
    "learned temperature": (
        {"learn_temperature": True},
        [*ALWAYS, "plug.instruction", "plug.log_temperature", *QUERY_ENCODER],
    ),
    "recency": ({"recency": True}, [*ALWAYS, "plug.instruction", "plug.recency_slope", *QUERY_ENCODER]),
    "mean and recency": ({"weights": "mean", "recency": True}, [*ALWAYS, "plug.instruction", "plug.recency_slope"]),
    "query token": (
        {"weights": "mean", "query_token": True},
        [*ALWAYS, "plug.instruction", *(f"plug.query_projector.{name}" for name in PROJECTOR), *QUERY_ENCODER],
    ),
    "projected instruction": (
        {"instruction": "projected"},
        [*ALWAYS, "plug.instruction", *(f"plug.instruction_projector.{name}" for name in PROJECTOR), *QUERY_ENCODER],
    ),
}


@pytest.mark.parametrize(("options", "names"), TRAINED.values(), ids=TRAINED)
def test_exactly_these_parameters_are_trained(encoder_folder, llm, options, names):
    model = new_model(encoder_folder, llm, **options)
    assert sorted(trainable(model)) == sorted(names)
    in_optimizer = [p for group in new_optimizer(model, OPTIONS).param_groups for p in group["params"]]
    assert {id(p) for p in in_optimizer} == {id(p) for p in trainable(model).values()}
    assert len(in_optimizer) == len(names)


def test_the_query_encoder_has_a_separate_learning_rate(encoder_folder, llm):
    model = new_model(encoder_folder, llm)
    rates = replace(OPTIONS, learning_rate=1e-3, query_learning_rate=2e-5, weight_decay=0.1)
    rest, query = new_optimizer(model, rates).param_groups
    assert (rest["peak_lr"], query["peak_lr"], rest["weight_decay"], query["weight_decay"]) == (1e-3, 2e-5, 0.1, 0.1)
    assert {id(p) for p in query["params"]} == {id(p) for p in model.plug.query_encoder.parameters()}


def test_dense_layers_behind_the_query_encoder_are_trained_at_its_rate(tmp_path, llm):
    folder = sentence_transformer(tmp_path, dense=[(24, torch.nn.Tanh())])
    model = new_model(resolve(str(folder), flag="--encoder"), llm, pooling="mean", width=24)
    _, query = new_optimizer(model, OPTIONS).param_groups
    assert "plug.query_head.layers.0.linear.weight" in trainable(model)
    assert {id(p) for p in model.plug.query_head.parameters()} <= {id(p) for p in query["params"]}


@pytest.mark.parametrize("n_workers", [4, 32])  # a share of 16, in two passes; and of 2, less than a micro-batch
def test_batch_sizes_in_the_deepspeed_settings_are_consistent(n_workers):
    options = TrainingOptions(global_batch=64, micro_batch=8, zero_stage=2, max_gradient_norm=0.5)
    options.check_workers(n_workers)
    settings = deepspeed_settings(options, n_workers=n_workers)
    assert settings["train_batch_size"] == 64
    assert settings["train_micro_batch_size_per_gpu"] * settings["gradient_accumulation_steps"] * n_workers == 64
    assert settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"]["stage"] == 2
    assert "bf16" not in settings
