"""The size of a pass for `--micro-batch auto`: the largest that fits the GPU, found by trial before the first step.

A trial is the forward and backward pass of a real step, on rows as long as the longest. It leaves no trace: gradients
go to no parameter, there is no optimizer step, and random numbers are drawn from a copy of the generators.
"""

from collections.abc import Sequence

import torch

from persona.errors import InputError
from persona.options import TrainingOptions
from persona.plug.personalized import PersonalizedLLM, Row
from persona.training.deepspeed import max_over_workers, trainable
from persona.training.step import micro_batch

# On a CPU larger passes are no faster, and the memory is shared with other processes.
_ON_CPU = 8
# What DeepSpeed holds in a step besides the parameters: float32 copies, two moments, gradients and their buffer.
_COPIES_OF_TRAINED = 5
# Kept free for fragmentation and for libraries.
_FREE_SHARE = 0.05
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")


def sizes(share: int) -> list[int]:
    """The possible sizes of a pass, largest first: the divisors of a worker's share of a global batch."""
    return [size for size in range(share, 0, -1) if share % size == 0]


def settled(options: TrainingOptions, share: int, resumed: int) -> int | None:
    """The size of a pass that needs no trial: the given number, or with auto that of the resumed run if it divides."""
    if options.micro_batch != "auto":
        return options.pass_size(share)
    return resumed if resumed and share % resumed == 0 else None


def choose(model: PersonalizedLLM, longest: Row, options: TrainingOptions, share: int) -> int:
    """The size of a pass for a worker with `share` requests of each global batch; all workers call it together.

    It is called before DeepSpeed takes the model over. `longest` is a row whose texts and history are at least as long
    as those of any other row.

    Raises InputError when not even one such row fits.
    """
    if model.llm.device.type == "cpu":
        return next(size for size in sizes(share) if size <= _ON_CPU)
    return largest_on_all(model, longest, options, sizes(share))


def largest_on_all(model: PersonalizedLLM, longest: Row, options: TrainingOptions, tried: Sequence[int]) -> int:
    """The first of the sizes that fits every worker; raises as `choose` does."""
    # The GPUs of the workers may differ, or be shared with other processes.
    size = int(-max_over_workers(-largest_that_fits(model, longest, options, tried), model.llm.device))
    if not size:
        raise InputError(
            "--micro-batch auto: the GPU's memory is too small for a pass over the longest request; take "
            "--activation-checkpointing, --llm-quantization, a smaller LLM, or smaller --max-input-tokens or "
            "--max-target-tokens"
        )
    return size


def largest_that_fits(model: PersonalizedLLM, longest: Row, options: TrainingOptions, tried: Sequence[int]) -> int:
    """The first of the sizes whose pass over copies of `longest` fits the memory; 0 if none does."""
    device = model.llm.device
    on_gpu = device.type == "cuda"
    n_bytes = _COPIES_OF_TRAINED * sum(4 * parameter.numel() for parameter in trainable(model).values())
    if on_gpu:
        n_bytes += int(_FREE_SHARE * torch.cuda.mem_get_info(device)[1])
    found = 0
    with torch.random.fork_rng([device] if on_gpu else []):
        for size in tried:
            if _fits(model, longest, options, size, n_bytes):
                found = size
                break
            if on_gpu:
                torch.cuda.empty_cache()  # here, where no traceback holds tensors of the failed pass
    if on_gpu:
        torch.cuda.empty_cache()
    return found


def _fits(model: PersonalizedLLM, longest: Row, options: TrainingOptions, size: int, reserved_bytes: int) -> bool:
    """Whether one pass over `size` rows fits beside `reserved_bytes`."""
    rows = [_with_reference(model, longest, options)] * size
    parameters = list(trainable(model).values())
    try:
        reserved = torch.empty(reserved_bytes, dtype=torch.uint8, device=model.llm.device)
        part = micro_batch(model, rows, rows if options.contrast else [None] * size, options)
        _, loss = part.losses(model(part.batch), options)
        # Not `backward`, which would leave gradients in the parameters.
        torch.autograd.grad(loss, parameters, allow_unused=True)
        del reserved
    except RuntimeError as error:
        if any(sign in str(error) for sign in _OUT_OF_MEMORY):
            return False
        raise
    return True


def _with_reference(model: PersonalizedLLM, row: Row, options: TrainingOptions) -> Row:
    """The row with a reference as `step` expects it; its texts may be of different requests."""
    if not options.preference:
        return row
    target, rejected = map(len, model.llm.tokenizer.targets([row["target"], row["rejected"]]))
    tokens = {"reference_tokens": target, "reference_rejected_tokens": rejected}
    return {**row, **tokens, "reference_nats": 0.0, "reference_rejected_nats": 0.0}
