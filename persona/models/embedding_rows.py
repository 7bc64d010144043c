"""Embeddings of a few tokens of an LLM, from their rows in its weights alone.

Shapes: N tokens, D LLM width.
"""

from collections.abc import Sequence

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn

from persona.errors import InputError
from persona.models import contents
from persona.models.llm_kinds import embedding_scale
from persona.models.loading import llm_class, load_config
from persona.models.resolve import ModelFolder


@torch.inference_mode()
def embedding_rows(folder: ModelFolder, ids: Sequence[int], *, dtype: torch.dtype) -> Tensor:
    """Embeddings (N, D) of tokens as the LLM reads them, equal to `FrozenLLM.embed`.

    Raises InputError if the weights do not show which of them embed tokens.
    """
    config = load_config(folder)
    with init_empty_weights(include_buffers=False):  # some keep the scale of embeddings as a buffer
        model = llm_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
    embeddings = model.get_input_embeddings()
    [name] = [name for name, parameter in model.named_parameters() if parameter is embeddings.weight][:1]
    embeddings.weight = nn.Parameter(_rows(folder, name, ids).to(dtype), requires_grad=False)
    embeddings.padding_idx = None
    embedded: Tensor = embeddings(torch.arange(len(ids)))
    return embedded * embedding_scale(config)


def _rows(folder: ModelFolder, name: str, ids: Sequence[int]) -> Tensor:
    """Rows of a matrix whose name in the file may have another beginning than in the model."""
    end = ".".join(name.split(".")[-2:])
    found = []
    for file in contents.weight_files(folder.path):
        with safe_open(file, framework="pt") as weights:
            for stored in weights.keys():  # noqa: SIM118 - it is no mapping
                if stored == end or stored.endswith(f".{end}"):
                    matrix = weights.get_slice(stored)
                    found.append(torch.stack([matrix[token] for token in ids]))
    if len(found) != 1:
        raise InputError(f"the model {folder.name!r}: {len(found)} tensors could be its embeddings ({end})")
    return found[0]
