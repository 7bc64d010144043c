"""What DeepSpeed needs for a plug: the trained parameters, their optimizer, settings, and sums over workers."""

from typing import Any

import torch
from torch import nn

from persona.options import TrainingOptions
from persona.plug.personalized import PersonalizedLLM

_PRETRAINED = ("plug.query_encoder.", "plug.query_head.")


def trainable(model: PersonalizedLLM) -> dict[str, nn.Parameter]:
    """The trained parameters by name: all of the plug's, none of the LLM's."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def new_optimizer(model: PersonalizedLLM, options: TrainingOptions) -> torch.optim.AdamW:
    """AdamW over the plug, with a separate learning rate for the query encoder, which is pretrained."""
    named = trainable(model)
    query = [parameter for name, parameter in named.items() if name.startswith(_PRETRAINED)]
    rest = [parameter for name, parameter in named.items() if not name.startswith(_PRETRAINED)]
    groups = [{"params": rest, "lr": options.learning_rate, "peak_lr": options.learning_rate}]
    if query:
        groups.append({"params": query, "lr": options.query_learning_rate, "peak_lr": options.query_learning_rate})
    return torch.optim.AdamW(groups, weight_decay=options.weight_decay, fused=True)


def deepspeed_settings(options: TrainingOptions, n_workers: int) -> dict[str, Any]:
    """DeepSpeed's configuration. It has no bf16 section: the plug stays in float32, the LLM in its own precision."""
    return {
        "train_batch_size": options.global_batch,
        "train_micro_batch_size_per_gpu": options.micro_batch,
        "gradient_accumulation_steps": options.global_batch // (n_workers * options.micro_batch),
        "gradient_clipping": options.max_gradient_norm,
        "zero_optimization": {"stage": options.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
    }


def new_engine(model: PersonalizedLLM, options: TrainingOptions, settings: dict[str, Any]) -> Any:
    """A DeepSpeed engine over the model; all workers call it together. `settings` are `deepspeed_settings`."""
    import deepspeed

    # On CPUs this op is compiled with g++ at every start, and only DeepSpeed's own launcher uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(model=model, optimizer=new_optimizer(model, options), config=settings)
    return engine


def sum_over_workers(value: float, device: torch.device) -> float:
    """The sum of a number over all workers."""
    return _reduce(value, device, torch.distributed.ReduceOp.SUM)


def max_over_workers(value: float, device: torch.device) -> float:
    """The maximum of a number over all workers."""
    return _reduce(value, device, torch.distributed.ReduceOp.MAX)


def _reduce(value: float, device: torch.device, operation: Any) -> float:
    if not torch.distributed.is_initialized():
        return value
    tensor = torch.tensor(float(value), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor, operation)
    return float(tensor)
