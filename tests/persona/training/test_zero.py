"""DeepSpeed's ZeRO stages on one and two workers: equal losses, a frozen LLM, and portable checkpoints."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from persona.errors import InputError
from persona.models.resolve import ModelFolder
from persona.training import checkpoint
from persona.training.deepspeed import trainable
from tests.gloo_workers import run_together
from tests.plugs import losses
from tests.zero_worker import HELD_OUT, N_STEPS, PROGRESS, STOP, new_case_model, plain_run, run as train

Case = dict[str, Any]
# Two workers sum the same float32 gradients in another order than one, which rounds by about 2^-24 of the largest term.
# AdamW normalizes gradients, so for those that nearly cancel, rounding decides the direction of a full step. Observed:
# 2e-7 mostly, 4e-5 at worst. A real mistake exceeds the tolerance by a factor of ten, which a test below checks.
SAME = 1e-4
KINDS = ("llama", "t5")
# A checkpoint holds the plug and its moments, and gradients of the plug are clipped, whatever the LLM is.
OF_THE_PLUG = {
    "2 workers, stage 1 to 1",
    "2 workers, stage 1 to 3",
    "2 workers, stage 3 to 2",
    "2 workers, unclipped, stage 3",
    "2 workers to 1, stage 1",
    "moments forgotten",
    "1 worker, unclipped",
}
CONTRAST = 2.0
FRONT_TOKENS = 12


@pytest.fixture(scope="module")
def everything(
    encoder_folder: ModelFolder, llama_folder: ModelFolder, t5_folder: ModelFolder, tmp_path_factory
) -> dict[str, Any]:
    """All runs: first on two workers, then on one, which resumes their checkpoints."""
    out: Path = tmp_path_factory.mktemp("zero")
    found: dict[str, Any] = {kind: {"runs": {}, "out": out / kind} for kind in KINDS}
    for kind, folder in zip(KINDS, (llama_folder, t5_folder), strict=True):
        found[kind]["base"] = {"llm": str(folder.path), "encoder": str(encoder_folder.path)}
        (out / kind).mkdir()

    def run(n_workers: int, kinds: Sequence[str], folder: Path) -> None:
        named = [(kind, name, case) for kind in kinds for name, case in _cases(n_workers, out / kind, kind).items()]
        results = run_together(train, [found[kind]["base"] | case for kind, _, case in named], n_workers, folder)
        for (kind, name, _), result in zip(named, results[0], strict=True):
            found[kind]["runs"][name] = result

    run(2, KINDS, out)
    with ThreadPoolExecutor() as pool:  # one worker of each kind, side by side
        list(pool.map(lambda kind: run(1, [kind], out / kind), KINDS))
    return found


def _cases(n_workers: int, out: Path, kind: str) -> dict[str, Case]:
    """The cases of a kind of LLM. What depends on the plug alone is left to the first kind."""
    cases = _all_cases(n_workers, out)
    return {name: case for name, case in cases.items() if kind == KINDS[0] or name not in OF_THE_PLUG}


def _all_cases(n_workers: int, out: Path) -> dict[str, Case]:
    if n_workers == 1:
        return {
            "1 worker, stage 1": {"stage": 1, "save": str(out / "one-1")},
            "2 workers to 1, stage 1": {"stage": 1, "start": str(out / "two-1")},
            "2 workers to 1, stage 3 to 1": {"stage": 1, "start": str(out / "two-3")},
            "moments forgotten": {"stage": 1, "start": str(out / "two-1"), "forget_moments": True},
            "1 worker, contrast": {"stage": 1, "contrast": CONTRAST},
            "1 worker, unclipped": {"stage": 1, "clip": 0},
            "1 worker, retrieval": {"stage": 1, "front_tokens": FRONT_TOKENS},
            "1 worker, mean, bf16, stage 1": {"stage": 1, "plug": {"weights": "mean"}, "precision": "bf16"},
        }
    return {
        "2 workers, stage 1": {"stage": 1, "save": str(out / "two-1")},
        "2 workers, stage 2": {"stage": 2, "save": str(out / "two-2")},
        "2 workers, stage 3": {"stage": 3, "save": str(out / "two-3"), "shard_small": True},
        "2 workers, stage 1 to 1": {"stage": 1, "start": str(out / "two-1")},
        "2 workers, stage 1 to 3": {"stage": 3, "start": str(out / "two-1"), "shard_small": True},
        "2 workers, stage 3 to 2": {"stage": 2, "start": str(out / "two-3")},
        "2 workers, unclipped, stage 3": {"stage": 3, "clip": 0, "shard_small": True},
        "2 workers, contrast, stage 3": {"stage": 3, "contrast": CONTRAST, "shard_small": True},
        "2 workers, retrieval, stage 3": {"stage": 3, "front_tokens": FRONT_TOKENS, "shard_small": True},
        "2 workers, recomputed activations, stage 3": {"stage": 3, "recompute": True, "shard_small": True},
        "2 workers, mean, bf16, stage 3": {"stage": 3, "plug": {"weights": "mean"}, "precision": "bf16"},
    }


@pytest.fixture(params=KINDS)
def found(request, everything) -> dict[str, Any]:
    """The runs of one kind of LLM."""
    return everything[request.param]


@pytest.fixture
def first(everything) -> dict[str, Any]:
    """The runs of the first kind, which has all cases."""
    return everything[KINDS[0]]


def test_one_worker_takes_the_steps_of_plain_adamw(found):
    curve = found["runs"]["1 worker, stage 1"]["losses"]
    assert curve == pytest.approx(plain_run(found["base"]), rel=SAME)
    assert len(curve) == N_STEPS
    # Without learning there would be nothing to compare.
    assert curve[-1] < curve[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_workers_take_the_steps_of_one(found, stage):
    one, two = found["runs"]["1 worker, stage 1"], found["runs"][f"2 workers, stage {stage}"]
    assert two["losses"] == pytest.approx(one["losses"], rel=SAME)
    assert two["n_tokens"] == one["n_tokens"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_held_out_loss_does_not_depend_on_the_number_of_workers(found, stage):
    one, two = found["runs"]["1 worker, stage 1"], found["runs"][f"2 workers, stage {stage}"]
    assert two["held_out"] == pytest.approx(one["held_out"], rel=SAME)


@pytest.mark.parametrize(
    ("name", "folder", "n"),
    [("1 worker, stage 1", "one-1", 1)] + [(f"2 workers, stage {stage}", f"two-{stage}", 2) for stage in (1, 2, 3)],
)
def test_weights_of_an_earlier_step_are_measured_at_the_end(found, name, folder, n):
    model = new_case_model(found["base"])
    checkpoint.load_weights(model, found["out"] / folder)
    rows = [row for rank in range(n) for row in HELD_OUT[rank::n]]
    measured = found["runs"][name]["selected"]
    assert [nats for nats, _ in measured] == pytest.approx(losses(model, rows).tolist(), rel=SAME)
    # They are those of that step, and not of the last one.
    total = sum(nats for nats, _ in measured) / sum(n_tokens for _, n_tokens in measured)
    assert abs(total / found["runs"][name]["held_out"] - 1) > 10 * SAME


@pytest.mark.parametrize(
    ("kind", "resumed"),
    [
        (KINDS[0], "2 workers, stage 1 to 1"),
        (KINDS[0], "2 workers, stage 1 to 3"),
        (KINDS[0], "2 workers, stage 3 to 2"),
        (KINDS[0], "2 workers to 1, stage 1"),
        *((kind, "2 workers to 1, stage 3 to 1") for kind in KINDS),
    ],
)
def test_a_resumed_run_continues_the_loss_curve(everything, kind, resumed):
    found = everything[kind]
    whole, rest = found["runs"]["1 worker, stage 1"], found["runs"][resumed]
    assert rest["losses"] == pytest.approx(whole["losses"][STOP:], rel=SAME)
    assert rest["held_out"] == pytest.approx(whole["held_out"], rel=SAME)
    assert rest["progress"] == json.loads(PROGRESS.to_json())


def test_a_mistake_exceeds_the_tolerance(first):
    """Resuming without AdamW's moments changes the losses by far more than the tolerance."""
    rest, whole = first["runs"]["moments forgotten"]["losses"], first["runs"]["1 worker, stage 1"]["losses"][STOP:]
    assert max(abs(a / b - 1) for a, b in zip(rest, whole, strict=True)) > 10 * SAME


