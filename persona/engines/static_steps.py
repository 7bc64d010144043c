"""Decoding steps of few shapes, so that a GPU repeats each as one CUDA graph instead of starting a thousand kernels.

A step of 64 rows reads the LLM's weights in a few milliseconds; starting its kernels one by one takes several times as
long. The prompt is read as always, into a cache of fixed place and size. Then a step is the same kernels on the same
tensors, and only their contents change. On a CPU the same code runs without graphs, for tests.

Shapes: B requests, N rows of a step, R running rows (the first of N), L prompt tokens, P places of the cache, D LLM
width, V vocabulary.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import EncoderDecoderCache
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.modeling_outputs import BaseModelOutput

from persona.engines.decoding import DecodingSteps
from persona.engines.kv_cache import CausalSteps, Seq2SeqSteps, start_steps
from persona.engines.static_cache import StaticCache
from persona.models.attention import BMM
from persona.models.frozen_llm import FrozenLLM
from persona.models.prompts import PromptIds

KINDS = ("gemma", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3", "t5")
# Kernels that add a mask of numbers to the scores.
_KERNELS = ("sdpa", BMM)
# Their rotations depend on the longest row of the batch, which may have ended.
_VARYING_ROPE = ("dynamic", "longrope")
# Fewer shapes mean fewer graphs to capture, which takes up to a second each, and more places that are read in vain.
_PLACES, _FEWEST_ROWS, _MOST_GRAPHS = 64, 8, 16
_WARM_UPS = 2


def can_be_static(llm: FrozenLLM) -> bool:
    """Whether `StaticLLM` knows this kind of LLM; `persona.engines.static_probe` says whether it is right."""
    config: Any = llm.model.config
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in KINDS
        and config._attn_implementation in _KERNELS  # noqa: SLF001 - transformers has no other name for it
        and rope.get("rope_type") not in _VARYING_ROPE
        and llm.can_mask_padding
        and len({weight.device for weight in llm.model.parameters()}) == 1
    )


class _Shape(NamedTuple):
    """Rows, places for tokens of the decoder, and places for what an encoder made of the prompt."""

    rows: int
    places: int
    encoded: int


class StaticLLM:
    """The caches and steps of an LLM of which `can_be_static` is true; they are kept from batch to batch."""

    def __init__(self, llm: FrozenLLM) -> None:
        self.llm = llm
        self.is_out_of_memory = False
        self.room = _Shape(0, 0, 0)
        self.caches: list[StaticCache] = []
        """The decoder's, and with an encoder the one of the prompt's keys and values."""
        self._steps: OrderedDict[_Shape, _Step] = OrderedDict()
        self._graphs = _Graphs(llm.device) if llm.device.type == "cuda" else None

    def start_steps(
        self, soft_BSD: Tensor, prompts: Sequence[PromptIds], *, n_new: int, beams: int = 1
    ) -> DecodingSteps:
        """The LLM in front of these prompts, for answers of at most `n_new` tokens.

        With a growing cache (`persona.engines.kv_cache`) if there is no step to repeat, if the LLM would forget tokens
        in front of its window, or if memory is short.
        """
        steps = start_steps(self.llm, soft_BSD, prompts)
        n, length = steps.mask_RL.shape
        encoded, places = (length, n_new) if self.llm.is_encoder_decoder else (0, length + n_new - 1)
        if n_new == 1 or places > self._window() or self.is_out_of_memory:
            return steps
        shape = _Shape(n * beams, _rounded(places), _rounded(encoded))
        try:
            self._make_room(shape)
        except torch.OutOfMemoryError:
            self.is_out_of_memory, self.caches = True, []
            logging.getLogger(__name__).warning(
                "too little memory for a static key-value cache of %s rows and %s tokens: answers take longer; a "
                "smaller --batch-size may be faster",
                *shape[:2],
            )
            return steps
        return StaticSteps(self, steps, shape)

    def step(self, n_rows: int, shape: _Shape) -> "_Step":
        """The step of at least `n_rows` rows."""
        rows = min(max(_FEWEST_ROWS, 2 ** (n_rows - 1).bit_length()), self.room.rows)
        shape = shape._replace(rows=rows)
        if shape not in self._steps:
            self._steps[shape] = _Step(self.llm, self.caches, shape, self._graphs)
        self._steps.move_to_end(shape)
        if len(self._steps) > _MOST_GRAPHS:
            self._steps.popitem(last=False)
        return self._steps[shape]

    def _window(self) -> float:
        """The tokens that every layer sees."""
        if self.llm.is_encoder_decoder:
            return float("inf")
        _, layers = get_layer_types_and_kwargs(self.llm.model.config)
        return min(float(layer.get("sliding_window", "inf")) for layer in layers)

    def _make_room(self, shape: _Shape) -> None:
        if all(needed <= there for needed, there in zip(shape, self.room, strict=True)):
            return
        room = _Shape(*map(max, shape, self.room))
        # Graphs hold the addresses of the cache, and two caches may not fit the memory.
        self._steps.clear()
        self._graphs = _Graphs(self.llm.device) if self._graphs else None
        self.caches, self.room = [], _Shape(0, 0, 0)
        n_layers, heads, width = cache_sizes(self.llm.model.config)
        for places in room[1 : 2 + self.llm.is_encoder_decoder]:
            sizes = (room.rows, heads, places, width)
            self.caches.append(StaticCache(n_layers, sizes, dtype=self.llm.dtype, device=self.llm.device))
        self.room = room


def _rounded(n_places: int) -> int:
    return -(-n_places // _PLACES) * _PLACES


def cache_sizes(config: Any) -> tuple[int, int, int]:
    """Layers of the decoder, key heads, and width of a head."""
    if config.is_encoder_decoder:
        return config.num_decoder_layers, config.num_heads, config.d_kv
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads, width


class StaticSteps:
    """Like the steps of `persona.engines.kv_cache`, in the caches and steps of a `StaticLLM`."""

    is_static = True

    def __init__(self, static: StaticLLM, prompts: CausalSteps | Seq2SeqSteps, shape: _Shape) -> None:
        self.static, self.shape, self.prompts = static, shape, prompts
        self.mask_RL = prompts.mask_RL.bool()
        n, length = self.mask_RL.shape
        # The decoder's places: those before `first` are the prompt's, the next one to fill is `used`.
        self.first, self.used = (0, 1) if len(static.caches) > 1 else (length, length)
        layers = [cache.layers(n, places) for cache, places in zip(static.caches, shape[1:], strict=False)]
        prompts.kv_cache = cast(Any, EncoderDecoderCache(*layers) if len(layers) > 1 else layers[0])
        self._step: _Step | None = None

    def start(self) -> Tensor:
        """Scores (B, V) of the first token of each answer."""
        return self.prompts.start()

    def step(self, tokens_R: Tensor) -> Tensor:
        """Appends a token to each row; returns the scores (R, V) of the next one, which the next step overwrites."""
        if self._step is None:
            self._step = self.static.step(len(tokens_R), self.shape)
            self._step.load(self.mask_RL, self.first, self.used)
        scores_NV = self._step(tokens_R, self.used)
        self.used += 1
        return scores_NV[: len(tokens_R)]

    def reorder_cache(self, rows_R: Tensor, *, within_requests: bool = False) -> None:
        """Continues with these rows, in this order; see `DecodingSteps`."""
        own, *of_prompt = self.static.caches
        if within_requests:
            own.move_rows(rows_R, self.first, self.used)
            return
        own.move_rows(rows_R, 0, self.used)
        for cache in of_prompt:
            cache.move_rows(rows_R, 0, self.mask_RL.shape[1])
        self.mask_RL = self.mask_RL[rows_R]
        self._step = None


class _Step:
    """A step of N rows on tensors that stay where they are; on a GPU, a graph."""

    def __init__(self, llm: FrozenLLM, caches: Sequence[StaticCache], shape: _Shape, graphs: "_Graphs | None") -> None:
        self.model, self.graphs, device, dtype = llm.model, graphs, llm.device, llm.dtype
        self.ids_N1, self.position_N1 = (torch.zeros(shape.rows, 1, dtype=torch.long, device=device) for _ in range(2))
        self.place_1 = torch.zeros(1, dtype=torch.long, device=device)
        # Numbers to add to scores: from booleans, torch would make them in every layer.
        masks = [torch.zeros(shape.rows, 1, 1, n, dtype=dtype, device=device) for n in shape[1:] if n]
        self.mask_N11P, self.prompt_mask_N11P = masks[0], masks[-1]
        layers = caches[0].layers(shape.rows, shape.places, self.place_1)
        self.inputs: dict[str, Any] = {"use_cache": True}
        if llm.is_encoder_decoder:
            kv_cache = EncoderDecoderCache(layers, caches[1].layers(shape.rows, shape.encoded))
            kv_cache.is_updated = dict.fromkeys(kv_cache.is_updated, True)
            # The cache holds all that is read of the encoder's output; its shape alone counts here.
            encoded_N1D = torch.zeros(shape.rows, 1, llm.width, dtype=dtype, device=device)
            self.inputs |= {"encoder_outputs": BaseModelOutput(last_hidden_state=encoded_N1D)}
            self.inputs |= {"decoder_input_ids": self.ids_N1, "decoder_attention_mask": self.mask_N11P}
            self.inputs |= {"past_key_values": kv_cache, "attention_mask": self.prompt_mask_N11P}
        else:
            self.inputs |= {"input_ids": self.ids_N1, "attention_mask": self.mask_N11P}
            self.inputs |= {"past_key_values": layers, "position_ids": self.position_N1}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._scores_NV = torch.empty(0)

    def load(self, prompts_RL: Tensor, first: int, used: int) -> None:
        """Goes on with rows whose caches are filled to before `used`, from `first` on with generated tokens.

        `prompts_RL` is false where a prompt is padding.
        """
        n, length = prompts_RL.shape
        for mask_N11P in (self.mask_N11P, self.prompt_mask_N11P):
            mask_N11P.fill_(torch.finfo(mask_N11P.dtype).min)
            mask_N11P[n:] = 0  # rows without a request see everything: with nothing to see they would become NaN
        self.prompt_mask_N11P[:n, 0, 0, :length].masked_fill_(prompts_RL, 0)
        self.mask_N11P[..., first:used] = 0
        self.position_N1[:n, 0] = prompts_RL.sum(1) + (used - first)

    def __call__(self, tokens_R: Tensor, place: int) -> Tensor:
        """Scores (N, V) of the tokens after these, which take the place `place`."""
        self.ids_N1[: len(tokens_R), 0] = tokens_R
        self.mask_N11P[..., place] = 0
        self.place_1.fill_(place)
        scores_NV = self._forward() if self.graphs is None else self._replay(self.graphs)
        self.position_N1 += 1
        return scores_NV

    def _forward(self) -> Tensor:
        """Changes nothing that it reads, so that it may run again."""
        scores_NV: Tensor = self.model(**self.inputs).logits[:, -1]
        return scores_NV

    def _replay(self, graphs: "_Graphs") -> Tensor:
        if self._graph is None:
            self._graph, self._scores_NV = graphs.capture(self._forward)
        self._graph.replay()
        return self._scores_NV


class _Graphs:
    """Captures graphs that share the memory of what they compute: each result is used before the next graph runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, forward: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph of what `forward` does, and the tensor in which it leaves its result."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            # Also restores the stream when capturing fails.
            with torch.cuda.stream(self.stream):
                for _ in range(_WARM_UPS):  # libraries set themselves up in ways that cannot be captured
                    forward()
                # Other threads of an actor may allocate memory meanwhile.
                with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                    result = forward()
            torch.cuda.current_stream().wait_stream(self.stream)
        return graph, result
