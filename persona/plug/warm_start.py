"""A better start for the projector: untrained, a behavior's soft token already lies near words of its meaning.

A random projector first has to find, through the frozen LLM, which meaning lies where in the space of token embeddings.
That map can be had in closed form, without any request or target: thousands of the LLM's own whole-word tokens are
encoded as texts, and the last layer of Proj (PAPER eq. 4) is fitted by ridge regression so that
scale·Proj(enc(word)) ≈ Emb(word).

Shapes: W words, N behaviors, d encoder width, F hidden width of the projector, K persona tokens, D LLM width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from persona.errors import UsageError
from persona.models.encoder import TextEncoder
from persona.models.frozen_llm import FrozenLLM
from persona.plug.module import Plug

# How byte-level BPE and SentencePiece write the space in front of a word.
_SPACES = ("Ġ", "▁")
_SHORTEST_WORD = 3
# Of these one is left out of the fit, to tell how well it does on words that it has not seen.
_HELD_OUT_OF = 10
# Ridge penalty, as a share of the mean variance of a feature.
_RIDGE = 0.1


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What the fit found.

    `median_rank` is the place of a left-out word's own token among all `n_words` tokens, by the angle to what the
    projector makes of the word: 1 is best, n_words / 2 is chance.
    """

    n_words: int
    median_rank: float


@torch.no_grad()
def fit(
    plug: Plug, encoder: TextEncoder, llm: FrozenLLM, behaviors_Nd: NDArray[np.float16], *, max_words: int = 5000
) -> WarmStart:
    """Sets the projector's last layer and the instruction vector of an untrained plug, in place.

    Words and behaviors are centred each on their own mean, since single words and whole sentences lie apart in the
    encoder's space; all K persona tokens start alike and part in training. The result depends on nothing but the
    arguments and the plug's (seeded) first layer, so every worker gets the same.

    Args:
        plug: new, on any device; one with a `persona_gain` already knows what is typical.
        encoder: the one that made the behaviors' vectors.
        llm: the plug's LLM, not yet sharded by ZeRO-3.
        behaviors_Nd: vectors (N, d) of behaviors like those to come, as in the store; some hundreds are plenty.
        max_words: how many words to fit; the first ones of the LLM's vocabulary.

    Raises:
        UsageError: the tokenizers share too few whole words to fit a map, or there are no two behaviors.
    """
    ids, words = _common_words(encoder, llm, max_words)
    if len(words) < 2 * _HELD_OUT_OF or len(behaviors_Nd) < 2:
        raise UsageError(
            f"a warm start from the vocabulary needs {2 * _HELD_OUT_OF} whole words that encoder and LLM share, and "
            f"2 behaviors; found {len(words)} words and {len(behaviors_Nd)} behaviors; train without a warm start"
        )
    device = plug.projector.outer.weight.device
    words_Wd = torch.from_numpy(encoder.encode(words).vectors.astype(np.float32)).to(device)
    tokens_WD = llm.embed(torch.tensor(ids, device=llm.device)).double().to(device)
    token_D = tokens_WD.mean(0)
    spread_WD = tokens_WD - token_D

    typical_F = plug.projector.activate(plug.typical_behavior)
    features_WF = plug.set_apart(plug.projector.activate(words_Wd), typical_F).double()
    features_WF = features_WF - features_WF.mean(0)
    held_W = torch.arange(len(words), device=device) % _HELD_OUT_OF == 0
    map_FD = _ridge(features_WF[~held_W], spread_WD[~held_W])
    rank = _median_rank(features_WF[held_W] @ map_FD, held_W.nonzero().squeeze(1), spread_WD)

    vectors_Nd = torch.from_numpy(behaviors_Nd.astype(np.float32)).to(device)
    behaviors_NF = plug.set_apart(plug.projector.activate(vectors_Nd), typical_F).double()
    centre_F = behaviors_NF.mean(0)
    size = ((behaviors_NF - centre_F) @ map_FD).norm(dim=-1).mean()
    # Ridge shrinks, so behaviors would all look like the mean token: the factor takes them as far from it as words are.
    map_FD = map_FD * (spread_WD.norm(dim=-1).mean() / size.clamp(min=1e-6))

    n_tokens = plug.options.persona_tokens
    outer = plug.projector.outer
    outer.weight.copy_((map_FD.T / plug.scale).repeat(n_tokens, 1))
    outer.bias.copy_(((token_D - centre_F @ map_FD) / plug.scale).repeat(n_tokens))
    if plug.options.instruction == "vector" and llm.tokenizer.separator:
        # What the LLM knows as the border between request and answer disturbs it less than a random vector.
        separator_D = llm.embed(torch.tensor(llm.tokenizer.separator, device=llm.device)).mean(0)
        plug.instruction.copy_((separator_D.to(device) / plug.scale).unsqueeze(0))
    return WarmStart(n_words=len(words), median_rank=rank)


def _common_words(encoder: TextEncoder, llm: FrozenLLM, max_words: int) -> tuple[list[int], list[str]]:
    """Ids and texts of whole lower-case words that are one token to the LLM and one to the encoder, smallest ids first.

    Byte-pair and SentencePiece vocabularies are ordered by frequency, so that these are common words; that the encoder
    knows the word, too, sorts out fragments such as "distingu".
    """
    ids, words = [], []
    tokenizer = llm.tokenizer.pretrained
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        if token is None or not token.startswith(_SPACES):
            continue
        word = token[1:]
        plain = len(word) >= _SHORTEST_WORD and word.isalpha() and word.islower()
        if plain and encoder.tokenizer.tokenize(word) == [word]:
            ids.append(number)
            words.append(word)
        if len(words) == max_words:
            break
    return ids, words


def _ridge(features_WF: Tensor, targets_WD: Tensor) -> Tensor:
    """The map (F, D) of least squares with a penalty; both sides are centred."""
    gram_FF = features_WF.T @ features_WF
    penalty = _RIDGE * gram_FF.diagonal().mean()
    eye_FF = torch.eye(len(gram_FF), dtype=gram_FF.dtype, device=gram_FF.device)
    map_FD: Tensor = torch.linalg.solve(gram_FF + penalty * eye_FF, features_WF.T @ targets_WD)
    return map_FD


def _median_rank(guesses_GD: Tensor, own_G: Tensor, tokens_WD: Tensor) -> float:
    """The median place of each guess's own token among all tokens, 1 for the nearest by angle."""
    cosines_GW = nn.functional.normalize(guesses_GD, dim=-1) @ nn.functional.normalize(tokens_WD, dim=-1).T
    own_G1 = cosines_GW.gather(1, own_G.unsqueeze(1))
    return float((cosines_GW > own_G1).sum(1).add(1).double().quantile(0.5))
