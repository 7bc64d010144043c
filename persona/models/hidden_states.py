"""Hidden states of a frozen LLM: the vectors of each prompt's last token, in every layer.

State 0 is what the first block reads; state i is the output of block i. The last state is taken after the LLM's final
norm, as transformers' `output_hidden_states` has it, so its scale differs from that of the states before it.

Shapes: B requests, S soft tokens, L tokens of a row, H states (blocks + 1), D LLM width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from persona.models.frozen_llm import FrozenLLM
from persona.models.prompts import PromptIds, PromptText


@torch.inference_mode()
def last_hidden_states(llm: FrozenLLM, soft_BSD: Tensor, prompts: Sequence[PromptIds]) -> Tensor:
    """The hidden states (B, H, D) of each prompt's last token, in float32 on the CPU.

    They are those of the decoder of a decoder-only LLM, and of the encoder of an encoder-decoder LLM. A batch holds the
    states of all its tokens while it is computed: B·L·H·D numbers in the precision of the LLM.

    Args:
        llm: the frozen LLM.
        soft_BSD: soft tokens; S may be 0.
        prompts: token ids, as `PromptTokenizer.prompts` or `text_prompts` make them; none may be empty.
    """
    # Padding comes last. A causal LLM does not see it there, and needs neither mask nor positions.
    embeds_BLD, mask_BL = llm.embed_prompts(soft_BSD, prompts)
    model: Any = llm.model
    if llm.is_encoder_decoder:
        output = model.get_encoder()(inputs_embeds=embeds_BLD, attention_mask=mask_BL.long(), output_hidden_states=True)
    else:
        output = model.base_model(inputs_embeds=embeds_BLD, use_cache=False, output_hidden_states=True)
    last_B = torch.tensor([soft_BSD.shape[1] + len(prompt) - 1 for prompt in prompts])
    rows_B = torch.arange(len(prompts))
    # The layers of an LLM may be spread over GPUs.
    states = [state_BLD[rows_B.to(state_BLD.device), last_B.to(state_BLD.device)] for state_BLD in output.hidden_states]
    return torch.stack([state_BD.float().cpu() for state_BD in states], dim=1)


def text_prompts(llm: FrozenLLM, texts: Sequence[str]) -> list[PromptIds]:
    """Texts as the LLM's prompt options say: as the user's turn of a chat up to where the LLM answers, or plain.

    A plain text is what the tokenizer makes of it, without the separator in front of an answer: its last token is the
    text's own, or the special token that the tokenizer puts behind it.
    """
    tokenizer = llm.tokenizer
    prompts = tokenizer.prompts([PromptText(input=text) for text in texts])
    n_separator = len(tokenizer.separator)
    if tokenizer.options.prompt_format == "chat" or not n_separator:
        return prompts
    return [PromptIds(before=prompt.before, after=prompt.after[:-n_separator]) for prompt in prompts]
