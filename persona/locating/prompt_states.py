"""The hidden states of many texts, or of requests under a persona, batch by batch.

Shapes: N texts or requests, H states (blocks + 1), D LLM width.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persona.models.frozen_llm import FrozenLLM
from persona.models.hidden_states import last_hidden_states, text_prompts
from persona.options import PersonaKind
from persona.plug.personalized import PersonalizedLLM, Row, plug_inputs, prompt_texts, soft_tokens


def states_of_texts(llm: FrozenLLM, texts: Sequence[str], *, batch_size: int) -> NDArray[np.float32]:
    """The states (N, H, D) of each text's last token (see `text_prompts`)."""

    def states(numbers: Sequence[int]) -> Tensor:
        prompts = text_prompts(llm, [texts[number] for number in numbers])
        return last_hidden_states(llm, torch.empty(len(numbers), 0, llm.width, device=llm.device), prompts)

    return _by_batch([len(text) for text in texts], [range(len(texts))], states, batch_size)


@torch.inference_mode()
def states_of_requests(model: PersonalizedLLM, rows: Sequence[Row], *, batch_size: int) -> NDArray[np.float32]:
    """The states (N, H, D) of each prompt's last token, at which the LLM predicts the first token of its answer.

    The rows are those of `persona.store.join` and have the column `persona`, under which each of them is read.
    """

    def states(numbers: Sequence[int]) -> Tensor:
        some = [rows[number] for number in numbers]
        kind = PersonaKind(some[0]["persona"])
        soft_BSD = soft_tokens(model.plug, plug_inputs(model.plug, model.query_text, some, kind, model.llm.device))
        return last_hidden_states(model.llm, soft_BSD, model.llm.tokenizer.prompts(prompt_texts(some)))

    kinds = [row["persona"] for row in rows]
    of_kind = [[number for number, kind in enumerate(kinds) if kind == one] for one in dict.fromkeys(kinds)]
    return _by_batch([len(row["input"]) for row in rows], of_kind, states, batch_size)


def _by_batch(
    lengths: Sequence[int],
    groups: Sequence[Sequence[int]],
    states: Callable[[Sequence[int]], Tensor],
    batch_size: int,
) -> NDArray[np.float32]:
    """The states of all rows, in their order; a batch is of one group."""
    found_NHD: NDArray[np.float32] | None = None
    for numbers in _batches(lengths, groups, batch_size):
        states_BHD = states(numbers).numpy()
        if found_NHD is None:
            found_NHD = np.empty((len(lengths), *states_BHD.shape[1:]), np.float32)
        found_NHD[numbers] = states_BHD
    return np.empty((0, 0, 0), np.float32) if found_NHD is None else found_NHD


def _batches(lengths: Sequence[int], groups: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Row numbers of each batch, longest texts first, to save padding."""
    for group in groups:
        ordered = sorted(group, key=lambda number: -lengths[number])
        for start in range(0, len(ordered), batch_size):
            yield ordered[start : start + batch_size]
