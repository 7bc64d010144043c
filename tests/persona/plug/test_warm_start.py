"""The warm start, with an encoder and an LLM whose word embeddings are related, as those of pretrained models are."""

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

# Words of several tokens in the tiny encoder; the fixture adds them to its vocabulary.
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
    """A Llama whose embedding of a word is an affine map of the encoder's vector, or random."""
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
        PlugOptions(**{"weights": "mean", "persona_tokens": 2, "persona_gain": 1.0, **options}),
        query_encoder=None,
        width=ENCODER_WIDTH,
        llm_width=LLM_WIDTH,
        token_norm=llm.token_norm(),
    )


def some_behaviors(encoder: TextEncoder) -> np.ndarray:
    return encoder.encode([f"about {a} and {b} like it" for a, b in itertools.pairwise(WORDS)]).vectors


def word_tokens(llm: FrozenLLM) -> torch.Tensor:
    """The LLM's embeddings (W, D) of WORDS."""
    first = 2 + len(FRAGMENTS)
    with torch.no_grad():
        return llm.embed(torch.arange(first, first + len(WORDS)))


def ranks(plug: Plug, llm: FrozenLLM, vectors: np.ndarray) -> torch.Tensor:
    """For each word and persona token (W, K): the rank of the word's own embedding by angle, 1 is the nearest.

    Soft tokens and embeddings are centered on their own means. By chance the rank is about W / 2.
    """
    tokens = torch.nn.functional.normalize(word_tokens(llm) - word_tokens(llm).mean(0), dim=-1)
    found = []
    with torch.no_grad():
        soft = plug(torch.from_numpy(vectors.astype(np.float32)), torch.ones(len(vectors), dtype=torch.long), None)
    for k in range(1, soft.shape[1]):
        cosines = torch.nn.functional.normalize(soft[:, k] - soft[:, k].mean(0), dim=-1) @ tokens.T
        found.append((cosines > cosines.diagonal().unsqueeze(1)).sum(1) + 1)
    return torch.stack(found, dim=1)


def held_out_rank(plug: Plug, llm: FrozenLLM, vectors: np.ndarray) -> float:
    """The median rank of words that were not fitted, over all persona tokens."""
    return float(ranks(plug, llm, vectors)[:: warm_start.HELD_OUT_EVERY].double().quantile(0.5))


def test_every_persona_token_of_a_word_is_near_its_embedding(encoder):
    llm = llm_that_knows(WORDS, encoder)
    vectors = encoder.encode(WORDS).vectors
    plug = new_plug(llm)
    assert ranks(plug, llm, vectors).double().mean(0).min() > len(WORDS) / 4
    warm_start.fit(plug, encoder, llm, vectors)
    assert held_out_rank(plug, llm, vectors) < len(WORDS) / 20
    assert ranks(plug, llm, vectors).double().mean(0).max() < len(WORDS) / 20


@pytest.mark.parametrize("gain", [1.0, 4.0])
def test_a_query_token_starts_as_the_persona_of_someone_who_wrote_the_query(encoder, gain):
    llm = llm_that_knows(WORDS, encoder)
    options = PlugOptions(weights="mean", persona_tokens=2, query_token=True, persona_gain=gain)
    plug = Plug(
        options,
        query_encoder=torch.nn.Identity(),
        query_head=None,
        width=ENCODER_WIDTH,
        llm_width=LLM_WIDTH,
        token_norm=llm.token_norm(),
    )
    behaviors = torch.from_numpy(some_behaviors(encoder).astype(np.float32))
    plug.set_typical_behavior(behaviors)
    warm_start.fit(plug, encoder, llm, some_behaviors(encoder))
    lengths = torch.ones(len(behaviors), dtype=torch.long)
    with torch.no_grad():
        persona = plug.persona(behaviors, lengths, plug.weigh(behaviors, lengths, None))[:, 0]
        query = plug.scale * plug.query_projector(behaviors)
    # float32 sums in another order, multiplied by the gain.
    torch.testing.assert_close(query, persona, rtol=1e-4, atol=1e-4 * float(persona.abs().max()))


