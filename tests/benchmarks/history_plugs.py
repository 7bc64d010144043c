"""Plugs that read more of a history than one weighted mean: trials, each a change of `Plug.persona` alone.

They have K tokens as the plug of the recipe, at most a thousandth more weights, and start from the same warm start.

Shapes: B requests, M behaviors of all requests together, K persona tokens, C centers, d encoder width, F hidden width
of the projector, D LLM width.
"""

from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional

from persona.plug import aggregation
from persona.plug.module import Plug

N_CENTERS = 64
# How much farther from the typical behavior a single behavior is than the mean of a history (ACL authors, MiniLM).
_SINGLE_DISTANCE = 2.2
# Vectors have length 1, so without it a query from the center of all behaviors would hardly prefer any.
_START_TEMPERATURE = 10.0


class _ManyMeans(Plug):
    """A plug whose tokens read different vectors of F numbers."""

    def persona(self, history_Md: Tensor, lengths_B: Tensor, weights_M: Tensor, *, strength: float = 1.0) -> Tensor:
        """Persona tokens (B, K, D); see `Plug.persona`."""
        typical_F = self.projector.activate(self.typical_behavior)
        read_BKF = self.scale_deviation(self.read(history_Md, lengths_B, weights_M), typical_F, strength)
        read_BKF = torch.where((lengths_B == 0)[:, None, None], typical_F, read_BKF)
        outer, n_tokens = self.projector.outer, self.options.persona_tokens
        weight_KDF, bias_KD = outer.weight.unflatten(0, (n_tokens, -1)), outer.bias.unflatten(0, (n_tokens, -1))
        return self.scale * (torch.einsum("bkf,kdf->bkd", read_BKF, weight_KDF) + bias_KD)

    def read(self, history_Md: Tensor, lengths_B: Tensor, weights_M: Tensor) -> Tensor:
        """What each token reads of each history (B, K, F); of one without behaviors, anything."""
        raise NotImplementedError


class Resampler(_ManyMeans):
    """Attention pooling (Perceiver, arXiv 2103.03206): each token weights the behaviors by its own learned query.

    Queries start in the directions of K centers of all behaviors.
    """

    def start(self, behaviors_Nd: Tensor, *, seed: int) -> None:
        """Sets the queries to the centers of behaviors (N, d), seen from the mean."""
        centers_Kd = centers(behaviors_Nd, self.options.persona_tokens, seed=seed)
        directions_Kd = functional.normalize(centers_Kd - behaviors_Nd.mean(0), dim=-1)
        self.queries_Kd = nn.Parameter(_START_TEMPERATURE * directions_Kd)

    def read(self, history_Md: Tensor, lengths_B: Tensor, weights_M: Tensor) -> Tensor:
        """A mean by each token's own weights; `weights_M` is not used."""
        del weights_M
        activated_MF = self.projector.activate(history_Md)
        numbers_M = aggregation.request_numbers(lengths_B, len(history_Md))
        weights_KM = [
            aggregation.softmax(scores_M, numbers_M, len(lengths_B)) for scores_M in self.queries_Kd @ history_Md.T
        ]
        return torch.stack([aggregation.mix(activated_MF, one_M, lengths_B) for one_M in weights_KM], 1)


class Latest(_ManyMeans):
    """Half of the tokens read one of the latest behaviors each, the others the mean (PERSOMA, arXiv 2408.00960).

    Behaviors are brought as near to the typical one as means are.
    """

    def read(self, history_Md: Tensor, lengths_B: Tensor, weights_M: Tensor) -> Tensor:
        """The mean K/2 times, then the latest behaviors, oldest first; a short history has its mean in their place."""
        n_latest = self.options.persona_tokens // 2
        activated_MF = self.projector.activate(history_Md)
        mean_BF = aggregation.mix(activated_MF, weights_M, lengths_B)
        mean_BKF = mean_BF.unsqueeze(1).expand(-1, self.options.persona_tokens, -1)
        if not len(history_Md):
            return mean_BKF
        back_L = torch.arange(n_latest, 0, -1, device=lengths_B.device)
        is_there_BL = back_L <= lengths_B.unsqueeze(1)
        row_BL = (lengths_B.cumsum(0).unsqueeze(1) - back_L).clamp(min=0)
        typical_F = self.projector.activate(self.typical_behavior)
        near_MF = typical_F + (activated_MF - typical_F) / _SINGLE_DISTANCE
        latest_BLF = near_MF[row_BL]
        latest_BLF = torch.where(is_there_BL.unsqueeze(-1), latest_BLF, mean_BKF[:, :n_latest])
        return torch.cat([mean_BKF[:, n_latest:], latest_BLF], 1)


class Peers(_ManyMeans):
    """Half of the tokens read the mean, the others what sets behaviors apart from their nearest center (as DEP).

    Centers are of the behaviors that training requests see, so none is newer than these requests.
    """

    def start(self, behaviors_Nd: Tensor, *, seed: int) -> None:
        """Sets the centers to those of behaviors (N, d); they are not trained."""
        self.register_buffer("centers_Cd", centers(behaviors_Nd, min(N_CENTERS, len(behaviors_Nd)), seed=seed))

    def read(self, history_Md: Tensor, lengths_B: Tensor, weights_M: Tensor) -> Tensor:
        """The mean K/2 times, then the typical behavior plus the mean difference from the centers."""
        centers_Cd = cast(Tensor, self.centers_Cd)
        nearest_M = torch.cdist(history_Md, centers_Cd).argmin(1)
        activated_MF = self.projector.activate(history_Md)
        apart_MF = activated_MF - self.projector.activate(centers_Cd)[nearest_M]
        apart_BF = aggregation.mix(apart_MF, weights_M, lengths_B) + self.projector.activate(self.typical_behavior)
        mean_BF = aggregation.mix(activated_MF, weights_M, lengths_B)
        half = self.options.persona_tokens // 2
        return torch.stack([mean_BF] * (self.options.persona_tokens - half) + [apart_BF] * half, 1)


PLUGS: Mapping[str, Callable[..., Plug]] = {"resampler": Resampler, "latest": Latest, "peers": Peers}


def centers(behaviors_Nd: Tensor, n: int, *, seed: int) -> Tensor:
    """The centers (n, d) of behaviors by k-means."""
    found = KMeans(n, n_init=1, random_state=seed).fit(behaviors_Nd.double().numpy())
    return torch.from_numpy(found.cluster_centers_.astype(np.float32))
