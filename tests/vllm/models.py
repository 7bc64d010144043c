"""Tiny LLMs with heads of a size that vLLM supports."""

from dataclasses import replace
from pathlib import Path

from tests.llms import CAUSAL, Family, build

# The smallest heads that vLLM has on CPUs.
_HEADS = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
_GPT_HEADS = {"n_embd": 64, "n_head": 2}
_FAMILIES = {family.name: family for family in CAUSAL}


def tiny(name: str, folder: Path) -> Path:
    """Writes an LLM of a family of `tests.llms`."""
    family: Family = _FAMILIES[name]
    heads = _GPT_HEADS if "n_head" in family.config else _HEADS
    return build(replace(family, config={**family.config, **heads}), folder)
