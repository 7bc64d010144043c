"""What DeepSpeed needs for a plug: settings, the trained parameters, their optimizer, and sums over workers.

Under ZeRO-3 each worker holds its share of every weight of the LLM. The LLM is created that way (`load_llm`);
while it computes, DeepSpeed gathers the weights of a few modules at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from persona.errors import InputError, PersonaError
from persona.models import loading
from persona.models.device import choose_device, choose_precision
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import ModelFolder
from persona.options import Precision, TrainingOptions
from persona.plug.personalized import PersonalizedLLM

# Under ZeRO-3, DeepSpeed keeps gathered weights that are needed again soon, and gathers the next ones ahead, up to this
# share of the LLM and this number of parameters (DeepSpeed's default). A single larger tensor is gathered alone.
_LLM_SHARES, _MAX_LIVE = 16, 10**9

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
    size = options.pass_size(options.global_batch // n_workers)
    return {
        "train_batch_size": options.global_batch,
        "train_micro_batch_size_per_gpu": size,
        "gradient_accumulation_steps": options.global_batch // (n_workers * size),
        "gradient_clipping": options.max_gradient_norm,
        "zero_optimization": {"stage": options.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
        # Its timer would wait for the GPU twice a pass.
        "timers": {"throughput": {"enabled": False}},
    }


def load_llm(
    folder: ModelFolder,
    settings: dict[str, Any],
    *,
    precision: Precision = "auto",
    device: str | None = None,
    **others: Any,
) -> FrozenLLM:
    """The frozen LLM; under ZeRO-3 this worker's share of it, which all workers load together.

    A worker allocates one module at a time and keeps its share of it. The first worker reads the files, which are
    mapped into memory, and broadcasts tensor after tensor.

    Args:
        folder: the LLM.
        settings: `deepspeed_settings`.
        precision: of the LLM.
        device: of the LLM, or of this worker's share.
        others: arguments of `FrozenLLM.load`.

    Raises:
        InputError: the LLM cannot be loaded, or not as shares.
    """
    load = partial(FrozenLLM.load, folder, precision=precision, device=device, **others)
    if settings["zero_optimization"]["stage"] != 3:
        return load()
    advice = "take --zero-stage 1 or 2, or another LLM"
    if getattr(loading.load_config(folder), "quantization_config", None) is not None:
        raise InputError(f"--zero-stage 3: the weights of {folder.name!r} are quantized, so they stay whole; {advice}")
    try:
        with _sharded_creation(settings, choose_precision(precision, choose_device(device))):
            llm = load()
    except PersonaError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(
            f"--zero-stage 3: transformers cannot create {folder.name!r} as shares ({reason}); {advice}"
        ) from error
    # With whole models, transformers keeps these weights in float32.
    names = getattr(llm.model, "_keep_in_fp32_modules_strict", None) or ()
    for name, parameter in llm.model.named_parameters():
        if parameter.dtype != torch.float32 and any(part in name for part in names):
            raise InputError(
                f"--zero-stage 3 loads all weights in {llm.dtype}, but {folder.name!r} needs {name} in float32; "
                f"add --precision fp32, {advice}"
            )
    return llm


@contextmanager
def _sharded_creation(settings: dict[str, Any], dtype: torch.dtype) -> Iterator[None]:
    """Whatever transformers loads inside is created as shares of this worker, in `dtype`."""
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    _skip_shared_memory_op()
    deepspeed.init_distributed(verbose=False)  # takes over torch's process group
    # transformers only keeps a weak reference. Without a bf16 section, every tensor would become float32.
    active = HfDeepSpeedConfig({**settings, "bf16": {"enabled": dtype == torch.bfloat16}})
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del active


def gathered(module: nn.Module) -> Any:
    """A context in which the weights of one module are whole, for use before an engine gathers them by itself.

    Changes to them are lost. All workers enter it together. Without ZeRO-3, it does nothing.
    """
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(module.parameters()))


def new_engine(model: PersonalizedLLM, options: TrainingOptions, settings: dict[str, Any]) -> Any:
    """A DeepSpeed engine over the model; all workers call it together. `settings` are `deepspeed_settings`."""
    import deepspeed

    _skip_shared_memory_op()
    if model.llm.device.type == "cuda" and model.llm.dtype is torch.bfloat16:
        # The plug's float32 products, as TF32: several times as fast, and with more bits than the LLM that reads them.
        torch.set_float32_matmul_precision("high")
    sized = {**settings, "zero_optimization": {**settings["zero_optimization"], **_buffer_sizes(model)}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=new_optimizer(model, options), config=sized)
    return engine


def _buffer_sizes(model: PersonalizedLLM) -> dict[str, int]:
    """DeepSpeed's buffers, in numbers of elements; its defaults take gigabytes, whatever the size of the model."""
    trained = sum(parameter.numel() for parameter in trainable(model).values())
    llm = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.llm.parameters())
    live = min(llm // _LLM_SHARES, _MAX_LIVE)
    return {
        "reduce_bucket_size": trained,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live,
    }


def _skip_shared_memory_op() -> None:
    """On CPUs this op is compiled with g++ at every start, and only DeepSpeed's own launcher uses it."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def sum_over_workers(values: Tensor) -> Tensor:
    """The element-wise sum of a float64 tensor over all workers, on its device; nothing waits for it."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def max_over_workers(value: float, device: torch.device) -> float:
    """The maximum of a number over all workers."""
    if not torch.distributed.is_initialized():
        return value
    tensor = torch.tensor(float(value), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return float(tensor)


def gather_over_workers(items: list[Any]) -> list[Any]:
    """The items of all workers, those of the first worker first; all workers call it together."""
    if not torch.distributed.is_initialized():
        return items
    gathered: list[list[Any]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]
