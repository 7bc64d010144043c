"""The frozen LLM behind one small interface: soft tokens and text in, loss or answers out.

Two kinds of LLM: encoder-decoder (T5-like; soft tokens and text go to the encoder) and decoder-only (Llama-like; soft
tokens, text, answer in one row). Text is tokens, soft tokens are vectors, and the two only meet as embeddings, so no
text that a user types can reach a soft token.

Shapes: B requests, S soft tokens, L text tokens, T target tokens, D LLM width, V vocabulary.
"""

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Cache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from persona.engines.decoding import Answer, SeededSampling, follow, search
from persona.engines.kv_cache import CausalSteps, Seq2SeqSteps, places
from persona.models import attention
from persona.models.encoder import choose_precision, pad
from persona.models.resolve import ModelFolder
from persona.options import Decoding, Precision

_IGNORED = -100
# Between request and answer of a decoder-only LLM: without it the two would run together as one word.
_SEPARATOR = "\n"


class FrozenLLM(nn.Module):
    """A pretrained LLM whose weights never change; gradients pass through it to the soft tokens."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_input_tokens: int = 256
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self._checkpointed: list[nn.Module] = []
        # transformers hands the head a slice of the hidden states; on a slice, matmul copies the whole vocabulary
        # matrix once for each row of the batch.
        model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
        self.tokenizer = tokenizer
        self.max_input_tokens = max_input_tokens
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.eos_ids = _declared_eos_ids(model, tokenizer)
        self.width: int = self._embeddings().embedding_dim
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.separator: list[int] = (
            [] if self.is_encoder_decoder else tokenizer(_SEPARATOR, add_special_tokens=False)["input_ids"]
        )

    @classmethod
    def load(
        cls,
        folder: ModelFolder,
        *,
        max_input_tokens: int = 256,
        precision: Precision = "auto",
        device: str | None = None,
    ) -> "FrozenLLM":
        """Loads the LLM of a folder; `precision` auto is bf16 where the hardware multiplies it natively."""
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        config = AutoConfig.from_pretrained(folder.path)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        dtype = choose_precision(precision, chosen)
        how = attention.register_attention(config.model_type, dtype=dtype, device=chosen)
        model: nn.Module = auto.from_pretrained(folder.path, dtype=dtype, use_safetensors=True, attn_implementation=how)
        tokenizer = AutoTokenizer.from_pretrained(folder.path)
        return cls(cast(PreTrainedModel, model.to(chosen)), tokenizer, max_input_tokens=max_input_tokens)

    def train(self, mode: bool = True) -> "FrozenLLM":  # noqa: ARG002 - the signature is nn.Module's
        """Frozen means eval mode: the LLM's own dropout stays off while the plug trains."""
        super().train(False)
        for layer in self._checkpointed:
            layer.training = True  # the layer's own switch alone, without what lies in it: its dropout stays off
        return self

    def checkpoint_activations(self) -> None:
        """From now on keep the input of each layer only, and compute the rest anew in the backward pass."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer transformers have another name for it
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers recomputes layers that are in training mode.
        self._checkpointed = [layer for layer in self.model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        self.train()

    @property
    def device(self) -> torch.device:
        """Where the soft tokens have to be."""
        device: torch.device = self.model.device
        return device

    @torch.no_grad()
    def token_norm(self, sample: int = 8192) -> float:
        """Mean L2 norm of the token embeddings, over evenly spaced rows of the vocabulary."""
        n_tokens = self._embeddings().num_embeddings
        ids = torch.linspace(0, n_tokens - 1, min(sample, n_tokens), device=self.device).long()
        return float(self.embed(ids).float().norm(dim=-1).mean())

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (…) to embeddings (…, D); called as a module, so that ZeRO-3 gathers the weights."""
        embedded: Tensor = self._embeddings()(ids)
        return embedded

    def tokenize_inputs(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each request's text, cut to `max_input_tokens`; a decoder-only LLM gets the separator behind it."""
        if not texts:
            return []  # which the tokenizer refuses
        rows = self.tokenizer(list(texts), truncation=True, max_length=self.max_input_tokens)["input_ids"]
        return [row + self.separator for row in rows]

    def tokenize_targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each target, end-of-sequence included, without any token in front."""
        if not texts:
            return []
        rows = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [[*row[: self.max_input_tokens - 1], self.tokenizer.eos_token_id] for row in rows]

    def tokenize_fronts(self, texts: Sequence[Sequence[str]], max_tokens: int) -> list[list[int]]:
        """Ids of each request's retrieved texts, one behind the other, in equal shares of `max_tokens`."""
        fronts: list[list[int]] = []
        for of_request in texts:
            front: list[int] = []
            share = max(max_tokens // max(len(of_request), 1) - len(self.separator), 0)
            for text in of_request:
                ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                front += [*ids[:share], *self.separator]
            fronts.append(front)
        return fronts

    def nll(
        self,
        soft_BSD: Tensor,
        inputs: Sequence[list[int]],
        targets: Sequence[list[int]],
        fronts: Sequence[list[int]] = (),
    ) -> Tensor:
        """Eq. 6 per request: the summed negative log-likelihood (B,) of the target's tokens, in nats, float32.

        `fronts` are the tokens of retrieved texts, which go in front of the soft tokens (eq. r). Logits are computed at
        target positions only.
        """
        labels_BT = self._labels(targets)
        if self.is_encoder_decoder:
            embeds_BLD, mask_BL = self._in_front(soft_BSD, inputs, fronts, left=False)
            start_id = self.model.config.decoder_start_token_id
            shifted_BT = labels_BT.masked_fill(labels_BT == _IGNORED, self.pad_id).roll(1, dims=1)
            shifted_BT[:, 0] = start_id
            logits_BTV = self.model(
                inputs_embeds=embeds_BLD, attention_mask=mask_BL, decoder_input_ids=shifted_BT, use_cache=False
            ).logits
        else:
            # Rows end together, so that the target positions of every row lie among the last T of the batch.
            rows = [[*text, *target] for text, target in zip(inputs, targets, strict=True)]
            # transformers takes no memory while it computes activations anew.
            read = self._read(fronts) if fronts and not self._checkpointed else None
            embeds_BLD, mask_BL = self._in_front(soft_BSD, rows, () if read else fronts, left=True)
            memory = None
            if read:
                memory, mask_BF = read
                mask_BL = torch.cat([mask_BF, mask_BL], dim=1)
            longest = labels_BT.shape[1]
            labels_BT = torch.stack([row.roll(longest - len(t)) for row, t in zip(labels_BT, targets, strict=True)])
            logits_BTV = self.model(
                inputs_embeds=embeds_BLD,
                attention_mask=mask_BL,
                position_ids=places(mask_BL)[:, -embeds_BLD.shape[1] :],
                past_key_values=memory,
                logits_to_keep=longest + 1,
                use_cache=memory is not None,
            ).logits[:, :-1]
        # Only real target positions become float32 rows of the vocabulary: those are the largest tensors of a step.
        is_target_BT = labels_BT != _IGNORED
        losses_N = nn.functional.cross_entropy(
            logits_BTV[is_target_BT].float(), labels_BT[is_target_BT], reduction="none"
        )
        rows_N = is_target_BT.nonzero()[:, 0]
        return losses_N.new_zeros(len(targets)).index_add(0, rows_N, losses_N)

    @torch.inference_mode()
    def generate(
        self,
        soft_BSD: Tensor,
        inputs: Sequence[list[int]],
        decoding: Decoding,
        seeds: Sequence[int],
        fronts: Sequence[list[int]] = (),
    ) -> list[Answer]:
        """Answers to a batch; `seeds` (one a request) make a sampled answer the same in any batch."""
        embeds_BLD, mask_BL = self._in_front(soft_BSD, inputs, fronts, left=not self.is_encoder_decoder)
        steps = (Seq2SeqSteps if self.is_encoder_decoder else CausalSteps)(self.model, embeds_BLD, mask_BL)
        limits: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens, "eos_ids": self.eos_ids}
        if decoding.beams > 1:
            said = search(steps, beams=decoding.beams, **limits)
        else:
            sampling = SeededSampling(decoding, seeds, self.device) if decoding.sample else None
            said = follow(steps, sampling=sampling, **limits)
        return [self._answer(tokens) for tokens in said]

    def _answer(self, said: list[int]) -> Answer:
        end = next((i for i, token in enumerate(said) if token in self.eos_ids), None)
        tokens = said[:end]
        text = cast(str, self.tokenizer.decode(tokens, skip_special_tokens=True))
        return Answer(text=text.strip(), n_tokens=len(tokens), finish_reason="length" if end is None else "stop")

    def _embeddings(self) -> nn.Embedding:
        return cast(nn.Embedding, self.model.get_input_embeddings())

    def _labels(self, targets: Sequence[list[int]]) -> Tensor:
        ids_BT, mask_BT = pad(targets, self.pad_id, self.device)
        return ids_BT.masked_fill(~mask_BT, _IGNORED)

    @torch.no_grad()
    def _read(self, fronts: Sequence[list[int]]) -> tuple[Cache, Tensor]:
        """What a decoder-only LLM remembers of the fronts, and their mask (B, F).

        Nothing that is trained comes before them, so no gradient has to pass through them. Fronts that are all empty
        are read, too: under ZeRO-3 all workers must call the LLM equally often, whatever their rows have.
        """
        nothing_B0D = torch.empty(len(fronts), 0, self.width, device=self.device)
        embeds_BFD, mask_BF = self._in_front(nothing_B0D, fronts, (), left=True)
        # The body alone: nobody asks which token comes next.
        output = self.model.base_model(
            inputs_embeds=embeds_BFD, attention_mask=mask_BF, position_ids=places(mask_BF), use_cache=True
        )
        return output.past_key_values, mask_BF

    def _in_front(
        self, soft_BSD: Tensor, rows: Sequence[list[int]], fronts: Sequence[list[int]], *, left: bool
    ) -> tuple[Tensor, Tensor]:
        """[front; soft; text] as embeddings (B, L, D) and mask, padded on the left or on the right."""
        n_soft = soft_BSD.shape[1]
        fronts = fronts or [[]] * len(rows)
        room = [self.pad_id] * n_soft
        whole = [[*front, *room, *row] for front, row in zip(fronts, rows, strict=True)]
        ids_BL, mask_BL = pad(whole, self.pad_id, self.device)
        start_B1 = torch.tensor([len(front) for front in fronts], dtype=torch.long, device=self.device).view(-1, 1)
        index_BS = start_B1 + torch.arange(n_soft, device=self.device)
        embeds_BLD = self.embed(ids_BL)
        index_BSD = index_BS.unsqueeze(-1).expand(-1, -1, embeds_BLD.shape[-1])
        embeds_BLD = embeds_BLD.scatter(1, index_BSD, soft_BSD.to(embeds_BLD.dtype))
        if left:
            # Rotating each row by its padding turns right padding into left padding.
            padding_B1 = (~mask_BL).sum(1, keepdim=True)
            source_BL = (torch.arange(mask_BL.shape[1], device=self.device) - padding_B1) % mask_BL.shape[1]
            embeds_BLD = embeds_BLD.gather(1, source_BL.unsqueeze(-1).expand_as(embeds_BLD))
            mask_BL = mask_BL.gather(1, source_BL)
        return embeds_BLD, mask_BL


def _declared_eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that end an answer: chat models name more than the tokenizer's own."""
    declared = model.generation_config.eos_token_id if model.generation_config else None
    ids = declared if isinstance(declared, list) else [declared]
    return sorted({token for token in [*ids, tokenizer.eos_token_id] if token is not None})
