"""Starts the projector so that a behavior's soft token is near the embeddings of words with the same meaning.

A random projector has to learn through the frozen LLM which meanings are where in its space of token embeddings. That
map has a closed form and needs neither requests nor targets: thousands of the LLM's own whole-word tokens are encoded
as texts, and the last layer of Proj (PPlug eq. 4) is fitted by ridge regression to scale·Proj(enc(word)) ≈ Emb(word).

Shapes: W words, N behaviors, d encoder width, F hidden width of the projector, D LLM width.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persona.errors import UsageError
from persona.models.encoder import TextEncoder
from persona.models.frozen_llm import FrozenLLM
from persona.plug.module import Plug

# How byte-level BPE and SentencePiece mark the space in front of a word.
_SPACES = ("Ġ", "▁")
_MIN_LETTERS = 3
# One word in this many is not fitted: only words outside the fit can show how good it is.
HELD_OUT_EVERY = 10
_MIN_WORDS = 2 * HELD_OUT_EVERY
# Ridge penalty, as a share of the mean variance of a feature.
_RIDGE = 0.1


@torch.no_grad()
def fit(
    plug: Plug, encoder: TextEncoder, llm: FrozenLLM, behaviors_Nd: NDArray[np.float16], *, max_words: int = 5000
) -> None:
    """Sets the projector's last layer and the instruction vector of an untrained plug, in place.

    Words and behaviors are centered on their own means, because single words and sentences occupy different regions of
    the encoder's space. All persona tokens start equal and separate in training. The result depends only on the
    arguments and the plug's seeded first layer, so all workers compute the same.

    Args:
        plug: new, on any device; with a `persona_gain`, its typical behavior must be set.
        encoder: the encoder of the behaviors' vectors.
        llm: the plug's LLM, not yet sharded by ZeRO-3.
        behaviors_Nd: vectors (N, d) of typical behaviors; some hundreds are enough.
        max_words: fit at most this many words, the first of the LLM's vocabulary.

    Raises:
        UsageError: the tokenizers share too few whole words, or there are fewer than two behaviors.
    """
    ids, words = common_words(encoder, llm, max_words)
    if len(words) < _MIN_WORDS or len(behaviors_Nd) < 2:
        raise UsageError(
            f"a warm start from the vocabulary needs {_MIN_WORDS} whole words that encoder and LLM share, and "
            f"2 behaviors; found {len(words)} words and {len(behaviors_Nd)} behaviors; give --warm-start none"
        )
    device = plug.projector.outer.weight.device
    tokens_WD = llm.embed(torch.tensor(ids, device=llm.device)).double().to(device)
    token_D = tokens_WD.mean(0)
    spread_WD = tokens_WD - token_D

    features_WF = _features(plug, encoder.encode(words).vectors)
    features_WF = features_WF - features_WF.mean(0)
    fitted_W = torch.arange(len(words), device=device) % HELD_OUT_EVERY != 0
    map_FD = _ridge(features_WF[fitted_W], spread_WD[fitted_W])

    behaviors_NF = _features(plug, behaviors_Nd)
    center_F = behaviors_NF.mean(0)
    size = ((behaviors_NF - center_F) @ map_FD).norm(dim=-1).mean()
    # Ridge regression shrinks, so behaviors would be too close to the mean token: scale them to the spread of words.
    map_FD = map_FD * (spread_WD.norm(dim=-1).mean() / size.clamp(min=1e-6))

    n_tokens = plug.options.persona_tokens
    outer = plug.projector.outer
    outer.weight.copy_((map_FD.T / plug.scale).repeat(n_tokens, 1))
    outer.bias.copy_(((token_D - center_F @ map_FD) / plug.scale).repeat(n_tokens))
    if plug.options.instruction == "vector" and llm.tokenizer.separator:
        # The LLM knows its separator between request and answer; a random vector would disturb it more.
        separator_D = llm.embed(torch.tensor(llm.tokenizer.separator, device=llm.device)).mean(0)
        plug.instruction.copy_((separator_D.to(device) / plug.scale).unsqueeze(0))
    if plug.options.query_token:
        _start_query_token(plug)


def _start_query_token(plug: Plug) -> None:
    """Makes the query token that of a persona whose only behavior is the query, since both are read by one encoder."""
    fitted, gain = plug.projector, plug.options.persona_gain
    weight_DF, bias_D = fitted.outer.weight[: plug.llm_width], fitted.outer.bias[: plug.llm_width]
    typical_F = fitted.activate(plug.typical_behavior)
    plug.query_projector.inner.load_state_dict(fitted.inner.state_dict())
    plug.query_projector.outer.weight.copy_(gain * weight_DF)
    plug.query_projector.outer.bias.copy_(bias_D + (1 - gain) * weight_DF @ typical_F)


def _features(plug: Plug, vectors_Nd: NDArray[np.float16]) -> Tensor:
    """The inputs (N, F) of the projector's last layer for one behavior each, in float64."""
    packed_Nd = torch.from_numpy(vectors_Nd.astype(np.float32)).to(plug.projector.outer.weight.device)
    typical_F = plug.projector.activate(plug.typical_behavior)
    return plug.scale_deviation(plug.projector.activate(packed_Nd), typical_F).double()


def common_words(encoder: TextEncoder, llm: FrozenLLM, max_words: int) -> tuple[list[int], list[str]]:
    """Ids and texts of lower-case words that are one token for the LLM and one for the encoder, smallest ids first.

    Byte-pair and SentencePiece vocabularies are ordered by frequency, so these are common words. Fragments such as
    "distingu" are single tokens of the LLM, but rarely of the encoder too.
    """
    ids, words = [], []
    tokenizer = llm.tokenizer.pretrained
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        if token is None or not token.startswith(_SPACES):
            continue
        word = token[1:]
        plain = len(word) >= _MIN_LETTERS and word.isalpha() and word.islower()
        if plain and encoder.tokenizer.tokenize(word) == [word]:
            ids.append(number)
            words.append(word)
        if len(words) == max_words:
            break
    return ids, words


def _ridge(features_WF: Tensor, targets_WD: Tensor) -> Tensor:
    """The map (F, D) of least squares with a penalty; both sides are centered."""
    gram_FF = features_WF.T @ features_WF
    penalty = _RIDGE * gram_FF.diagonal().mean()
    eye_FF = torch.eye(len(gram_FF), dtype=gram_FF.dtype, device=gram_FF.device)
    map_FD: Tensor = torch.linalg.solve(gram_FF + penalty * eye_FF, features_WF.T @ targets_WD)
    return map_FD
