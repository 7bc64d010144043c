"""A plug that gives a decoder-only LLM keys and values in every layer, instead of soft tokens in its input.

What soft tokens can tell the LLM, keys and values can too, and more: so this shows what is lost by the input tokens. It
is made from an untrained plug of soft tokens, and starts with what the LLM itself makes of these.

Shapes: B requests, M behaviors of all requests together, N single behaviors, d encoder width, F hidden width of the
projector, R codes, Y layers, h key heads, S positions, w width of a head, C = Y·2·h·S·w numbers of a prefix, D LLM
width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from persona.models.frozen_llm import FrozenLLM, summed_nll
from persona.models.prompts import PromptIds
from persona.plug import aggregation
from persona.plug.module import Plug
from persona.plug.personalized import Batch, PersonalizedLLM

_RIDGE = 0.1  # as in the warm start of soft tokens
_READ_TOGETHER = 64


def read(llm: FrozenLLM, soft_NSD: Tensor) -> Tensor:
    """The keys and values (N, Y, 2, h, S, w) that the LLM makes of soft tokens at the start of a text."""
    parts = []
    for part_NSD in soft_NSD.split(_READ_TOGETHER):
        cache = llm.model.base_model(inputs_embeds=part_NSD.to(llm.dtype), use_cache=True).past_key_values
        parts.append(torch.stack([torch.stack([layer.keys, layer.values], 1) for layer in cache.layers], 1).float())
    return torch.cat(parts)


def nll(
    llm: FrozenLLM, prefix_BY2hSw: Tensor, prompts: Sequence[PromptIds], targets: Sequence[Sequence[int]]
) -> Tensor:
    """`FrozenLLM.nll` (B,) with keys and values in front of all text, instead of soft tokens within it."""
    layers = prefix_BY2hSw.to(llm.dtype).unbind(1)
    cache = DynamicCache([(layer_B2hSw[:, 0], layer_B2hSw[:, 1]) for layer_B2hSw in layers])
    seen_BS = torch.ones(len(prompts), prefix_BY2hSw.shape[-2], dtype=torch.bool, device=llm.device)
    no_soft_B0D = torch.empty(len(prompts), 0, llm.width, device=llm.device)
    return summed_nll(llm.logits_behind(cache, seen_BS, no_soft_B0D, prompts, targets), targets)


class PrefixPlug(nn.Module):
    """Prefix = start + unit·(shared + code·up), with code = deviation·down of the projector's hidden layer.

    `start` and `unit` are fixed, so that a step changes keys and values of every layer and position by a similar share
    of their size. A rank keeps the number of weights near that of a plug of soft tokens: W2 of all layers would be 20
    times as large.

    Args:
        source: the plug of soft tokens; of its parts, only the projector's first layer is used and trained.
        start_Y2hSw: the prefix of a request without a history.
        rank: R.
    """

    def __init__(self, source: Plug, start_Y2hSw: Tensor, rank: int) -> None:
        super().__init__()
        self.source = source.requires_grad_(False)
        self.source.projector.inner.requires_grad_(True)
        self.options, self.query_encoder = source.options, None
        self.full_strength = source.full_strength
        self.width, self.llm_width = source.width, source.llm_width
        unit_Y2hSw = start_Y2hSw.pow(2).mean((2, 4), keepdim=True).sqrt().expand_as(start_Y2hSw)
        self.start: Tensor
        self.unit: Tensor
        self.register_buffer("start", start_Y2hSw)
        self.register_buffer("unit", unit_Y2hSw.contiguous())
        self.shared = nn.Parameter(torch.zeros(start_Y2hSw.numel()))
        self.down = nn.Parameter(torch.zeros(source.projector.inner.out_features, rank))
        self.up = nn.Parameter(torch.zeros(rank, start_Y2hSw.numel()))

    def deviations(self, history_Md: Tensor, lengths_B: Tensor) -> Tensor:
        """How far each history is from the typical behavior in the projector's hidden layer (B, F); 0 without one."""
        weights_M = self.source.weigh(history_Md, lengths_B, None)
        mixed_BF = aggregation.mix(self.source.projector.activate(history_Md), weights_M, lengths_B)
        typical_F = self.source.projector.activate(self.source.typical_behavior)
        has_history_B1 = (lengths_B > 0).unsqueeze(-1)
        return self.options.persona_gain * self.full_strength * (mixed_BF - typical_F) * has_history_B1

    def forward(self, history_Md: Tensor, lengths_B: Tensor) -> Tensor:
        """The prefixes (B, Y, 2, h, S, w) of requests; the arguments are those of `Plug.forward`."""
        moved_BC = self.shared + self.deviations(history_Md, lengths_B) @ self.down @ self.up
        return self.start + self.unit * moved_BC.unflatten(-1, self.start.shape)

    @torch.no_grad()
    def fit(self, prefixes_NY2hSw: Tensor, behaviors_Nd: Tensor) -> None:
        """Starts the codes with the best map of rank R from behaviors to their prefixes: reduced-rank regression.

        Args:
            prefixes_NY2hSw: of the soft tokens of requests with a single behavior each.
            behaviors_Nd: these behaviors.
        """
        one_N = torch.ones(len(behaviors_Nd), dtype=torch.long)
        x_NF = self.deviations(behaviors_Nd, one_N).double()
        x_NF = x_NF - x_NF.mean(0)
        y_NC = (prefixes_NY2hSw / self.unit).flatten(1)
        y_NC = y_NC - y_NC.mean(0)
        gram_FF = x_NF.T @ x_NF
        penalty_FF = _RIDGE * gram_FF.diagonal().mean() * torch.eye(len(gram_FF), dtype=torch.double)
        solve_FN = torch.linalg.solve(gram_FF + penalty_FF, x_NF.T)
        hat_NN = x_NF @ solve_FN
        products_NN = (y_NC @ y_NC.T).double()
        squares_N, vectors_NN = torch.linalg.eigh(hat_NN @ products_NN @ hat_NN.T)
        rank = self.down.shape[1]
        size_R = squares_N[-rank:].clamp(min=1e-12).sqrt()
        # The right singular vectors of the fitted prefixes are y.T @ axes.
        axes_NR = hat_NN.T @ (vectors_NN[:, -rank:] / size_R)
        code_size_R = size_R / len(x_NF) ** 0.5  # so that codes have a variance of 1
        self.down.copy_(solve_FN @ products_NN @ axes_NR / code_size_R)
        self.up.copy_(code_size_R.unsqueeze(1) * (axes_NR.T.float() @ y_NC))


