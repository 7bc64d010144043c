"""Checkpoints of a training run: weights and AdamW's moments as safetensors, progress as JSON.

DeepSpeed's own checkpoints are pickles and tied to the number of workers. The plug is small, so its full tensors are
gathered from any ZeRO stage and restored into any other, on any number of workers.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from persona.errors import InputError
from persona.plug.personalized import PersonalizedLLM
from persona.training.deepspeed import trainable

WEIGHTS, MOMENTS, STATE = "plug.safetensors", "moments.safetensors", "state.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(kw_only=True)
class Progress:
    """How far a run has come, and the measurements that a resumed run must not repeat.

    Attributes:
        step: optimizer steps taken; seconds: time in them; tokens: target tokens seen.
        training_curve, validation_curve: pairs of step and loss in nats a token.
        none_curve: the held-out loss without any persona, at the same steps as validation_curve.
        validation_loss: the latest one; None before the first validation.
        micro_batch: requests of a pass; 0 before it is settled.
        notes: what the summary says about faster ways that this LLM could not take.
        token_norm, scale: as in `Plug`, measured at the start: another machine may measure a little differently.
        llm_width: D.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    training_curve: list[tuple[int, float]] = field(default_factory=list)
    validation_curve: list[tuple[int, float]] = field(default_factory=list)
    none_curve: list[tuple[int, float]] = field(default_factory=list)
    validation_loss: float | None = None
    micro_batch: int = 0
    notes: list[str] = field(default_factory=list)
    token_norm: float
    scale: float
    llm_width: int

    def add_step(self, loss: float, *, n_tokens: int, seconds: float) -> None:
        """Counts one optimizer step."""
        self.step += 1
        self.seconds += seconds
        self.tokens += n_tokens
        self.training_curve.append((self.step, round(loss, 5)))

    def add_validation(self, loss: float, *, none: float | None = None) -> None:
        """Records the held-out loss after the latest step, and that of the same rows without any persona."""
        self.validation_loss = loss
        self.validation_curve.append((self.step, round(loss, 5)))
        if none is not None:
            self.none_curve.append((self.step, round(none, 5)))

    def has_converged(self, patience: int) -> bool:
        """Whether the last `patience` validations all had no lower held-out loss than one before them; 0 is never.

        It follows from the curve alone, so a resumed run stops where an undisturbed one does.
        """
        losses = [loss for _, loss in self.validation_curve]
        return 0 < patience < len(losses) and min(losses[:-patience]) <= min(losses[-patience:])

    def to_json(self) -> str:
        """The text of `state.json`."""
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None})

    @classmethod
    def read(cls, folder: Path) -> "Progress":
        """Reads the `state.json` of a checkpoint."""
        fields = json.loads((folder / STATE).read_text())
        names = ("training_curve", "validation_curve", "none_curve")
        curves = {name: [(step, loss) for step, loss in fields[name]] for name in names}
        return cls(**{**fields, **curves})


def save(engine: Any, folder: Path, progress: Progress, *, write: bool) -> None:
    """Gathers a checkpoint; all workers call it together, the one with `write` writes it to `folder`."""
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
        kept = engine.module.plug.state_dict()
        weights |= {name: kept[name].cpu() for name in kept.keys() - weights.keys()}  # buffers: not trained
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / WEIGHTS)
        save_file(moments, folder / MOMENTS)
        (folder / STATE).write_text(progress.to_json())


def load_weights(model: PersonalizedLLM, folder: Path) -> Progress:
    """Loads saved weights into a model, before DeepSpeed takes it over, and returns the saved progress.

    Raises:
        InputError: the checkpoint has another set of trained parameters than the model.
    """
    weights = load_file(folder / WEIGHTS)
    if set(weights) != set(model.plug.state_dict()):
        raise InputError(f"{folder}: this checkpoint is of a plug with other trained parameters; use another --run")
    model.plug.load_state_dict(weights)
    return Progress.read(folder)


def load_selected(engine: Any, folder: Path) -> None:
    """Loads saved weights into an engine, to measure them; it cannot train on. All workers call it together."""
    import deepspeed

    engine.empty_partition_cache()  # under ZeRO-3, some weights may still be gathered
    parameters = list(trainable(engine.module).values())
    # Without ZeRO-3 this context does nothing, so each worker loads all weights.
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0), torch.no_grad():
        load_weights(engine.module, folder)


def load_moments(engine: Any, folder: Path, *, step: int) -> None:
    """Loads AdamW's saved moments into a new engine, as after `step` steps; all workers call it together."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    _link_moments(engine)
    moments = load_file(folder / MOMENTS)
    for name, parameter in trainable(engine.module).items():
        for key in _MOMENTS:
            moment = moments[f"{name}:{key}"]
            if engine.zero_optimization_stage() == 3:
                # The function for full tensors fails when the size is not a multiple of the number of workers.
                flat = moment.flatten()
                padded = torch.nn.functional.pad(flat, (0, -flat.numel() % engine.world_size))
                piece = padded.chunk(engine.world_size)[engine.global_rank]
                safe_set_local_optimizer_state(parameter, piece.to(engine.device), key)
            else:
                safe_set_full_optimizer_state(parameter, moment.to(engine.device), key)
    # AdamW's bias correction uses its own count of steps; a fused AdamW on a GPU reads it there.
    for entry in engine.optimizer.optimizer.state.values():
        entry["step"] = torch.tensor(float(step), device=entry["exp_avg"].device)


def _link_moments(engine: Any) -> None:
    """Makes AdamW's moments of all parameter groups visible to DeepSpeed's `safe_*` functions.

    AdamW creates moments in its first step. ZeRO-1 and ZeRO-2 link the moments of all groups only once, after the
    *first* group's step, when those of the other groups do not exist yet. DeepSpeed has no public way to link again.
    """
    zero = engine.optimizer
    stage_3 = engine.zero_optimization_stage() == 3
    for flat in zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups:
        entry = zero.optimizer.state[flat]
        if "exp_avg" not in entry:
            moments = {name: torch.zeros_like(flat) for name in _MOMENTS}
            entry.update(step=torch.tensor(0.0, device=flat.device), **moments)
    if not stage_3:
        zero._hp_optimizer_states_linked = False  # noqa: SLF001
        zero._lazy_init_hp_params_optimizer_state()  # noqa: SLF001
