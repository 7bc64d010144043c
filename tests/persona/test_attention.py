"""The encoders' own attention: the same as torch's, with and without padding, also where exp alone would overflow."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from persona import attention, packaged
from persona.encoder import TextEncoder
from persona.models import resolve


def heads(seed: int, spread: float = 1.0) -> list[torch.Tensor]:
    """Queries, keys and values (3, 4, 17, 8) whose scores are as far apart as `spread` says."""
    draw = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(3, 4, 17, 8, generator=draw) for _ in range(3))
    return [query * spread, key, value]


def torchs(query, key, value, mask=None) -> torch.Tensor:
    return scaled_dot_product_attention(query.double(), key.double(), value.double(), attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("spread", [1.0, 20.0, 200.0], ids=["near", "far", "beyond float32"])
@pytest.mark.parametrize("padded", [False, True])
def test_it_is_torchs_attention(spread, padded):
    parts = heads(0, spread)
    mask = None
    if padded:
        mask = (torch.arange(17) < torch.tensor([17, 9, 1]).unsqueeze(1)).view(3, 1, 1, 17).expand(3, 1, 17, 17)
    mixed, weights = attention.attend(torch.nn.Identity(), *parts, mask)
    assert weights is None
    torch.testing.assert_close(mixed.double(), torchs(*parts, mask), rtol=1e-4, atol=1e-4)
    # Scores of 20 and more a unit are where exp has no room left, so both ways have been tested.
    greatest = (parts[0] @ parts[1].transpose(-1, -2)).abs().max() * 8**-0.5
    assert (greatest > 80) == (spread > 1)


def test_masked_keys_are_not_seen_whatever_they_hold():
    query, key, value = heads(1)
    mask = (torch.arange(17) < 9).view(1, 1, 1, 17).expand(3, 1, 17, 17)
    before, _ = attention.attend(torch.nn.Identity(), query, key, value, mask)
    key[:, :, 9:], value[:, :, 9:] = 3.0, 1e6
    after, _ = attention.attend(torch.nn.Identity(), query, key, value, mask)
    assert torch.equal(before, after)


def test_a_real_encoder_points_the_same_way_as_in_float32_as_with_torchs_attention():
    """In bf16, of which each rounding costs 2^-9: no worse than torch's own kernel."""
    texts = ["A paper on parsing.", "I bought this tea again", "word " * 100, "x", "two notes\nin one", "word " * 90]
    folder = resolve(str(packaged.minilm()), flag="--encoder")
    ours = TextEncoder(folder, pooling="mean", max_tokens=128, precision="bf16", device="cpu")
    plain = TextEncoder(folder, pooling="mean", max_tokens=128, precision="fp32", device="cpu")
    assert ours.model.config._attn_implementation == attention.NAME
    assert plain.model.config._attn_implementation != attention.NAME
    exact, found = (encoder.encode(texts).vectors.astype(np.float64) for encoder in (plain, ours))
    ours.model.set_attn_implementation("sdpa")
    torchs_own = ours.encode(texts).vectors.astype(np.float64)
    distance, torchs_distance = (1 - (vectors * exact).sum(1).min() for vectors in (found, torchs_own))
    assert distance < 2e-4
    assert distance < 2 * torchs_distance
