"""The plug: turns a user's history and a request into a few soft tokens in front of a frozen LLM.

Equations are those of PPlug (arXiv 2409.11901). Shapes: B requests, M behaviors of all B requests in one packed row,
N any number of rows, d encoder width, F hidden width of the projector, K persona tokens, S soft tokens of a request
(instruction first, then K persona tokens, then the query token if there is one), D LLM width.
"""

import torch
from torch import Tensor, nn

from persona.errors import UsageError
from persona.models.sentence_head import SentenceHead
from persona.options import PlugOptions
from persona.plug import aggregation


class Projector(nn.Module):
    """Proj of PPlug eq. 4: two linear layers with GELU between, from encoder width to `n_tokens` × LLM width."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, out)

    def forward(self, vectors: Tensor) -> Tensor:
        """(…, d) to (…, out)."""
        projected: Tensor = self.outer(self.activate(vectors))
        return projected

    def activate(self, vectors: Tensor) -> Tensor:
        """GELU(W1 h + b1), the nonlinear part of Proj; (…, d) to (…, F)."""
        return nn.functional.gelu(self.inner(vectors))


class Plug(nn.Module):
    """All trained parts: query encoder, projector, instruction token and what aggregation learns.

    Args:
        query_encoder: the transformer of PPlug eq. 2; None exactly when nothing depends on the request.
        query_head: makes unit vectors of what the query encoder gives; None exactly when there is none.
        width: d; llm_width: D.
        token_norm: mean L2 norm of the LLM's token embeddings. Soft tokens start at that norm, for any LLM.
        scale: factor on all soft tokens; None measures the one with which they start at `token_norm`.

    Raises:
        UsageError: the options do not match `query_encoder`.
    """

    def __init__(
        self,
        options: PlugOptions,
        *,
        query_encoder: nn.Module | None,
        query_head: SentenceHead | None = None,
        width: int,
        llm_width: int,
        token_norm: float,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if (query_encoder is not None) != aggregation.uses_query(options):
            needed = "needs a query encoder" if query_encoder is None else "takes no query encoder"
            with_token = " and a query token" if options.query_token else ""
            raise UsageError(f"a plug with {options.weights} weights{with_token} {needed}")
        self.options = options
        self.width, self.llm_width, self.token_norm = width, llm_width, token_norm
        self.query_encoder, self.query_head = query_encoder, query_head
        self.projector = Projector(width, llm_width, options.persona_tokens * llm_width)
        # The reference implementation multiplies by 539.97, which fits one LLM; measuring it fits any.
        self.scale = token_norm / _start_norm(self.projector, width, options.persona_tokens) if scale is None else scale
        # Used for a request without history; measured (`set_typical_behavior`), not trained.
        self.typical_behavior: Tensor
        self.register_buffer("typical_behavior", torch.zeros(width))
        # What strength 1 is: below 1 within the `persona_warmup` of training. A vector of one, as log_temperature.
        self.full_strength: Tensor
        self.register_buffer("full_strength", torch.ones(1))
        if options.instruction == "vector":
            self.instruction = nn.Parameter(_random_tokens(1, llm_width, token_norm / self.scale))
        elif options.instruction == "projected":
            self.instruction = nn.Parameter(_random_tokens(1, width, 1.0))
            self.instruction_projector = Projector(width, llm_width, llm_width)
        if options.query_token:
            self.query_projector = Projector(width, llm_width, llm_width)
        for name, parameter in aggregation.new_parameters(options).items():
            self.register_parameter(name, parameter)

    @torch.no_grad()
    def set_typical_behavior(self, behaviors_Nd: Tensor) -> None:
        """Sets the typical behavior to the mean of some users' behaviors (N, d); N = 0 changes nothing."""
        if len(behaviors_Nd):
            self.typical_behavior.copy_(behaviors_Nd.mean(0))

    def encode_query(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """PPlug eq. 2: the requests' unit vectors **x** (B, d)."""
        if self.query_encoder is None or self.query_head is None:
            raise UsageError(f"a plug with {self.options.weights} weights has no query encoder")
        hidden_BTd = self.query_encoder(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        query_Bd: Tensor = self.query_head(hidden_BTd, mask_BT)
        return query_Bd

    def weigh(
        self, history_Md: Tensor, lengths_B: Tensor, query_Bd: Tensor | None, *, uniform_weights: bool = False
    ) -> Tensor:
        """PPlug eq. 3: the weight (M,) of each behavior within its request's history; see `aggregation.weigh`."""
        parameters = dict(self.named_parameters(recurse=False))
        return aggregation.weigh(
            self.options, parameters, history_Md, lengths_B, query_Bd, uniform_weights=uniform_weights
        )

    def temperature(self) -> Tensor | float:
        """The factor on x·h in PPlug eq. 3."""
        return aggregation.temperature(self.options, dict(self.named_parameters(recurse=False)))

    def persona(self, history_Md: Tensor, lengths_B: Tensor, weights_M: Tensor, *, strength: float = 1.0) -> Tensor:
        """PPlug eq. 4: persona tokens (B, K, D). A request without history gets those of the typical behavior.

        At strength α they are P_typical + α·(P − P_typical) (`persona.strengths`).

        Since the weights of a request sum to 1, W2·(Σ w GELU(W1 h + b1)) + b2 equals Σ w Proj(h), with one product by
        W2 a request instead of one a behavior.
        """
        mixed_BF = aggregation.mix(self.projector.activate(history_Md), weights_M, lengths_B)
        typical_F = self.projector.activate(self.typical_behavior)
        scaled_BF = self.scale_deviation(mixed_BF, typical_F, strength)
        mixed_BF = torch.where((lengths_B == 0).unsqueeze(-1), typical_F, scaled_BF)
        personas_BKD: Tensor = self.projector.outer(mixed_BF).unflatten(-1, (-1, self.llm_width))
        return self.scale * personas_BKD

    def scale_deviation(self, hidden_NF: Tensor, typical_F: Tensor, strength: float = 1.0) -> Tensor:
        """Multiplies how far activations (N, F) are from those of the typical behavior by `persona_gain` and strength.

        W2 could learn this factor. But AdamW's steps have about the same size for every weight, and histories deviate
        little from their mean: with a gain, the same step of W2 changes more of what is specific to a user.
        """
        # A factor of 0 or 1 gives exactly the one or the other.
        factor = self.options.persona_gain * strength * self.full_strength.to(hidden_NF.dtype)
        return torch.lerp(typical_F, hidden_NF, factor)

    def forward(
        self,
        history_Md: Tensor,
        lengths_B: Tensor,
        query: tuple[Tensor, Tensor] | None,
        *,
        uniform_weights: bool = False,
        strength: float = 1.0,
    ) -> Tensor:
        """The soft tokens [I; P] (B, S, D) of PPlug eq. 5, or [I; P; q] with a query token.

        Args:
            history_Md: unit vectors of all requests' behaviors, request after request, oldest first, no padding.
            lengths_B: number of behaviors of each request; may be 0.
            query: token ids and mask, both (B, T), for eq. 2; None leaves the requests out of the weights, and is not
                allowed with a query token.
            uniform_weights: weight all behaviors of a history equally, whatever was learned.
            strength: of the persona; it leaves instruction and query token as they are.

        Raises:
            ValueError: `history_Md` does not have the shape that lengths and width imply.
        """
        # On a GPU, reading the sum would wait for all work before it; there, `repeat_interleave` asserts that it fits.
        n_expected = int(lengths_B.sum()) if lengths_B.device.type == "cpu" else len(history_Md)
        if history_Md.shape != (n_expected, self.width):
            raise ValueError(f"history: expected shape ({n_expected}, {self.width}), got {tuple(history_Md.shape)}")
        query_Bd = None if query is None else self.encode_query(*query)
        weights_M = self.weigh(history_Md, lengths_B, query_Bd, uniform_weights=uniform_weights)
        tokens = [self.persona(history_Md, lengths_B, weights_M, strength=strength)]
        if self.options.instruction != "none":
            raw = self.instruction
            if self.options.instruction == "projected":
                raw = self.instruction_projector(raw)
            tokens.insert(0, (self.scale * raw).expand(len(lengths_B), 1, self.llm_width))
        if self.options.query_token:
            assert query_Bd is not None
            # The query encoder may run in bf16.
            query_BD = self.query_projector(query_Bd.to(self.query_projector.inner.weight.dtype))
            tokens.append(self.scale * query_BD.unsqueeze(1))
        return torch.cat(tokens, dim=1)


def _random_tokens(n: int, width: int, norm: float) -> Tensor:
    """Random rows (n, width) of the given norm."""
    return nn.functional.normalize(torch.randn(n, width), dim=-1) * norm


@torch.no_grad()
def _start_norm(projector: Projector, width: int, n_tokens: int) -> float:
    """Mean norm of a token of an untrained projector, over random unit vectors."""
    vectors = _random_tokens(256, width, 1.0)
    return float(projector(vectors).unflatten(-1, (n_tokens, -1)).norm(dim=-1).mean())
