"""The frozen encoder: pooling equals a plain loop, and vectors do not depend on the batch."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from persona.errors import UsageError
from persona.models.encoder import TextEncoder
from persona.models.sentence_head import SentenceHead
from persona.options import Pooling

TEXTS = [
    "a paper",
    "",
    "the movie is about {braces}\nand new lines, which reach the encoder",
    "it",
    "one " * 40,
    "A paper",
]
# A component of a unit vector is rounded to float16 with an error of at most 2^-12 (half a unit in the last place of a
# number just below 1). Two float32 sums in different orders can round to different neighbors, so two roundings of the
# same number can differ by one unit in the last place, 2^-11.
FLOAT16 = 2.0**-11


@pytest.fixture(scope="module", params=["cls", "mean"])
def encoder(request, encoder_folder) -> TextEncoder:
    return TextEncoder(encoder_folder, pooling=request.param, max_tokens=24, precision="fp32", device="cpu")


def by_hand(encoder: TextEncoder, text: str) -> np.ndarray:
    """The vector of one text: the model on its tokens alone, pooled in a plain loop in float64."""
    ids = torch.tensor([encoder.tokenize([text])[0]])
    with torch.no_grad():
        hidden = encoder.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].tolist()
    if encoder.pooling == "cls":
        pooled = hidden[0]
    else:
        pooled = [sum(token[i] for token in hidden) / len(hidden) for i in range(encoder.width)]
    return np.array(pooled) / sum(x * x for x in pooled) ** 0.5


@pytest.mark.parametrize("token_budget", [1, 60, 16_384])
def test_each_text_has_the_same_vector_in_any_batch_and_in_order(encoder, token_budget):
    encoder.token_budget = token_budget
    encoded = encoder.encode(TEXTS)
    assert encoded.vectors.dtype == np.float16
    expected = np.stack([by_hand(encoder, text) for text in TEXTS])
    np.testing.assert_allclose(encoded.vectors.astype(np.float64), expected, rtol=0, atol=FLOAT16)
    # Texts differ by far more than that, so a wrong order would fail.
    assert np.abs(expected[0] - expected[3]).max() > 100 * FLOAT16


def test_vectors_have_unit_length(encoder):
    norms = np.linalg.norm(encoder.encode(TEXTS).vectors.astype(np.float64), axis=1)
    # Each of the d components has a relative error of at most 2^-12, and so has their norm.
    np.testing.assert_allclose(norms, 1.0, rtol=2.0**-11)


def test_the_same_texts_give_the_same_bytes(encoder):
    assert encoder.encode(TEXTS).vectors.tobytes() == encoder.encode(TEXTS).vectors.tobytes()


def test_texts_are_cut_and_tokens_are_counted(encoder):
    lengths = [len(row) for row in encoder.tokenize(TEXTS)]
    assert max(lengths) == encoder.max_tokens
    encoder.token_budget = 16_384
    encoded = encoder.encode(TEXTS)
    assert encoded.n_tokens == sum(lengths)
    assert encoded.n_padded == max(lengths) * len(lengths)
    encoder.token_budget = 1
    assert encoder.encode(TEXTS).n_padded == encoded.n_tokens


def test_no_texts_give_no_vectors(encoder):
    assert encoder.encode([]).vectors.shape == (0, encoder.width)


def test_no_parameter_of_the_encoder_can_be_trained(encoder):
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_vectors_in_bf16_point_in_the_same_direction(encoder_folder):
    both = [
        TextEncoder(encoder_folder, pooling="mean", max_tokens=24, precision=precision, device="cpu").encode(TEXTS)
        for precision in ("fp32", "bf16")
    ]
    cosines = np.sum(both[0].vectors.astype(np.float64) * both[1].vectors.astype(np.float64), axis=1)
    # bf16 has 8 bits: a relative error of 2^-9 per rounding, over about 20 roundings in a row.
    assert cosines.min() > 1 - 20 * 2.0**-9


def test_more_tokens_than_positions_are_refused(encoder_folder):
    with pytest.raises(UsageError, match="at most 512 tokens of a text, not 513"):
        TextEncoder(encoder_folder, pooling="cls", max_tokens=513)


@given(st.data(), st.sampled_from(get_args(Pooling)))
def test_pooling_ignores_padding(data, pooling):
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    hidden_NTd = torch.randn(len(lengths), 5, 3, generator=draw)
    mask_NT = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    noisy_NTd = torch.where(mask_NT.unsqueeze(-1), hidden_NTd, torch.full_like(hidden_NTd, 7.0))
    head = SentenceHead(pooling)
    assert torch.equal(head(hidden_NTd * mask_NT.unsqueeze(-1), mask_NT), head(noisy_NTd, mask_NT))
