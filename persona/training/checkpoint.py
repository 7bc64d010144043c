"""The whole state of a training run as safetensors: weights, AdamW's moments, the step.

DeepSpeed's own checkpoints are pickles and tied to the number of workers. The plug is small, so its full tensors are
gathered from any ZeRO stage and put back into any other, on any number of workers.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from persona.errors import InputError
from persona.plug.personalized import PersonalizedLLM
from persona.training.step import trainable

WEIGHTS, MOMENTS, STATE = "plug.safetensors", "moments.safetensors", "state.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_TYPICAL = "typical_behavior"  # measured once, not trained


def save(engine: Any, folder: Path, state: dict[str, Any], *, write: bool) -> None:
    """Gathers the state; all workers call it, the one with `write` writes it to `folder`.

    `state` is what the loop needs besides: it must hold `step`, the number of optimizer steps taken.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    _link_moments(engine)
    weights: dict[str, torch.Tensor] = {}
    moments: dict[str, torch.Tensor] = {}
    for name, parameter in trainable(engine.module).items():
        full = safe_get_full_fp32_param(parameter)
        found = {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
        if write:
            weights[name.removeprefix("plug.")] = full.detach().cpu().clone()
            moments.update({f"{name}:{key}": moment.detach().cpu().clone() for key, moment in found.items()})
    if write:
        weights[_TYPICAL] = engine.module.plug.typical_behavior.cpu()
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / WEIGHTS)
        save_file(moments, folder / MOMENTS)
        (folder / STATE).write_text(json.dumps(state))


def load_weights(model: PersonalizedLLM, folder: Path) -> dict[str, Any]:
    """Puts saved weights into a model, before DeepSpeed takes it over.

    Returns:
        the `state` that was saved.

    Raises:
        InputError: the checkpoint belongs to another set of trained parameters.
    """
    weights = load_file(folder / WEIGHTS)
    if set(weights) != {_TYPICAL, *(name.removeprefix("plug.") for name in trainable(model))}:
        raise InputError(f"{folder}: this checkpoint is of another plug than the one to be trained; use another --run")
    model.plug.load_state_dict(weights)
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def load_moments(engine: Any, folder: Path, *, step: int) -> None:
    """Puts AdamW's saved moments, after `step` steps, into a fresh engine; all workers call it."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    _link_moments(engine)
    moments = load_file(folder / MOMENTS)
    for name, parameter in trainable(engine.module).items():
        for key in _MOMENTS:
            moment = moments[f"{name}:{key}"]
            if engine.zero_optimization_stage() == 3:
                # The function for the full tensor fails where its size does not divide among the workers.
                flat = moment.flatten()
                padded = torch.nn.functional.pad(flat, (0, -flat.numel() % engine.world_size))
                piece = padded.chunk(engine.world_size)[engine.global_rank]
                safe_set_local_optimizer_state(parameter, piece.to(engine.device), key)
            else:
                safe_set_full_optimizer_state(parameter, moment.to(engine.device), key)
    # AdamW's bias correction counts steps beside the moments.
    for entry in engine.optimizer.optimizer.state.values():
        entry["step"] = torch.tensor(float(step))


def _link_moments(engine: Any) -> None:
    """Makes AdamW's moments of all parameter groups reachable through DeepSpeed's `safe_*` functions.

    AdamW makes them in its first step, and after that step of the *first* group ZeRO-1 and ZeRO-2 link the moments of
    all groups, once: those of the other groups are missed. DeepSpeed has no public way to link them again.
    """
    zero = engine.optimizer
    stage_3 = engine.zero_optimization_stage() == 3
    for flat in zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups:
        entry = zero.optimizer.state[flat]
        if "exp_avg" not in entry:
            entry.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(flat), exp_avg_sq=torch.zeros_like(flat))
    if not stage_3:
        zero._hp_optimizer_states_linked = False  # noqa: SLF001
        zero._lazy_init_hp_params_optimizer_state()  # noqa: SLF001
