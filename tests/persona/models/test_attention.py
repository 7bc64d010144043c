"""The CPU attention equals torch's: with and without padding, where exp would overflow, with gradients."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from persona.models import attention, packaged
from persona.models.encoder import TextEncoder
from persona.models.resolve import resolve


def heads(seed: int, spread: float = 1.0) -> list[torch.Tensor]:
    """Queries, keys and values (3, 4, 17, 8); a larger `spread` makes larger scores."""
    draw = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(3, 4, 17, 8, generator=draw) for _ in range(3))
    return [query * spread, key, value]


def expected_attention(query, key, value, mask=None) -> torch.Tensor:
    return scaled_dot_product_attention(query.double(), key.double(), value.double(), attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("spread", [1.0, 20.0, 200.0], ids=["near", "far", "beyond float32"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 3], ids="chunks of {}".format)
def test_attend_by_exp_equals_torchs_attention(monkeypatch, spread, padded, chunk):
    monkeypatch.setattr(attention, "_CACHED_SCORES", chunk * 4 * 17**2 // torch.get_num_threads() + 1)
    parts = heads(0, spread)
    mask = None
    if padded:
        mask = (torch.arange(17) < torch.tensor([17, 9, 1]).unsqueeze(1)).view(3, 1, 1, 17).expand(3, 1, 17, 17)
    mixed, weights = attention.attend_by_exp(torch.nn.Identity(), *parts, mask)
    assert weights is None
    torch.testing.assert_close(mixed.double(), expected_attention(*parts, mask), rtol=1e-4, atol=1e-4)
    # With the larger spreads exp would overflow, so both code paths are tested.
    greatest = (parts[0] @ parts[1].transpose(-1, -2)).abs().max() * 8**-0.5
    assert (greatest > 80) == (spread > 1)


def test_masked_keys_have_no_effect():
    query, key, value = heads(1)
    mask = (torch.arange(17) < 9).view(1, 1, 1, 17).expand(3, 1, 17, 17)
    before, _ = attention.attend_by_exp(torch.nn.Identity(), query, key, value, mask)
    key[:, :, 9:], value[:, :, 9:] = 3.0, 1e6
    after, _ = attention.attend_by_exp(torch.nn.Identity(), query, key, value, mask)
    assert torch.equal(before, after)


def test_a_real_encoder_in_bf16_is_as_close_to_float32_as_with_torchs_attention():
    """Each rounding to bf16 costs 2^-9."""
    texts = ["A paper on parsing.", "I bought this tea again", "word " * 100, "x", "two notes\nin one", "word " * 90]
    folder = resolve(str(packaged.minilm()), flag="--encoder")
    ours = TextEncoder(folder, pooling="mean", max_tokens=128, precision="bf16", device="cpu")
    plain = TextEncoder(folder, pooling="mean", max_tokens=128, precision="fp32", device="cpu")
    assert ours.model.config._attn_implementation == attention.EXP
    assert plain.model.config._attn_implementation != attention.EXP
    exact, found = (encoder.encode(texts).vectors.astype(np.float64) for encoder in (plain, ours))
    ours.model.set_attn_implementation("sdpa")
    torchs_own = ours.encode(texts).vectors.astype(np.float64)
    distance, torchs_distance = (1 - (vectors * exact).sum(1).min() for vectors in (found, torchs_own))
    assert distance < 2e-4
    assert distance < 2 * torchs_distance


_SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "sliding_window": 6,
    "use_sliding_window": True,
}
_T5_SHAPE = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("model_type", attention.LLMS)
def test_logits_and_gradients_of_every_llm_equal_those_with_torchs_attention(model_type, padded):
    """Covers grouped heads, sliding windows, relative positions and fully masked queries."""
    torch.manual_seed(0)
    t5 = model_type == "t5"
    config = AutoConfig.for_model(model_type, **(_T5_SHAPE if t5 else _SHAPE))
    model = (AutoModelForSeq2SeqLM if t5 else AutoModelForCausalLM).from_config(config).eval()
    attention.register_attention(model_type, dtype=torch.bfloat16, device=torch.device("cpu"))
    mask = torch.ones(3, 12, dtype=torch.long)
    if padded:
        mask[1, :5], mask[2, :11] = 0, 0
    embeds = torch.randn(3, 12, 32)
    more = {"decoder_input_ids": torch.randint(1, 50, (3, 7))} if t5 else {}
    found = {}
    for name in ("sdpa", attention.BMM):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        given = embeds.clone().requires_grad_()
        logits = model(inputs_embeds=given, attention_mask=mask, **more).logits
        logits = logits if t5 else logits[:, -1]
        logits.square().sum().backward()
        found[name] = (logits.detach(), given.grad[mask.bool()])
    for ours, torchs_own in zip(found[attention.BMM], found["sdpa"], strict=True):
        assert torchs_own.abs().max() > 1e-3
        torch.testing.assert_close(ours, torchs_own, rtol=1e-4, atol=1e-5)


def test_other_models_and_devices_keep_the_default_attention():
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    assert attention.register_attention("llama", dtype=bf16, device=cpu) == attention.BMM
    assert attention.register_attention("bert", dtype=bf16, device=cpu) == attention.EXP
    assert attention.register_attention("gpt2", dtype=bf16, device=cpu) is None
    assert attention.register_attention("llama", dtype=torch.float32, device=cpu) is None
    assert attention.register_attention("llama", dtype=bf16, device=torch.device("cuda")) is None