def test_with_contrast_one_worker_and_two_take_the_steps_of_plain_adamw(found):
    curve, plain = found["runs"]["1 worker, contrast"]["losses"], found["runs"]["1 worker, stage 1"]["losses"]
    assert curve == pytest.approx(plain_run(found["base"] | {"contrast": CONTRAST}), rel=SAME)
    assert found["runs"]["2 workers, contrast, stage 3"]["losses"] == pytest.approx(curve, rel=SAME)
    # The curve is eq. 6 alone, so it starts equal; the contrast changes it from the second step on.
    assert curve[0] == pytest.approx(plain[0], rel=SAME)
    assert max(abs(a / b - 1) for a, b in zip(curve, plain, strict=True)) > 10 * SAME


def test_a_gradient_norm_of_zero_clips_nothing(first):
    curve, clipped = first["runs"]["1 worker, unclipped"]["losses"], first["runs"]["1 worker, stage 1"]["losses"]
    assert curve == pytest.approx(plain_run(first["base"] | {"clip": 0}), rel=SAME)
    assert first["runs"]["2 workers, unclipped, stage 3"]["losses"] == pytest.approx(curve, rel=SAME)
    assert max(abs(a / b - 1) for a, b in zip(curve, clipped, strict=True)) > 10 * SAME


