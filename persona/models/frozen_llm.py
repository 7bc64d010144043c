"""The frozen LLM: soft tokens and text in, embeddings or a loss out.

It is either encoder-decoder (T5-like) or decoder-only (Llama-like); `persona.models.prompts` says what each reads.
Texts are token ids and soft tokens are vectors. They meet only as embeddings, so no text can become a soft token.

Shapes: B requests, S soft tokens, F tokens of prefixes, L prompt tokens, T target tokens, D LLM width, V vocabulary.
"""

import warnings
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from persona.models import attention, loading
from persona.models.batching import pad, position_ids
from persona.models.device import choose_device, choose_precision
from persona.models.prompts import MAX_INPUT_TOKENS, PromptIds, PromptTokenizer
from persona.models.resolve import ModelFolder
from persona.options import Precision

_IGNORED = -100


class FrozenLLM(nn.Module):
    """A pretrained LLM whose weights never change; gradients pass through it to the soft tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_input_tokens: int = MAX_INPUT_TOKENS,
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self._checkpointed: list[nn.Module] = []
        # transformers passes a slice of the hidden states to the head; on a slice, matmul copies the whole vocabulary
        # matrix once per row of the batch.
        model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.tokenizer = PromptTokenizer(
            tokenizer, is_encoder_decoder=self.is_encoder_decoder, max_input_tokens=max_input_tokens
        )
        self.width: int = self._embeddings().embedding_dim

    @classmethod
    def load(
        cls,
        folder: ModelFolder,
        *,
        max_input_tokens: int = MAX_INPUT_TOKENS,
        precision: Precision = "auto",
        device: str | None = None,
    ) -> "FrozenLLM":
        """Loads the LLM of a folder; see `choose_precision` and `choose_device` for the defaults."""
        chosen = choose_device(device)
        config = loading.load_config(folder)
        dtype = choose_precision(precision, chosen)
        kernel = attention.register_attention(config.model_type, dtype=dtype, device=chosen)
        model: nn.Module = loading.load_model(
            loading.llm_class(config), folder, dtype=dtype, attn_implementation=kernel
        )
        tokenizer = loading.load_tokenizer(folder)
        return cls(cast(PreTrainedModel, model.to(chosen)), tokenizer, max_input_tokens=max_input_tokens)

    def train(self, mode: bool = True) -> "FrozenLLM":  # noqa: ARG002 - the signature is nn.Module's
        """Stays in eval mode, so that the LLM's own dropout is off while the plug trains."""
        super().train(False)
        for layer in self._checkpointed:
            layer.training = True  # of the layer alone, not of its submodules: their dropout stays off
        return self

    def checkpoint_activations(self) -> None:
        """From now on, keeps only the input of each layer and recomputes the rest in the backward pass."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer transformers rename the argument
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers recomputes only layers in training mode.
        self._checkpointed = [layer for layer in self.model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        self.train()

    @property
    def device(self) -> torch.device:
        """The device of the LLM, where soft tokens must be."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the LLM."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @torch.no_grad()
    def token_norm(self, sample: int = 8192) -> float:
        """Mean L2 norm of the token embeddings, over evenly spaced rows of the vocabulary."""
        n_tokens = self._embeddings().num_embeddings
        ids = torch.linspace(0, n_tokens - 1, min(sample, n_tokens), device=self.device).long()
        return float(self.embed(ids).float().norm(dim=-1).mean())

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (…) to embeddings (…, D)."""
        # Called as a module, so that ZeRO-3 gathers the weights.
        embedded: Tensor = self._embeddings()(ids)
        return embedded

    def embed_prompts(
        self, soft_BSD: Tensor, prompts: Sequence[PromptIds], targets: Sequence[Sequence[int]] = ()
    ) -> tuple[Tensor, Tensor]:
        """[before; soft tokens; after; target] of each request as embeddings (B, L, D), and their mask (B, L).

        Padding is on the right for an encoder-decoder LLM and on the left for a decoder-only one, whose rows must end
        together.
        """
        n_soft = soft_BSD.shape[1]
        targets = targets or [[]] * len(prompts)
        placeholders = [self.tokenizer.pad_id] * n_soft
        whole = [[*p.before, *placeholders, *p.after, *target] for p, target in zip(prompts, targets, strict=True)]
        ids_BL, mask_BL = pad(whole, self.tokenizer.pad_id, self.device)
        start_B1 = torch.tensor([len(prompt.before) for prompt in prompts], dtype=torch.long, device=self.device).view(
            -1, 1
        )
        index_BS = start_B1 + torch.arange(n_soft, device=self.device)
        embeds_BLD = self.embed(ids_BL)
        index_BSD = index_BS.unsqueeze(-1).expand(-1, -1, embeds_BLD.shape[-1])
        embeds_BLD = embeds_BLD.scatter(1, index_BSD, soft_BSD.to(embeds_BLD.dtype))
        if not self.is_encoder_decoder:
            # Rotating each row by its padding moves the padding from the right to the left.
            padding_B1 = (~mask_BL).sum(1, keepdim=True)
            source_BL = (torch.arange(mask_BL.shape[1], device=self.device) - padding_B1) % mask_BL.shape[1]
            embeds_BLD = embeds_BLD.gather(1, source_BL.unsqueeze(-1).expand_as(embeds_BLD))
            mask_BL = mask_BL.gather(1, source_BL)
        return embeds_BLD, mask_BL

    def nll(
        self,
        soft_BSD: Tensor,
        prompts: Sequence[PromptIds],
        targets: Sequence[list[int]],
    ) -> Tensor:
        """PPlug eq. 6 per request: the summed negative log-likelihood (B,) of the target's tokens, in nats, float32.

        Args:
            soft_BSD: soft tokens; S may be 0.
            prompts: token ids of the requests, as `PromptTokenizer.prompts` makes them.
            targets: token ids of the targets, as `PromptTokenizer.targets` makes them.
        """
        compute = self._seq2seq_logits if self.is_encoder_decoder else self._causal_logits
        logits_BTV, labels_BT = compute(soft_BSD, prompts, targets)
        # Only real target positions are converted to float32: these rows are the largest tensors of a step.
        is_target_BT = labels_BT != _IGNORED
        losses_N = nn.functional.cross_entropy(
            logits_BTV[is_target_BT].float(), labels_BT[is_target_BT], reduction="none"
        )
        rows_N = is_target_BT.nonzero()[:, 0]
        return losses_N.new_zeros(len(targets)).index_add(0, rows_N, losses_N)

    def _seq2seq_logits(
        self,
        soft_BSD: Tensor,
        prompts: Sequence[PromptIds],
        targets: Sequence[list[int]],
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) at the target positions and their labels (B, T), padded on the right."""
        labels_BT = self._labels(targets)
        embeds_BLD, mask_BL = self.embed_prompts(soft_BSD, prompts)
        shifted_BT = labels_BT.masked_fill(labels_BT == _IGNORED, self.tokenizer.pad_id).roll(1, dims=1)
        shifted_BT[:, 0] = self.model.config.decoder_start_token_id
        output = self.model(
            inputs_embeds=embeds_BLD, attention_mask=mask_BL, decoder_input_ids=shifted_BT, use_cache=False
        )
        return output.logits, labels_BT

    def _causal_logits(
        self,
        soft_BSD: Tensor,
        prompts: Sequence[PromptIds],
        targets: Sequence[list[int]],
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) at the target positions and their labels (B, T), padded on the left.

        Rows end together, so all target positions are among the last T of the batch: the head computes only those.
        """
        labels_BT = self._labels(targets)
        longest = labels_BT.shape[1]
        labels_BT = torch.stack([row.roll(longest - len(ids)) for row, ids in zip(labels_BT, targets, strict=True)])
        embeds_BLD, mask_BL = self.embed_prompts(soft_BSD, prompts, targets)
        output = self.model(
            inputs_embeds=embeds_BLD,
            attention_mask=mask_BL,
            position_ids=position_ids(mask_BL),
            logits_to_keep=longest + 1,
            use_cache=False,
        )
        return output.logits[:, :-1], labels_BT

    def _labels(self, targets: Sequence[list[int]]) -> Tensor:
        ids_BT, mask_BT = pad(targets, self.tokenizer.pad_id, self.device)
        return ids_BT.masked_fill(~mask_BT, _IGNORED)

    def _embeddings(self) -> nn.Embedding:
        return cast(nn.Embedding, self.model.get_input_embeddings())
