"""How the behaviors of a history are weighted and mixed; a new way to aggregate is added here.

Shapes: B requests, M behaviors of all B requests in one packed row (request after request, oldest first), d encoder
width, F any width.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor, nn

from persona.options import PlugOptions

# Parameters that are used only with a request.
NEEDS_QUERY = ("log_temperature",)


def uses_query(options: PlugOptions) -> bool:
    """Whether weights or a query token depend on the request, so that the plug has a query encoder."""
    return options.weights == "attention" or options.query_token


def without_query(options: PlugOptions) -> PlugOptions:
    """The options of the same plug when there is no request: weights depend on recency at most."""
    return replace(options, weights="mean", learn_temperature=False, query_token=False)


def new_parameters(options: PlugOptions) -> dict[str, nn.Parameter]:
    """What aggregation trains, by name; the names are keys of saved plugs.

    The plug registers them as its own parameters, hence functions here and no module: a module would prefix the names.
    """
    parameters = {}
    if options.learn_temperature:
        # A vector of one, since DeepSpeed broadcasts no scalars.
        parameters["log_temperature"] = nn.Parameter(torch.tensor([math.log(options.temperature)]))
    if options.recency:
        parameters["recency_slope"] = nn.Parameter(torch.zeros(1))
    return parameters


def temperature(options: PlugOptions, parameters: Mapping[str, Tensor]) -> Tensor | float:
    """The factor on x·h in PPlug eq. 3: learned, or fixed by the options."""
    return parameters["log_temperature"].exp() if options.learn_temperature else options.temperature


def weigh(
    options: PlugOptions,
    parameters: Mapping[str, Tensor],
    history_Md: Tensor,
    lengths_B: Tensor,
    query_Bd: Tensor | None,
    *,
    uniform_weights: bool = False,
) -> Tensor:
    """The weight (M,) of each behavior within its request's history, PPlug eq. 3: the softmax of a sum of scores.

    `parameters` are those of `new_parameters`, by name; history and lengths are as in `Plug.forward`. Without queries
    (the requests' vectors), the weights do not depend on the requests. `uniform_weights` weighs all behaviors of a
    history equally, whatever was learned.
    """
    requests_M = request_numbers(lengths_B, len(history_Md))
    scores = [] if uniform_weights else list(_scores(options, parameters, history_Md, lengths_B, query_Bd, requests_M))
    if not scores:
        return 1.0 / lengths_B[requests_M].to(history_Md.dtype)
    return softmax(reduce(torch.add, scores), requests_M, len(lengths_B))


def _scores(
    options: PlugOptions,
    parameters: Mapping[str, Tensor],
    history_Md: Tensor,
    lengths_B: Tensor,
    query_Bd: Tensor | None,
    requests_M: Tensor,
) -> Iterator[Tensor]:
    """The terms (M,) of a behavior's score; none when all have equal weight."""
    if query_Bd is not None and options.weights == "attention":
        yield (query_Bd[requests_M] * history_Md).sum(-1) * temperature(options, parameters)
    if options.recency:
        # Weights fall by a power law of how many behaviors are newer, as memory does (Wixted & Ebbesen 1991).
        last_M = lengths_B.cumsum(0)[requests_M] - 1
        newer_M = last_M - torch.arange(len(requests_M), device=requests_M.device)
        yield -parameters["recency_slope"] * torch.log1p(newer_M.to(history_Md.dtype))


def mix(values_MF: Tensor, weights_M: Tensor, lengths_B: Tensor) -> Tensor:
    """The weighted sum (B, F) of each request's values; zeros where a request has no behaviors."""
    weighted_MF = values_MF * weights_M.unsqueeze(-1)
    requests_M = request_numbers(lengths_B, len(values_MF))
    return weighted_MF.new_zeros(len(lengths_B), values_MF.shape[-1]).index_add(0, requests_M, weighted_MF)


def request_numbers(lengths_B: Tensor, n_behaviors: int) -> Tensor:
    """The number (M,) of the request that each behavior belongs to."""
    numbers_B = torch.arange(len(lengths_B), device=lengths_B.device)
    # Without the size of its output, it would wait for the GPU to know it.
    return torch.repeat_interleave(numbers_B, lengths_B, output_size=n_behaviors)


def softmax(scores_M: Tensor, requests_M: Tensor, n_requests: int) -> Tensor:
    """Softmax within each request; its largest score is subtracted first so that exp cannot overflow."""
    top_B = scores_M.new_full((n_requests,), -math.inf).scatter_reduce(0, requests_M, scores_M.detach(), "amax")
    exp_M = torch.exp(scores_M - top_B[requests_M])
    sum_B = exp_M.new_zeros(n_requests).index_add(0, requests_M, exp_M)
    return exp_M / sum_B[requests_M]