def test_with_retrieved_texts_one_worker_and_two_take_the_steps_of_plain_adamw(found):
    curve, plain = found["runs"]["1 worker, retrieval"]["losses"], found["runs"]["1 worker, stage 1"]["losses"]
    assert curve == pytest.approx(plain_run(found["base"] | {"front_tokens": FRONT_TOKENS}), rel=SAME)
    two = found["runs"]["2 workers, retrieval, stage 3"]
    assert two["losses"] == pytest.approx(curve, rel=SAME)
    assert two["held_out"] == pytest.approx(found["runs"]["1 worker, retrieval"]["held_out"], rel=SAME)
    assert max(abs(a / b - 1) for a, b in zip(curve, plain, strict=True)) > 10 * SAME


def test_no_byte_of_the_llm_changes_and_every_trained_parameter_does(found):
    for name, run in found["runs"].items():
        assert run["llm_unchanged"], name
        assert not [parameter for parameter in run["moved"] if parameter.startswith("llm.")], name
    run = found["runs"]["2 workers, stage 3"]
    trained = set(trainable(new_case_model(found["base"])))
    assert set(run["moved"]) == trained


def test_the_llm_stays_in_half_precision_while_the_plug_is_in_float32(found):
    one, two = (found["runs"][name] for name in ("1 worker, mean, bf16, stage 1", "2 workers, mean, bf16, stage 3"))
    assert one["llm_dtype"] == two["llm_dtype"] == "torch.bfloat16"
    # Equal micro-batches round equally in the LLM, except where the plug's last bits differ: then some terms change by
    # 2^-9, half a unit of bf16.
    assert two["losses"] == pytest.approx(one["losses"], rel=2**-9)


def test_a_checkpoint_holds_the_plug_and_its_moments_and_no_llm(found):
    folders = {name: found["out"] / name for name in ("one-1", "two-1", "two-2", "two-3")}
    names = {name.removeprefix("plug.") for name in trainable(new_case_model(found["base"]))}
    for folder in folders.values():
        assert sorted(file.name for file in folder.iterdir()) == [
            "moments.safetensors",
            "plug.safetensors",
            "state.json",
        ]
        assert set(load_file(folder / "plug.safetensors")) == names | {"typical_behavior", "full_strength"}
        moments = load_file(folder / "moments.safetensors")
        assert set(moments) == {f"plug.{name}:{kind}" for name in names for kind in ("exp_avg", "exp_avg_sq")}
        # After three steps every second moment is nonzero, so no parameter group was missed.
        assert not [name for name, moment in moments.items() if name.endswith("_sq") and not moment.any()]


@pytest.mark.parametrize("name", ["typical_behavior", "full_strength"])
def test_a_checkpoint_restores_what_is_not_trained(found, name):
    model = new_case_model(found["base"])
    was = model.plug.get_buffer(name).clone()
    model.plug.get_buffer(name).zero_()
    checkpoint.load_weights(model, found["out"] / "two-3")
    assert torch.equal(model.plug.get_buffer(name), was)
    assert was.any()


def test_a_checkpoint_of_another_plug_is_refused(found):
    other = new_case_model(found["base"] | {"plug": {"weights": "mean"}})
    with pytest.raises(InputError, match="is of a plug with other trained parameters; use another --run"):
        checkpoint.load_weights(other, found["out"] / "two-1")
