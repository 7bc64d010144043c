"""The plug: a user's history and a request become a few soft tokens in front of a frozen LLM (PAPER section 1).

Shapes: B requests, M behaviors of all B requests in one packed row, d encoder width, F hidden width of the projector,
K persona tokens, S soft tokens of a request (instruction first, then K persona tokens), D LLM width.
"""

import math

import torch
from torch import Tensor, nn

from persona.errors import UsageError
from persona.models.encoder import pool
from persona.options import PlugOptions, Pooling


class Projector(nn.Module):
    """Proj of eq. 4: two linear layers with GELU between, encoder width to `n_tokens` × LLM width."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, out)

    def forward(self, vectors: Tensor) -> Tensor:
        """(…, d) to (…, out)."""
        projected: Tensor = self.outer(self.activate(vectors))
        return projected

    def activate(self, vectors: Tensor) -> Tensor:
        """GELU(W1 h + b1): the part of Proj that has to see each behavior; (…, d) to (…, F)."""
        return nn.functional.gelu(self.inner(vectors))


class Plug(nn.Module):
    """Everything that is trained: query encoder, projector, instruction token, temperature, recency.

    Args:
        query_encoder: the BERT-like model of eq. 2; None exactly when `options.weights` is `mean`.
        pooling: of the query encoder; width: d; llm_width: D.
        token_norm: mean L2 norm of the LLM's token embeddings. Soft tokens start at that norm, for any LLM.
        scale: factor on all soft tokens; None measures the one by which they start at `token_norm`.
    """

    def __init__(
        self,
        options: PlugOptions,
        *,
        query_encoder: nn.Module | None,
        pooling: Pooling,
        width: int,
        llm_width: int,
        token_norm: float,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if (query_encoder is None) != (options.weights == "mean"):
            raise UsageError(
                f"weights {options.weights!r} and a query encoder that is {query_encoder!r} do not go together"
            )
        self.options = options
        self.pooling, self.width, self.llm_width, self.token_norm = pooling, width, llm_width, token_norm
        self.query_encoder = query_encoder
        self.projector = Projector(width, llm_width, options.persona_tokens * llm_width)
        # The reference multiplies by 539.97, a constant that fits one LLM; this is the same idea, measured.
        self.scale = token_norm / _start_norm(self.projector, width, options.persona_tokens) if scale is None else scale
        # What a request without any behavior is taken to have: not trained, but measured (`set_typical_behavior`).
        self.typical_behavior: Tensor
        self.register_buffer("typical_behavior", torch.zeros(width))
        if options.instruction == "vector":
            self.instruction = nn.Parameter(_random_tokens(1, llm_width, token_norm / self.scale))
        elif options.instruction == "projected":
            self.instruction = nn.Parameter(_random_tokens(1, width, 1.0))
            self.instruction_projector = Projector(width, llm_width, llm_width)
        if options.learn_temperature:
            # A vector of one, since DeepSpeed broadcasts no scalars.
            self.log_temperature = nn.Parameter(torch.tensor([math.log(options.temperature)]))
        if options.recency:
            self.recency_slope = nn.Parameter(torch.zeros(1))

    @torch.no_grad()
    def set_typical_behavior(self, behaviors_Nd: Tensor) -> None:
        """Takes the mean of some users' behaviors (N, d) for what is typical; of none it changes nothing."""
        if len(behaviors_Nd):
            self.typical_behavior.copy_(behaviors_Nd.mean(0))

    def encode_query(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Eq. 2: the request's unit vector **x** (B, d)."""
        if self.query_encoder is None:
            raise UsageError("a plug with mean weights has no query encoder")
        hidden_BTd = self.query_encoder(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        return pool(hidden_BTd, mask_BT, self.pooling)

    def weigh(
        self, history_Md: Tensor, lengths_B: Tensor, query_Bd: Tensor | None, *, uniform_weights: bool = False
    ) -> Tensor:
        """Eq. 3: the weight (M,) of each behavior within its request's history; `query_Bd` None leaves x·h out.

        With the option `recency`, w_i ∝ exp(t·x·h_i) / (1 + k_i)^slope, where k_i behaviors of the history are newer:
        people forget by a power law, too (Wixted & Ebbesen 1991). `uniform_weights` makes all weights equal.
        """
        rows_M = torch.repeat_interleave(torch.arange(len(lengths_B), device=lengths_B.device), lengths_B)
        if uniform_weights or (query_Bd is None and not self.options.recency):
            return 1.0 / lengths_B[rows_M].to(history_Md.dtype)
        if query_Bd is None:
            scores_M = history_Md.new_zeros(len(rows_M))
        else:
            scores_M = (query_Bd[rows_M] * history_Md).sum(-1) * self.temperature()
        if self.options.recency:
            # Histories come oldest first.
            last_M = lengths_B.cumsum(0)[rows_M] - 1
            newer_M = last_M - torch.arange(len(rows_M), device=rows_M.device)
            scores_M = scores_M - self.recency_slope * torch.log1p(newer_M.to(scores_M.dtype))
        # Softmax over each row's own segment; the row's maximum is taken off first so that exp cannot overflow.
        top_B = scores_M.new_full((len(lengths_B),), -math.inf).scatter_reduce(0, rows_M, scores_M.detach(), "amax")
        exp_M = torch.exp(scores_M - top_B[rows_M])
        sum_B = exp_M.new_zeros(len(lengths_B)).index_add(0, rows_M, exp_M)
        return exp_M / sum_B[rows_M]

    def temperature(self) -> Tensor | float:
        """The factor on x·h: learned, or the option's."""
        return self.log_temperature.exp() if self.options.learn_temperature else self.options.temperature

    def persona(self, history_Md: Tensor, lengths_B: Tensor, weights_M: Tensor) -> Tensor:
        """Eq. 4, persona tokens (B, K, D), by the exact shortcut W2·(Σ w GELU(W1 h + b1)) + b2, since Σw = 1.

        A request without any behavior gets the persona of the typical one, by the same projector: what it has learned
        from all histories serves those who have none, too.
        """
        rows_M = torch.repeat_interleave(torch.arange(len(lengths_B), device=lengths_B.device), lengths_B)
        active_MF = self.projector.activate(history_Md) * weights_M.unsqueeze(-1)
        mixed_BF = active_MF.new_zeros(len(lengths_B), active_MF.shape[-1]).index_add(0, rows_M, active_MF)
        typical_F = self.projector.activate(self.typical_behavior)
        mixed_BF = torch.where((lengths_B == 0).unsqueeze(-1), typical_F, self.set_apart(mixed_BF, typical_F))
        personas_BKD: Tensor = self.projector.outer(mixed_BF).unflatten(-1, (-1, self.llm_width))
        return self.scale * personas_BKD

    def set_apart(self, hidden_NF: Tensor, typical_F: Tensor) -> Tensor:
        """Moves hidden activations (N, F) away from those of the typical behavior, by the option `persona_gain`.

        W2 can say the same without it. But AdamW moves all weights by steps of one size, and histories differ little
        beside what they have in common: with a gain a step of W2 says more of the one user.
        """
        if self.options.persona_gain == 1:
            return hidden_NF
        return typical_F + self.options.persona_gain * (hidden_NF - typical_F)

    def forward(
        self,
        history_Md: Tensor,
        lengths_B: Tensor,
        query: tuple[Tensor, Tensor] | None,
        *,
        uniform_weights: bool = False,
    ) -> Tensor:
        """The soft tokens [I; P] (B, S, D) of eq. 5.

        Args:
            history_Md: the unit vectors of all requests' behaviors, request after request, oldest first, no padding.
            lengths_B: behaviors of each request; 0 is allowed.
            query: token ids and mask, both (B, T), for eq. 2; None leaves the request out of the weights.
            uniform_weights: weigh all behaviors of a history equally, whatever was learned.
        """
        if history_Md.shape != (int(lengths_B.sum()), self.width):
            raise ValueError(
                f"history: expected shape ({int(lengths_B.sum())}, {self.width}), got {tuple(history_Md.shape)}"
            )
        query_Bd = None if query is None else self.encode_query(*query)
        weights_M = self.weigh(history_Md, lengths_B, query_Bd, uniform_weights=uniform_weights)
        personas_BKD = self.persona(history_Md, lengths_B, weights_M)
        if self.options.instruction == "none":
            return personas_BKD
        raw = self.instruction
        if self.options.instruction == "projected":
            raw = self.instruction_projector(raw)
        instruction_B1D = (self.scale * raw).expand(len(lengths_B), 1, self.llm_width)
        return torch.cat([instruction_B1D, personas_BKD], dim=1)


def _random_tokens(n: int, width: int, norm: float) -> Tensor:
    """Random rows (n, width) of the given norm."""
    return nn.functional.normalize(torch.randn(n, width), dim=-1) * norm


@torch.no_grad()
def _start_norm(projector: Projector, width: int, n_tokens: int) -> float:
    """Mean norm of one projected token at the start, over random unit vectors."""
    vectors = _random_tokens(256, width, 1.0)
    return float(projector(vectors).unflatten(-1, (n_tokens, -1)).norm(dim=-1).mean())
