"""The warm start, on an encoder and an LLM whose words have related places, as pretrained models' words do."""

import itertools

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models as tokenizer_models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from persona.errors import UsageError
from persona.models import resolve as models
from persona.models.encoder import TextEncoder
from persona.models.frozen_llm import FrozenLLM
from persona.options import PlugOptions
from persona.plug import warm_start
from persona.plug.module import Plug
from tests.models import ENCODER_WIDTH, LLM_WIDTH, tiny_encoder

# Words that the tiny encoder knows by their letters only; the fixture adds them to its vocabulary.
WORDS = ["".join(letters) for letters in itertools.product("bdfgklm", "aeiou", "nprst")]
FRAGMENTS = ["distingu", "ingred"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> TextEncoder:
    folder = tiny_encoder(tmp_path_factory.mktemp("encoder"))
    encoder = TextEncoder(models.resolve(str(folder), flag="--encoder"), pooling="mean", max_tokens=64, device="cpu")
    encoder.tokenizer.add_tokens(WORDS)
    torch.manual_seed(0)
    encoder.model.resize_token_embeddings(len(encoder.tokenizer), mean_resizing=False)
    return encoder


def llm_that_knows(words: list[str], encoder: TextEncoder, *, related: bool = True) -> FrozenLLM:
    """A Llama whose embedding of a word is a linear map of the encoder's vector, off centre, or just random."""
    tokens = ["</s>", "\n", *(f"Ġ{word}" for word in [*FRAGMENTS, *words]), *words[:9]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=LLM_WIDTH,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        eos_token_id=0,
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    weight = model.get_input_embeddings().weight.data
    weight.normal_()
    if related and words:
        vectors = torch.from_numpy(encoder.encode(words).vectors.astype(np.float32))
        first = 2 + len(FRAGMENTS)
        weight[first : first + len(words)] = vectors @ torch.randn(ENCODER_WIDTH, LLM_WIDTH) + 5.0
    return FrozenLLM(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="</s>"))


def new_plug(llm: FrozenLLM, **options) -> Plug:
    torch.manual_seed(2)
    return Plug(
        PlugOptions(**{"weights": "mean", "persona_tokens": 2, **options}),
        query_encoder=None,
        pooling="mean",
        width=ENCODER_WIDTH,
        llm_width=LLM_WIDTH,
        token_norm=llm.token_norm(),
    )


def some_behaviors(encoder: TextEncoder) -> np.ndarray:
    return encoder.encode([f"about {a} and {b} like it" for a, b in itertools.pairwise(WORDS)]).vectors


def ranks(plug: Plug, llm: FrozenLLM, vectors: np.ndarray) -> list[float]:
    """For each persona token: the mean place of a word's own token, by angle about the mean word, 1 is the nearest."""
    with torch.no_grad():
        packed = torch.from_numpy(vectors.astype(np.float32))
        soft = plug(packed, torch.ones(len(vectors), dtype=torch.long), None)[:, 1:]
        first = 2 + len(FRAGMENTS)
        tokens = llm.embed(torch.arange(first, first + len(vectors)))
        found = []
        for k in range(soft.shape[1]):
            cosines = torch.nn.functional.cosine_similarity(
                (soft[:, k] - tokens.mean(0)).unsqueeze(1), (tokens - tokens.mean(0)).unsqueeze(0), dim=-1
            )
            found.append(float((cosines > cosines.diagonal().unsqueeze(1)).sum(1).add(1).float().mean()))
    return found


def test_every_persona_token_of_a_word_points_at_its_own_embedding(encoder):
    llm = llm_that_knows(WORDS, encoder)
    vectors = encoder.encode(WORDS).vectors
    plug = new_plug(llm)
    assert min(ranks(plug, llm, vectors)) > len(WORDS) / 4  # about len / 2 by chance
    result = warm_start.fit(plug, encoder, llm, vectors)
    assert result.n_words == len(WORDS)  # not the fragments, and not the words without a space in front
    assert result.median_rank < len(WORDS) / 20
    assert max(ranks(plug, llm, vectors)) < len(WORDS) / 20


def test_an_llm_whose_words_have_no_places_is_found_out(encoder):
    llm = llm_that_knows(WORDS, encoder, related=False)
    result = warm_start.fit(new_plug(llm), encoder, llm, encoder.encode(WORDS).vectors)
    assert result.median_rank > len(WORDS) / 4


def test_soft_tokens_lie_as_far_from_the_mean_token_as_words_do_and_centre_on_it(encoder):
    llm = llm_that_knows(WORDS, encoder)
    behaviors = some_behaviors(encoder)
    plug = new_plug(llm)
    plug.set_typical_behavior(torch.from_numpy(behaviors.astype(np.float32)))
    warm_start.fit(plug, encoder, llm, behaviors)
    tokens = llm.embed(torch.arange(2 + len(FRAGMENTS), 2 + len(FRAGMENTS) + len(WORDS)))
    with torch.no_grad():
        soft = plug(torch.from_numpy(behaviors.astype(np.float32)), torch.ones(len(behaviors), dtype=torch.long), None)
        nobody = plug(torch.empty(0, ENCODER_WIDTH), torch.zeros(1, dtype=torch.long), None)
    for k in (1, 2):
        torch.testing.assert_close(soft[:, k].mean(0), tokens.mean(0), rtol=0, atol=1e-3)  # float32 through a gain
        spread = (soft[:, k] - tokens.mean(0)).norm(dim=-1).mean()
        torch.testing.assert_close(spread, (tokens - tokens.mean(0)).norm(dim=-1).mean(), rtol=1e-3, atol=0)
        # GELU of a mean is not the mean of GELU, but near it.
        assert (nobody[0, k] - tokens.mean(0)).norm() < spread / 4
    torch.testing.assert_close(nobody[0, 0], llm.embed(torch.tensor(llm.tokenizer.separator))[0])


def test_a_plug_with_a_gain_starts_where_one_without_does(encoder):
    llm = llm_that_knows(WORDS, encoder)
    behaviors = some_behaviors(encoder)
    history_Md = torch.from_numpy(behaviors.astype(np.float32))
    soft = []
    for gain in (1.0, 4.0):
        plug = new_plug(llm, persona_gain=gain)
        plug.set_typical_behavior(history_Md)
        result = warm_start.fit(plug, encoder, llm, behaviors)
        with torch.no_grad():
            soft.append((result.median_rank, plug(history_Md, torch.full((len(behaviors) // 2,), 2), None)))
    assert soft[0][0] == soft[1][0]
    torch.testing.assert_close(soft[1][1], soft[0][1], rtol=0, atol=1e-3 * float(soft[0][1].abs().max()))


def test_the_same_arguments_give_the_same_plug_and_leave_the_llm_alone(encoder):
    llm = llm_that_knows(WORDS, encoder)
    before = llm.model.get_input_embeddings().weight.clone()
    plugs = [new_plug(llm), new_plug(llm)]
    for plug in plugs:
        torch.manual_seed(int(torch.randint(1000, ())))  # another worker's random state
        warm_start.fit(plug, encoder, llm, encoder.encode(WORDS[:50]).vectors)
    for ours, theirs in zip(plugs[0].parameters(), plugs[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(before, llm.model.get_input_embeddings().weight)


def test_too_few_common_words_say_what_to_do(encoder):
    llm = llm_that_knows(WORDS[:5], encoder)
    with pytest.raises(UsageError, match="5 words.*train without a warm start"):
        warm_start.fit(new_plug(llm), encoder, llm, encoder.encode(WORDS).vectors)
