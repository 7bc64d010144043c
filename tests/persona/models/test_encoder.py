"""The frozen encoder: pooling against a plain loop, batches by tokens, and vectors that do not depend on the batch."""

from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from persona.errors import UsageError
from persona.models.encoder import TextEncoder, choose_precision, full_batches, pad, pool, token_batches

TEXTS = [
    "a paper",
    "",
    "the movie is about {braces}\nand new lines, which reach the encoder",
    "it",
    "one " * 40,
    "A paper",
]
# A component of a unit vector is rounded to float16 with an error of at most 2^-12 (half a unit in the last place of a
# number just below 1); two float32 sums in different orders can fall on different sides of a rounding border, so that
# two roundings of the same number differ by one unit in the last place, 2^-11.
FLOAT16 = 2.0**-11


@pytest.fixture(scope="module", params=["cls", "mean"])
def encoder(request, encoder_folder) -> TextEncoder:
    return TextEncoder(encoder_folder, pooling=request.param, max_tokens=24, precision="fp32", device="cpu")


def by_hand(encoder: TextEncoder, text: str) -> np.ndarray:
    """One text without any batch: the model on its tokens, pooled in a plain loop, in float64."""
    ids = torch.tensor([encoder.tokenize([text])[0]])
    with torch.no_grad():
        hidden = encoder.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].tolist()
    if encoder.pooling == "cls":
        pooled = hidden[0]
    else:
        pooled = [sum(token[i] for token in hidden) / len(hidden) for i in range(encoder.width)]
    return np.array(pooled) / sum(x * x for x in pooled) ** 0.5


@pytest.mark.parametrize("token_budget", [1, 60, 16_384])
def test_vectors_are_those_of_each_text_alone_in_any_batch_and_in_order(encoder, token_budget):
    encoder.token_budget = token_budget
    encoded = encoder.encode(TEXTS)
    assert encoded.vectors.dtype == np.float16
    expected = np.stack([by_hand(encoder, text) for text in TEXTS])
    np.testing.assert_allclose(encoded.vectors.astype(np.float64), expected, rtol=0, atol=FLOAT16)
    # Texts differ by far more than that, so a wrong order would be seen.
    assert np.abs(expected[0] - expected[3]).max() > 100 * FLOAT16


def test_vectors_have_unit_length(encoder):
    norms = np.linalg.norm(encoder.encode(TEXTS).vectors.astype(np.float64), axis=1)
    # Each of d components is off by at most 2^-12 of itself, and so is their norm.
    np.testing.assert_allclose(norms, 1.0, rtol=2.0**-11)


def test_the_same_texts_give_the_same_bytes(encoder):
    assert encoder.encode(TEXTS).vectors.tobytes() == encoder.encode(TEXTS).vectors.tobytes()


def test_texts_are_cut_and_what_they_cost_is_counted(encoder):
    lengths = [len(row) for row in encoder.tokenize(TEXTS)]
    assert max(lengths) == encoder.max_tokens
    encoder.token_budget = 16_384
    encoded = encoder.encode(TEXTS)
    assert encoded.n_tokens == sum(lengths)
    assert encoded.n_padded == max(lengths) * len(lengths)
    encoder.token_budget = 1
    assert encoder.encode(TEXTS).n_padded == encoded.n_tokens


def test_no_texts_are_no_vectors(encoder):
    assert encoder.encode([]).vectors.shape == (0, encoder.width)


def test_nothing_of_the_encoder_can_be_trained(encoder):
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_half_precision_stays_near(encoder_folder):
    """The same encoder in bf16: its vectors point the same way."""
    both = [
        TextEncoder(encoder_folder, pooling="mean", max_tokens=24, precision=precision, device="cpu").encode(TEXTS)
        for precision in ("fp32", "bf16")
    ]
    cosines = np.sum(both[0].vectors.astype(np.float64) * both[1].vectors.astype(np.float64), axis=1)
    # bf16 keeps 8 bits: a relative error of 2^-9 a rounding, over some 20 roundings in a row.
    assert cosines.min() > 1 - 20 * 2.0**-9


def test_more_tokens_than_positions_are_refused(encoder_folder):
    with pytest.raises(UsageError, match="at most 512 tokens of a text, not 513"):
        TextEncoder(encoder_folder, pooling="cls", max_tokens=513)


def test_a_precision_that_there_is_not_is_refused():
    assert choose_precision("fp32", torch.device("cpu")) is torch.float32
    assert choose_precision("bf16", torch.device("cpu")) is torch.bfloat16
    assert choose_precision("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)
    with pytest.raises(UsageError, match="auto, bf16, fp32, got 'fp8'"):
        choose_precision("fp8", torch.device("cpu"))


@given(st.data(), st.sampled_from(["cls", "mean"]))
def test_pooling_sees_no_padding(data, pooling):
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    hidden_NTd = torch.randn(len(lengths), 5, 3, generator=draw)
    mask_NT = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    noisy_NTd = torch.where(mask_NT.unsqueeze(-1), hidden_NTd, torch.full_like(hidden_NTd, 7.0))
    assert torch.equal(pool(hidden_NTd * mask_NT.unsqueeze(-1), mask_NT, pooling), pool(noisy_NTd, mask_NT, pooling))


@given(st.lists(st.integers(0, 60)), st.integers(1, 200))
def test_batches_hold_each_row_once_within_the_budget(lengths, budget):
    batches = list(token_batches(lengths, budget))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget
    longest = [max(lengths[row] for row in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch, after in pairwise(batches):
        # No batch is smaller than it must be: the next row would not have fitted in.
        assert (len(batch) + 1) * max(lengths[batch[0]], 1) > budget or lengths[after[0]] > lengths[batch[0]]


@given(st.lists(st.integers(0, 60)), st.lists(st.integers(0, 30)), st.integers(1, 200))
def test_batches_of_parts_are_those_of_all_rows_at_once(lengths, sizes, budget):
    rows = [(number, [0] * length) for number, length in enumerate(sorted(lengths, reverse=True))]
    ends = [0, *accumulate(sizes), len(rows)]
    parts = [rows[start:end] for start, end in pairwise(ends)]
    batches = [[number for number, _ in batch] for batch in full_batches(parts, budget)]
    assert batches == list(token_batches([len(row) for _, row in rows], budget))


def test_a_part_that_comes_is_encoded_before_the_next_is_asked_for():
    asked = []

    def parts():
        for number, length in enumerate((9, 5, 4)):
            asked.append(length)
            yield [(2 * number, [0] * length), (2 * number + 1, [0] * length)]

    found = full_batches(parts(), 10)
    assert [number for number, _ in next(found)] == [0] and asked == [9]
    assert [[number for number, _ in batch] for batch in found] == [[1], [2, 3], [4, 5]]


@given(st.lists(st.lists(st.integers(1, 9), max_size=6), max_size=5))
def test_padding_keeps_every_token_and_marks_the_rest(rows):
    ids_NT, mask_NT = pad(rows, 0, torch.device("cpu"))
    assert ids_NT.shape == mask_NT.shape == (len(rows), max([1, *map(len, rows)]))
    assert [ids[mask].tolist() for ids, mask in zip(ids_NT, mask_NT, strict=True)] == rows
    assert not ids_NT[~mask_NT].any()
