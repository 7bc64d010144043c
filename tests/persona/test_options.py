"""Options refuse values that cannot work, naming the flag; and the seed of a request."""

from dataclasses import replace

import pytest

from persona.errors import UsageError
from persona.options import Decoding, PlugOptions, PromptOptions, RetrievalOptions, TrainingOptions

SAMPLING = Decoding(beams=1, sample=True, seed=7)


def test_the_defaults_can_work():
    PlugOptions(weights="attention", learn_temperature=True)
    RetrievalOptions()
    TrainingOptions(empty_history=1, alignment=0)
    assert (TrainingOptions().n_steps(100), TrainingOptions().n_steps(15), Decoding().beams) == (2 * (100 // 16), 0, 4)


def test_the_default_batch_can_be_split_over_the_gpus_of_a_node():
    for n_workers in (1, 2, 4, 8, 16):
        TrainingOptions().check_workers(n_workers)
        TrainingOptions(micro_batch="auto").check_workers(n_workers)
    TrainingOptions(contrast=0.5).check_workers(8)
    with pytest.raises(UsageError, match="--contrast 0.5 pairs a worker's requests: 1 a step must be even"):
        TrainingOptions(contrast=0.5).check_workers(16)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"persona_tokens": 0}, "--persona-tokens 0"),
        ({"persona_gain": 0.0}, "--persona-gain 0.0: must be above 0"),
        ({"persona_gain": float("inf")}, "--persona-gain inf: must be above 0"),
        ({"temperature": 0.0}, "--temperature 0.0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"temperature": float("inf")}, "--temperature inf"),
        ({"weights": "mean", "learn_temperature": True}, "--learn-temperature"),
    ],
)
def test_plug_options_that_cannot_work_are_refused(changes, flag):
    with pytest.raises(UsageError, match=flag):
        replace(PlugOptions(), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_format": "plain", "system": "Write."}, "--system Write. has no effect without --prompt-format chat"),
        ({"prompt_format": "plain", "template_date": "2026-01-31"}, "--template-date 2026-01-31 has no effect"),
        ({"template_date": "31.1.2026"}, "--template-date 31.1.2026: must be a date like 2026-01-31"),
        ({"template_argument": ("thinking",)}, "--template-argument thinking: must be KEY=VALUE"),
        ({"template_argument": ("a-b=1",)}, "--template-argument a-b=1: must be KEY=VALUE"),
        ({"template_argument": ("a=1", "a=2")}, "--template-argument a=1: must be KEY=VALUE, each KEY once"),
        ({"template_argument": ("messages=1",)}, "--template-argument messages=1: .* none of messages, tools"),
    ],
)
def test_prompt_options_that_cannot_work_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        replace(PromptOptions(), **changes)


def test_arguments_of_a_chat_template_are_json_or_text():
    given = ("thinking=false", "n=3", "text=a=b", 'quoted="3"', "empty=")
    arguments = PromptOptions(template_argument=given).template_arguments()
    assert arguments == {"thinking": False, "n": 3, "text": "a=b", "quoted": "3", "empty": ""}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 20}, r"--global-batch 20 .* --workers 3 × --micro-batch 8 = 24"),
        ({"global_batch": 20, "micro_batch": "auto"}, "--global-batch 20 is not a multiple of --workers 3; change"),
        ({"micro_batch": 0}, "--micro-batch 0: must be 1 or more"),
        ({"micro_batch": "auto", "zero_stage": 3}, "--micro-batch auto is for --zero-stage 1 and 2"),
        ({"epochs": 0}, "--epochs 0: must be 1 or more"),
        ({"zero_stage": 0}, "--zero-stage 0: must be 1, 2 or 3"),
        ({"warmup": 1.0}, "--warmup 1.0"),
        ({"persona_warmup": -1}, "--persona-warmup -1: must be 0 or more"),
        ({"history_dropout": -0.1}, "--history-dropout -0.1"),
        ({"empty_history": 1.1}, "--empty-history 1.1: must be from 0 to 1"),
        ({"empty_history": float("nan")}, "--empty-history nan"),
        ({"alignment": 1.0}, "--alignment 1.0"),
        ({"contrast": -0.5}, "--contrast -0.5: must be 0"),
        ({"contrast": float("inf")}, "--contrast inf"),
        ({"contrast": 0.5, "empty_history": 1.0, "alignment": 0.0}, "leaves no history for --contrast 0.5"),
        ({"alignment": 0.3, "empty_history": 1.0}, "leaves no history for --alignment 0.3; add --alignment 0"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0"),
        ({"query_learning_rate": float("nan")}, "--query-learning-rate nan"),
        ({"max_gradient_norm": float("inf")}, "--max-gradient-norm inf"),
        ({"max_gradient_norm": -1.0}, "--max-gradient-norm -1.0: must be 0 "),
        ({"weight_decay": -1.0}, "--weight-decay -1.0"),
    ],
)
def test_training_options_that_cannot_work_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        replace(TrainingOptions(global_batch=48), **changes).check_workers(3)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"beams": 0}, "--beams 0"),
        ({"sample": True}, "--sample .* needs --beams 1, not 4"),
        ({"sampling_temperature": 0.0}, "--sampling-temperature 0.0"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"top_p": 1.5}, "--top-p 1.5"),
        ({"top_p": 0.9}, "--top-p 0.9 has no effect without --sample"),
        ({"seed": 7}, "--seed 7 has no effect without --sample"),
    ],
)
def test_decoding_that_cannot_work_is_refused(changes, flag):
    with pytest.raises(UsageError, match=flag):
        replace(Decoding(), **changes)


def test_soft_tokens_are_the_personas_and_at_most_one_instruction():
    assert PlugOptions(persona_tokens=3).n_soft == 4
    assert PlugOptions(persona_tokens=3, instruction="projected").n_soft == 4
    assert PlugOptions(persona_tokens=3, instruction="none").n_soft == 3


def test_a_requests_seed_depends_on_its_id_and_on_the_seed_alone():
    decoding = SAMPLING
    assert decoding.row_seed("a") == replace(decoding, max_new_tokens=3, top_p=0.5).row_seed("a")
    assert len({decoding.row_seed("a"), decoding.row_seed("b"), replace(decoding, seed=8).row_seed("a")}) == 3
    # Seed and id must not run together: seed 1 of "12" is not seed 11 of "2".
    assert replace(decoding, seed=1).row_seed("12") != replace(decoding, seed=11).row_seed("2")
    assert 0 <= decoding.row_seed("é \n") < 2**63
