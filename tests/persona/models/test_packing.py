"""Packed rows: the vectors are those of padded batches for each architecture, or the batches stay padded."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from persona.models import packing
from persona.models.batching import TokenRows
from persona.models.encoder import TextEncoder
from persona.models.encoder_model import DECODERS, T5_LIKE, WITH_CLS
from persona.models.resolve import ModelFolder, resolve
from persona.models.sentence_head import SentenceHead
from persona.options import Pooling
from tests import encoders

# Longer and shorter than the sliding windows of the tiny models, equal lengths, and the padding token inside a text:
# RoBERTa does not count its position.
TEXTS = ["a title [PAD] of a paper", "it", "the title of a paper " * 9, "", "a movie is good and i like it", "is"]
# Two roundings to float16 of nearly the same component, see test_encoder.
FLOAT16 = 2.0**-11
BIDIRECTIONAL = {"qwen3, bidirectional": "qwen3", "gemma3_text, bidirectional": "gemma3_text"}


def folder(path: Path, name: str) -> ModelFolder:
    settings = dict(encoders.size_of(BIDIRECTIONAL.get(name, name)))
    if name == "qwen3, bidirectional":
        settings["is_causal"] = False
    if name == "gemma3_text, bidirectional":
        settings |= {"use_bidirectional_attention": True}
    return resolve(str(encoders.transformer(path, BIDIRECTIONAL.get(name, name), **settings)), flag="--encoder")


def encoder(found: ModelFolder, *, packed: bool) -> TextEncoder:
    return TextEncoder(found, pooling="mean", max_tokens=64, precision="fp32", device="cpu", packed=packed)


@pytest.mark.parametrize("name", [*packing.CAN_PACK, *BIDIRECTIONAL])
def test_packed_rows_have_the_vectors_of_padded_rows(name, tmp_path):
    found = folder(tmp_path, name)
    expected = encoder(found, packed=False).encode(TEXTS)
    ours = encoder(found, packed=True)
    assert ours.packed and ours.model.config._attn_implementation == packing.PACKED
    for token_budget in (1, 30, 2048):
        ours.token_budget = token_budget
        encoded = ours.encode(TEXTS)
        np.testing.assert_allclose(
            encoded.vectors.astype(np.float64), expected.vectors.astype(np.float64), rtol=0, atol=FLOAT16
        )
        assert encoded.n_padded == encoded.n_tokens == expected.n_tokens < expected.n_padded
    # Texts differ by far more than that, so a wrong vector would fail.
    distances = np.abs(expected.vectors.astype(np.float64) - np.roll(expected.vectors, 1, axis=0)).max(1)
    assert distances.min() > 20 * FLOAT16


@pytest.mark.parametrize("name", sorted({*WITH_CLS, *DECODERS, *T5_LIKE} - {*packing.CAN_PACK}))
def test_other_encoders_pad_their_batches(name, tmp_path):
    found = folder(tmp_path, name) if name not in T5_LIKE else t5(tmp_path, name)
    assert not encoder(found, packed=True).packed


def t5(path: Path, kind: str) -> ModelFolder:
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return resolve(str(encoders.transformer(path, kind, **shape)), flag="--encoder")


def attend_across_rows(module, query, key, value, attention_mask, **_):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2), None


def refuse(*_, **__):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


@pytest.mark.parametrize(
    ("kernel", "reason"), [(attend_across_rows, "its vectors differ by"), (refuse, "only supports Ampere")]
)
def test_a_kernel_that_is_wrong_or_fails_is_not_used(monkeypatch, caplog, encoder_folder, kernel, reason):
    monkeypatch.setattr(packing, "attend_within_rows", kernel)
    with caplog.at_level(logging.WARNING):
        ours = encoder(encoder_folder, packed=True)
    assert not ours.packed
    assert len(caplog.messages) == 1 and reason in caplog.text
    expected = encoder(encoder_folder, packed=False).encode(TEXTS).vectors
    assert ours.encode(TEXTS).vectors.tobytes() == expected.tobytes()


def test_a_wrong_position_is_noticed(monkeypatch, encoder_folder):
    pack = packing.pack

    def without_restart(rows, device, *, padding_idx):
        whole = TokenRows(rows.ids_M, np.array([len(rows.ids_M)]))
        positions = pack(whole, device, padding_idx=padding_idx).position_ids_1M
        return replace(pack(rows, device, padding_idx=padding_idx), position_ids_1M=positions)

    monkeypatch.setattr(packing, "pack", without_restart)
    assert not encoder(encoder_folder, packed=True).packed


def test_rows_are_padded_on_cpus_and_in_float32_by_default(encoder_folder):
    assert not TextEncoder(encoder_folder, pooling="mean", max_tokens=64, device="cpu").packed
    assert packing.is_faster(dtype=torch.bfloat16, device=torch.device("cuda"))
    assert not packing.is_faster(dtype=torch.float32, device=torch.device("cuda"))


@pytest.mark.parametrize(("heads", "window"), [(4, None), (4, 8), (2, None)])
def test_the_kernel_of_gpus_is_called_with_what_it_accepts(heads, window, encoder_folder):
    """Shapes and types only: torch knows them without a GPU."""
    module = encoder(encoder_folder, packed=False).model.encoder.layer[0].attention.self
    with FakeTensorMode():
        query = torch.empty(1, 4, 17, 8, dtype=torch.bfloat16, device="cuda")
        key = torch.empty(1, heads, 17, 8, dtype=torch.bfloat16, device="cuda")
        ends = torch.empty(4, dtype=torch.int32, device="cuda")
        mixed, _ = packing.attend_within_rows(
            module, query, key, key, None, cu_seq_lens_q=ends, max_length_q=9, scaling=0.5, sliding_window=window
        )
    assert mixed.shape == (1, 17, 4, 8) and mixed.is_cuda


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.sampled_from(get_args(Pooling)), st.integers(0, 1000))
def test_pooling_of_packed_rows_is_that_of_padded_rows(lengths, pooling, seed):
    hidden_NTd = torch.randn(len(lengths), 5, 3, generator=torch.Generator().manual_seed(seed))
    mask_NT = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    head = SentenceHead(pooling)
    packed_Nd = head.forward_packed(hidden_NTd[mask_NT], torch.tensor(lengths))
    torch.testing.assert_close(packed_Nd, head(hidden_NTd, mask_NT), rtol=1e-5, atol=1e-6)