class PrefixLLM(PersonalizedLLM):
    """The plug of keys and values and the frozen LLM; the prefix is in front of all text."""

    @classmethod
    @torch.no_grad()
    def from_soft_tokens(cls, model: PersonalizedLLM, behaviors_Nd: Tensor, *, rank: int) -> "PrefixLLM":
        """Starts where an untrained plug of soft tokens starts: exactly so without a history, nearly with one.

        Args:
            model: the LLM with that plug, which becomes a part of the new one.
            behaviors_Nd: single behaviors to fit; more than `rank`.
            rank: R.
        """
        plug: Plug = model.plug
        no_history = torch.zeros(0, plug.width), torch.zeros(1, dtype=torch.long)
        start_1Y2hSw = read(model.llm, plug(*no_history, None))
        one_N = torch.ones(len(behaviors_Nd), dtype=torch.long)
        prefixes_NY2hSw = read(model.llm, plug(behaviors_Nd, one_N, None))
        made = PrefixPlug(plug, start_1Y2hSw[0], rank)
        made.fit(prefixes_NY2hSw, behaviors_Nd)
        return cls(made, model.llm, None)

    def forward(self, batch: Batch) -> Tensor:
        """The summed negative log-likelihood (B,) of the targets, in nats."""
        prompts = [PromptIds(before=(), after=(*prompt.before, *prompt.after)) for prompt in batch.prompts]
        return nll(self.llm, self.plug(batch.history_Md, batch.lengths_B), prompts, batch.targets)