def test_only_whole_words_are_fitted(encoder):
    """Neither fragments nor words without a leading space."""
    ids, words = warm_start.common_words(encoder, llm_that_knows(WORDS, encoder), 5000)
    assert words == WORDS
    assert ids == list(range(2 + len(FRAGMENTS), 2 + len(FRAGMENTS) + len(WORDS)))


def test_unrelated_embeddings_cannot_be_fitted(encoder):
    llm = llm_that_knows(WORDS, encoder, related=False)
    vectors = encoder.encode(WORDS).vectors
    plug = new_plug(llm)
    warm_start.fit(plug, encoder, llm, vectors)
    assert held_out_rank(plug, llm, vectors) > len(WORDS) / 4


def test_soft_tokens_have_mean_and_spread_of_the_word_embeddings(encoder):
    llm = llm_that_knows(WORDS, encoder)
    behaviors = some_behaviors(encoder)
    plug = new_plug(llm)
    plug.set_typical_behavior(torch.from_numpy(behaviors.astype(np.float32)))
    warm_start.fit(plug, encoder, llm, behaviors)
    tokens = word_tokens(llm)
    with torch.no_grad():
        soft = plug(torch.from_numpy(behaviors.astype(np.float32)), torch.ones(len(behaviors), dtype=torch.long), None)
        typical = plug(torch.empty(0, ENCODER_WIDTH), torch.zeros(1, dtype=torch.long), None)
    for k in (1, 2):
        torch.testing.assert_close(soft[:, k].mean(0), tokens.mean(0), rtol=0, atol=1e-3)  # float32 through a gain
        spread = (soft[:, k] - tokens.mean(0)).norm(dim=-1).mean()
        torch.testing.assert_close(spread, (tokens - tokens.mean(0)).norm(dim=-1).mean(), rtol=1e-3, atol=0)
        # GELU of a mean differs from the mean of GELU, but not by much.
        assert (typical[0, k] - tokens.mean(0)).norm() < spread / 4
    torch.testing.assert_close(typical[0, 0], llm.embed(torch.tensor(llm.tokenizer.separator))[0])


def test_the_start_does_not_depend_on_the_gain(encoder):
    llm = llm_that_knows(WORDS, encoder)
    behaviors = some_behaviors(encoder)
    words = encoder.encode(WORDS).vectors
    history_Md = torch.from_numpy(behaviors.astype(np.float32))
    soft, found = [], []
    for gain in (1.0, 4.0):
        plug = new_plug(llm, persona_gain=gain)
        plug.set_typical_behavior(history_Md)
        warm_start.fit(plug, encoder, llm, behaviors)
        found.append(held_out_rank(plug, llm, words))
        with torch.no_grad():
            soft.append(plug(history_Md, torch.full((len(behaviors) // 2,), 2), None))
    assert found[0] == found[1]
    torch.testing.assert_close(soft[1], soft[0], rtol=0, atol=1e-3 * float(soft[0].abs().max()))


def test_the_fit_is_deterministic_and_does_not_change_the_llm(encoder):
    llm = llm_that_knows(WORDS, encoder)
    before = llm.model.get_input_embeddings().weight.clone()
    plugs = [new_plug(llm), new_plug(llm)]
    for plug in plugs:
        torch.manual_seed(int(torch.randint(1000, ())))  # another worker's random state
        warm_start.fit(plug, encoder, llm, encoder.encode(WORDS[:50]).vectors)
    for ours, theirs in zip(plugs[0].parameters(), plugs[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(before, llm.model.get_input_embeddings().weight)


def test_too_few_common_words_are_refused(encoder):
    llm = llm_that_knows(WORDS[:5], encoder)
    with pytest.raises(UsageError, match="5 words.*--warm-start none"):
        warm_start.fit(new_plug(llm), encoder, llm, encoder.encode(WORDS).vectors)
