"""The frozen LLM: soft tokens and text in, embeddings or a loss out.

It is either encoder-decoder (T5-like) or decoder-only (Llama-like); `persona.models.prompts` says what each reads.
Texts are token ids and soft tokens are vectors. They meet only as embeddings, so no text can become a soft token.

Shapes: B requests, S soft tokens, F tokens in front of them, L tokens of a row, T target tokens of a row, N target
tokens of a batch, D LLM width, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from persona.errors import InputError, UsageError
from persona.models import attention, loading
from persona.models.batching import pad, position_ids
from persona.models.device import choose_device, choose_precision, to_device
from persona.models.llm_kinds import decoder_start, embedding_scale, holds_keys_only
from persona.models.prompts import AUTO_PROMPT, MAX_INPUT_TOKENS, MAX_TARGET_TOKENS, PromptIds, PromptTokenizer
from persona.models.quantized import quantize
from persona.models.recomputation import ReadOnlyCache, recompute_layers
from persona.models.resolve import ModelFolder
from persona.options import SPREAD, Precision, PromptOptions, Quantization

# Padding is masked or comes after all that is read, so any id of the vocabulary will do.
_PADDING = 0


class FrozenLLM(nn.Module):
    """A pretrained LLM whose weights never change; gradients pass through it to the soft tokens.

    Attributes:
        can_mask_padding: whether a mask hides padding in front of a text.
        reads_ahead: whether the text before the soft tokens may be read first, in a pass that fills a cache.
        recomputes: whether activations are computed again in the backward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_input_tokens: int = MAX_INPUT_TOKENS,
        max_target_tokens: int = MAX_TARGET_TOKENS,
        prompt: PromptOptions = AUTO_PROMPT,
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self._checkpointed: list[nn.Module] = []
        self.recomputes = False
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.tokenizer = PromptTokenizer(
            tokenizer,
            is_encoder_decoder=self.is_encoder_decoder,
            max_input_tokens=max_input_tokens,
            max_target_tokens=max_target_tokens,
            prompt=prompt,
        )
        self.width: int = self._embeddings().embedding_dim
        self.start_id = decoder_start(model)
        self.can_mask_padding = self.is_encoder_decoder or holds_keys_only(model)
        self.reads_ahead = self.can_mask_padding
        self._embedding_scale = embedding_scale(model.config)
        self._arguments = inspect.signature(model.forward).parameters

    @classmethod
    def load(
        cls,
        folder: ModelFolder,
        *,
        max_input_tokens: int = MAX_INPUT_TOKENS,
        max_target_tokens: int = MAX_TARGET_TOKENS,
        prompt: PromptOptions = AUTO_PROMPT,
        precision: Precision = "auto",
        quantization: Quantization = "none",
        device: str | None = None,
    ) -> "FrozenLLM":
        """Loads the LLM of a folder; see `choose_precision` and `choose_device` for the defaults.

        `device` may be `auto`: the layers are spread over all visible GPUs.

        Raises:
            InputError: it cannot be loaded whole, most of it cannot be quantized, or it does not fit the GPUs.
            UsageError: an LLM in fewer bits is to be spread.
        """
        spread = device == SPREAD
        if spread and quantization != "none":
            raise UsageError(f"an LLM in {quantization} cannot be spread over GPUs; take --gpus-per-actor 1")
        chosen = choose_device(None if spread else device)
        config = loading.load_config(folder)
        dtype = choose_precision(precision, chosen)
        kernel = attention.register_attention(config.model_type, dtype=dtype, device=chosen)
        model: PreTrainedModel = loading.load_model(
            loading.llm_class(config),
            folder,
            dtype=dtype,
            attn_implementation=kernel,
            device_map=SPREAD if spread else None,
        )
        if quantization != "none":
            quantize(model, quantization, chosen)
        if not spread:
            cast(Any, model).to(chosen)
        elif {parameter.device.type for parameter in model.parameters()} != {"cuda"}:
            count = torch.cuda.device_count()
            raise InputError(f"--llm: {folder.name!r} does not fit {count} GPUs in {dtype}; raise --gpus-per-actor")
        tokenizer = loading.load_tokenizer(folder)
        return cls(
            model,
            tokenizer,
            max_input_tokens=max_input_tokens,
            max_target_tokens=max_target_tokens,
            prompt=prompt,
        )

    def train(self, mode: bool = True) -> "FrozenLLM":
        """Stays in eval mode, so that the LLM's own dropout is off; only recomputation of activations depends on it."""
        super().train(False)
        self._recompute(mode)
        return self

    def _recompute(self, mode: bool) -> None:
        for layer in self._checkpointed:
            layer.training = mode  # of the layer alone, not of its submodules: their dropout stays off
        self.recomputes = mode and bool(self._checkpointed)

    def checkpoint_activations(self) -> None:
        """From now on, keeps only the input of each layer and recomputes the rest in the backward pass.

        Raises UsageError for kinds of LLMs for which transformers cannot.
        """
        self._checkpointed = recompute_layers(self.model)
        self.train()

    @property
    def device(self) -> torch.device:
        """The device of the LLM's embeddings, where soft tokens must be."""
        return self._embeddings().weight.device

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
        """Token ids (…) to embeddings (…, D), as the LLM reads them."""
        # Called as a module, so that ZeRO-3 gathers the weights.
        embedded: Tensor = self._embeddings()(ids)
        return embedded if self._embedding_scale == 1 else embedded * self._embedding_scale

    def embed_prompts(
        self,
        soft_BSD: Tensor,
        prompts: Sequence[PromptIds],
        targets: Sequence[Sequence[int]] = (),
        *,
        pad_left: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """[before; soft tokens; after; target] of each request as embeddings (B, L, D), and their mask (B, L)."""
        n_soft = soft_BSD.shape[1]
        targets = targets or [()] * len(prompts)
        gap = [_PADDING] * n_soft
        rows = [[*p.before, *gap, *p.after, *target] for p, target in zip(prompts, targets, strict=True)]
        ids_BL, mask_BL = pad(rows, _PADDING, self.device, left=pad_left)
        width = ids_BL.shape[1]
        starts = [len(p.before) + (width - len(row) if pad_left else 0) for p, row in zip(prompts, rows, strict=True)]
        index_BS = self._here(starts).unsqueeze(1) + torch.arange(n_soft, device=self.device)
        embeds_BLD = self.embed(ids_BL)
        index_BSD = index_BS.unsqueeze(-1).expand(-1, -1, embeds_BLD.shape[-1])
        return embeds_BLD.scatter(1, index_BSD, soft_BSD.to(embeds_BLD.dtype)), mask_BL

    def nll(
        self,
        soft_BSD: Tensor,
        prompts: Sequence[PromptIds],
        targets: Sequence[Sequence[int]],
        *,
        cache_before: bool = False,
    ) -> Tensor:
        """PPlug eq. 6 per request: the summed negative log-likelihood (B,) of the target's tokens, in nats, float32.

        Args:
            soft_BSD: soft tokens; S may be 0.
            prompts: token ids of the requests, as `PromptTokenizer.prompts` makes them.
            targets: token ids of the targets, as `PromptTokenizer.targets` makes them.
            cache_before: read what is in front of the soft tokens in a pass of its own, without gradients, if the LLM
                allows it: faster if that is long. ZeRO-3 needs the same value on all workers.
        """
        return summed_nll(self.target_logits(soft_BSD, prompts, targets, cache_before=cache_before), targets)

    def target_logits(
        self,
        soft_BSD: Tensor,
        prompts: Sequence[PromptIds],
        targets: Sequence[Sequence[int]],
        *,
        cache_before: bool = False,
    ) -> Tensor:
        """Logits (N, V) that predict the target tokens, row after row; the arguments are those of `nll`."""
        if self.is_encoder_decoder:
            return self._seq2seq_logits(soft_BSD, prompts, targets)
        if cache_before and self.reads_ahead:
            return self._logits_after_cache(soft_BSD, prompts, targets)
        # Rows are padded on the right, where a causal LLM does not see the padding: no mask is needed, so GPUs can run
        # flash attention, and positions count from 0. Padding on the left would reach recurrent states, convolutions
        # and attention by chunks.
        embeds_BLD, _ = self.embed_prompts(soft_BSD, prompts, targets)
        positions_N = self._positions(embeds_BLD, soft_BSD, prompts, targets)
        logits_NV, _ = self.forward_at(positions_N, inputs_embeds=embeds_BLD, use_cache=False)
        return logits_NV

    def forward_at(self, positions_N: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
        """Logits (N, V) at these positions of the flattened batch (B·L,) only, and the cache if `use_cache`.

        Logits of all positions would be the largest tensor of a step.
        """

        def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden_BLD, *others = args
            return hidden_BLD.flatten(0, 1)[positions_N.to(hidden_BLD.device)].unsqueeze(0), *others

        hook = self.model.get_output_embeddings().register_forward_pre_hook(select)
        try:
            output = self.model(**inputs)
        finally:
            hook.remove()
        return output.logits[0], output.past_key_values if inputs["use_cache"] else None

    def _seq2seq_logits(
        self, soft_BSD: Tensor, prompts: Sequence[PromptIds], targets: Sequence[Sequence[int]]
    ) -> Tensor:
        assert self.start_id is not None
        embeds_BLD, mask_BL = self.embed_prompts(soft_BSD, prompts)
        shifted_BT, _ = pad([[self.start_id, *target[:-1]] for target in targets], _PADDING, self.device)
        length = shifted_BT.shape[1]
        positions = [row * length + i for row, target in enumerate(targets) for i in range(len(target))]
        logits_NV, _ = self.forward_at(
            self._here(positions),
            inputs_embeds=embeds_BLD,
            attention_mask=mask_BL.long(),
            decoder_input_ids=shifted_BT,
            use_cache=False,
        )
        return logits_NV

    def _logits_after_cache(
        self, soft_BSD: Tensor, prompts: Sequence[PromptIds], targets: Sequence[Sequence[int]]
    ) -> Tensor:
        """With a separate pass over `before`, which needs no gradients: nothing trained comes before it.

        It is padded on the left and the rest on the right, so that no padding is between them; one that all rows share
        is read once. A batch in which all are empty is read, too: under ZeRO-3 all workers must call the LLM equally
        often.
        """
        befores = [PromptIds(before=prompt.before, after=()) for prompt in prompts]
        if all(prompt.before == prompts[0].before for prompt in prompts):
            kv_cache, mask_BF = self._read(befores[:1])
            kv_cache.batch_repeat_interleave(len(prompts))
            mask_BF = mask_BF.expand(len(prompts), -1)
        else:
            kv_cache, mask_BF = self._read(befores)
        afters = [PromptIds(before=(), after=prompt.after) for prompt in prompts]
        return self.logits_behind(kv_cache, mask_BF, soft_BSD, afters, targets)

    def logits_behind(
        self,
        kv_cache: Cache,
        mask_BF: Tensor,
        soft_BSD: Tensor,
        prompts: Sequence[PromptIds],
        targets: Sequence[Sequence[int]],
    ) -> Tensor:
        """`target_logits` (N, V) behind what a cache holds, of a decoder-only LLM; the mask (B, F) hides padding."""
        embeds_BLD, mask_BL = self.embed_prompts(soft_BSD, prompts, targets)
        logits_NV, _ = self.forward_at(
            self._positions(embeds_BLD, soft_BSD, prompts, targets),
            inputs_embeds=embeds_BLD,
            **self.mask_arguments(torch.cat([mask_BF, mask_BL], dim=1), n_new=mask_BL.shape[1]),
            past_key_values=ReadOnlyCache(kv_cache) if self.recomputes else kv_cache,
            use_cache=not self.recomputes,
        )
        return logits_NV

    @torch.no_grad()
    def _read(self, texts: Sequence[PromptIds]) -> tuple[Cache, Tensor]:
        """The key-value cache of texts without soft tokens, padded on the left, and their mask (B, F)."""
        no_soft_B0D = torch.empty(len(texts), 0, self.width, device=self.device)
        embeds_BFD, mask_BF = self.embed_prompts(no_soft_B0D, texts, pad_left=True)
        recomputes = self.recomputes
        self._recompute(False)  # transformers fills no cache then
        # Without the head: nothing is predicted here.
        output = self.model.base_model(inputs_embeds=embeds_BFD, **self.mask_arguments(mask_BF), use_cache=True)
        self._recompute(recomputes)
        return output.past_key_values, mask_BF

    def mask_arguments(self, mask_BL: Tensor, n_new: int | None = None) -> dict[str, Tensor]:
        """Arguments by which the LLM neither sees nor counts padding; the last `n_new` tokens are not cached yet."""
        arguments = {"attention_mask": mask_BL.long()}  # some models calculate with it
        if "position_ids" in self._arguments:
            arguments["position_ids"] = position_ids(mask_BL)[:, -(n_new or mask_BL.shape[1]) :]
        return arguments

    def _positions(
        self, embeds_BLD: Tensor, soft_BSD: Tensor, prompts: Sequence[PromptIds], targets: Sequence[Sequence[int]]
    ) -> Tensor:
        """Where a decoder-only LLM predicts the target tokens (N,), in the flattened batch (B·L,).

        The first one is predicted at the last token of the prompt.
        """
        length, n_soft = embeds_BLD.shape[1], soft_BSD.shape[1]
        firsts = [row * length + n_soft + len(prompt) - 1 for row, prompt in enumerate(prompts)]
        positions = [first + i for first, target in zip(firsts, targets, strict=True) for i in range(len(target))]
        return self._here(positions)

    def _here(self, numbers: Sequence[int]) -> Tensor:
        """Whole numbers on the LLM's device, which nothing waits for."""
        return to_device(torch.tensor(numbers, dtype=torch.long), self.device)

    def _embeddings(self) -> nn.Embedding:
        return cast(nn.Embedding, self.model.get_input_embeddings())


def summed_nll(logits_NV: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
    """The negative log-likelihood (B,) of each target, in nats, float32, from the logits that predict all tokens."""
    labels = torch.tensor(list(chain.from_iterable(targets)), dtype=torch.long)
    losses_N = nn.functional.cross_entropy(logits_NV.float(), to_device(labels, logits_NV.device), reduction="none")
    rows = torch.tensor([row for row, target in enumerate(targets) for _ in target], dtype=torch.long)
    rows_N = to_device(rows, logits_NV.device)
    return losses_N.new_zeros(len(targets)).index_add(0, rows_N, losses_N)
