"""The rules of `persona.engines.rules` in vLLM, whose own differ: its repetition penalty also counts the prompt.

Shapes: R running requests of one length, T tokens generated for each, V vocabulary.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from persona.engines.rules import AnswerRules, answer_rules

_CONFIG = "persona_generation_config"


def engine_arguments(config: GenerationConfig) -> dict[str, Any]:
    """Arguments of vLLM's engine, so that its answers obey this configuration; empty if it has no rules."""
    if not _rules(config, eos_ids=[0], max_new_tokens=1, device=torch.device("cpu")).processors:
        return {}
    return {"logits_processors": [RulesProcessor], "additional_config": {_CONFIG: config.to_dict()}}


class RulesProcessor(LogitsProcessor):  # type: ignore[misc]  # untyped where vLLM is not installed
    """Changes the scores of all running requests by the rules, requests with equally many tokens together."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        del is_pin_memory
        self.config = GenerationConfig.from_dict(vllm_config.additional_config[_CONFIG])
        self.device = device
        self.rules: dict[tuple[int, ...], AnswerRules] = {}
        # By row of the batch; the list grows as the request does.
        self.running: dict[int, tuple[AnswerRules, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """Rules may change which token is the likeliest."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows requests that come, go, and change their row."""
        process_dict_updates(self.running, batch_update, self._state)

    def apply(self, logits: Tensor) -> Tensor:
        """The scores (rows of the batch, V) as the rules leave them."""
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row, (rules, tokens) in self.running.items():
            groups[id(rules), len(tokens)].append(row)
        for (_, length), rows in groups.items():
            rules = self.running[rows[0]][0]
            tokens_RT = torch.tensor([self.running[row][1] for row in rows], dtype=torch.long, device=logits.device)
            logits[rows] = rules(tokens_RT.view(len(rows), length), logits[rows])
        return logits

    def _state(
        self, params: SamplingParams, prompt: list[int] | None, generated: list[int]
    ) -> tuple[AnswerRules, list[int]]:
        del prompt  # transformers does not see it either, if it is given as embeddings
        key = (params.max_tokens or 0, *sorted(params.stop_token_ids or ()))
        if key not in self.rules:
            self.rules[key] = _rules(self.config, eos_ids=key[1:], max_new_tokens=key[0], device=self.device)
        return self.rules[key], generated


def _rules(
    config: GenerationConfig, *, eos_ids: list[int] | tuple[int, ...], max_new_tokens: int, device: torch.device
) -> AnswerRules:
    return answer_rules(config, eos_ids=eos_ids, start_ids=[], max_new_tokens=max_new_tokens, device=device)
