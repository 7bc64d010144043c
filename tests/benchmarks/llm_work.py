"""Training steps and answers with SmolLM2-135M: ours, the paper's reference implementation, and the limit.

The reference implementation (see docs/method.md) pads every row to 266 tokens and every history to 512 behaviors,
projects each behavior, padding included, computes logits at every position, and generates answers one row at a time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from persona.engines.local import LocalEngine
from persona.models import packaged
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import resolve
from persona.options import Decoding, Precision, PromptOptions, RetrievalOptions, TrainingOptions
from persona.plug.answerer import Answerer
from persona.plug.personalized import PersonalizedLLM, prepare_for_inference, prompt_texts
from persona.store import vectors
from persona.training.deepspeed import new_optimizer, trainable
from tests import plugs
from tests.benchmarks import corpus
from tests.benchmarks.contest import timed

_ROWS, _COMPARED = 32, 2
_BATCH_SIZE = 32
_ROW_TOKENS = 266
_PREFIX_TEXTS, _PREFIX_TOKENS = 4, RetrievalOptions().retrieve_tokens
_BEHAVIORS = 512
_WIDTH = 384
Row = Mapping[str, Any]


def rows(n: int) -> list[Row]:
    """The first `n` of 32 requests: 10 to 60 words, short targets, 5 to 200 behaviors, most histories short."""
    draw = np.random.default_rng(0)
    inputs, targets = corpus.texts("abstracts", _ROWS), corpus.texts("titles", _ROWS)
    made = []
    for number, (text, target) in enumerate(zip(inputs, targets, strict=True)):
        n_behaviors = round(5 * 40 ** draw.random())
        history = plugs.random_history(draw, n_behaviors, _WIDTH)
        words = " ".join(text.split()[: draw.integers(10, 60)])
        made.append(
            {
                "request_id": f"r{number}",
                "persona": "own",
                "input": words,
                "query": words,
                "target": " ".join(target.split()[:12]),
                "history": history,
            }
        )
    return made[:n]


def new_model(precision: Precision = "auto") -> PersonalizedLLM:
    """SmolLM2 with a plug like the paper's, the same in each call."""
    encoder = resolve(str(packaged.minilm()), flag="--encoder")
    # The reference implementation knows no chat template.
    plain = PromptOptions(prompt_format="plain")
    llm = FrozenLLM.load(resolve(str(packaged.smollm2()), flag="--llm"), precision=precision, prompt=plain)
    options: dict[str, Any] = {"persona_tokens": 1, "temperature": 20.0}
    return plugs.new_model(encoder, llm, pooling="mean", max_query_tokens=_ROW_TOKENS, **options)


class Step:
    """One optimizer step on some rows."""

    def __init__(self, n: int) -> None:
        self.rows = rows(n)
        self.model = new_model()
        self.optimizer = self.new_optimizer()

    def new_optimizer(self) -> torch.optim.AdamW:
        """The optimizer of `jobs.train`."""
        return new_optimizer(self.model, TrainingOptions())

    @torch.no_grad()
    def result(self) -> float:
        """The loss of the first rows before any step."""
        rows, self.rows = self.rows, self.rows[:8]
        loss = float(self.loss())
        self.rows = rows
        return loss

    def turn(self) -> tuple[float, float]:
        """Train on all rows once."""
        return len(self.rows), timed(self.step)

    def step(self) -> float:
        """Forward, backward, optimizer."""
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def loss(self) -> Tensor:
        """Nats per token."""
        batch = self.model.collate(self.rows)
        nll_B: Tensor = self.model(batch)
        return nll_B.sum() / batch.n_target_tokens


class ReferenceStep(Step):
    """The step of the reference implementation, with the default attention of transformers."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.model.llm.model.set_attn_implementation("sdpa")

    def new_optimizer(self) -> torch.optim.AdamW:
        """AdamW with the defaults of torch."""
        return torch.optim.AdamW(trainable(self.model).values(), lr=1e-4)

    def loss(self) -> Tensor:
        """Nats per token, the mean over target tokens as in the loss of transformers."""
        llm = self.model.llm
        inputs = input_ids(llm, self.rows)
        targets = llm.tokenizer.targets([row["target"] for row in self.rows])
        ids_BT = torch.full((len(inputs), _ROW_TOKENS), llm.tokenizer.pad_id)
        labels_BT = torch.full_like(ids_BT, -100)
        mask_BT = torch.zeros_like(ids_BT)
        for i, (text, target) in enumerate(zip(inputs, targets, strict=True)):
            length = len(text) + len(target)
            ids_BT[i, :length] = torch.tensor([*text, *target])
            labels_BT[i, len(text) : length] = torch.tensor(target)
            mask_BT[i, :length] = 1
        soft_BSD = reference_soft_tokens(self.model, self.rows)
        n_soft = soft_BSD.shape[1]
        embeds_BLD = torch.cat([soft_BSD.to(llm.model.dtype), llm.embed(ids_BT)], dim=1)
        logits_BLV = llm.model(
            inputs_embeds=embeds_BLD,
            attention_mask=torch.cat([mask_BT.new_ones(len(inputs), n_soft), mask_BT], dim=1),
            use_cache=False,
        ).logits
        shifted_BTV = logits_BLV[:, n_soft - 1 : -1].float()
        return nn.functional.cross_entropy(shifted_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=-100)


class StepWithTexts(Step):
    """The step with four past texts before each request (equation r in docs/method.md), cut at the default length."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        past = iter(corpus.texts("abstracts", _ROWS + _PREFIX_TEXTS * n)[_ROWS:])
        self.rows = [{**row, "retrieved": [next(past) for _ in range(_PREFIX_TEXTS)]} for row in self.rows]
        self.model.retrieved_tokens = _PREFIX_TOKENS


class StepReadAtOnce(StepWithTexts):
    """The past texts are part of the row that gradients pass through, as in a plain implementation."""

    def loss(self) -> Tensor:
        """Nats per token."""
        batch = self.model.collate(self.rows)
        nll_B = self.model.llm.nll(self.model.soft_tokens(batch), batch.prompts, batch.targets)
        return nll_B.sum() / batch.n_target_tokens


class FrozenStep(Step):
    """The limit: the LLM's forward pass, and the backward pass to the soft tokens, without a plug."""

    def loss(self) -> Tensor:
        """Nats per token with random soft tokens."""
        llm = self.model.llm
        prompts = llm.tokenizer.prompts(prompt_texts(self.rows))
        targets = llm.tokenizer.targets([row["target"] for row in self.rows])
        soft_BSD = torch.randn(len(prompts), self.model.plug.options.n_soft, llm.width, requires_grad=True)
        return llm.nll(soft_BSD, prompts, targets).sum() / sum(map(len, targets))


def input_ids(llm: FrozenLLM, rows: Sequence[Row]) -> list[list[int]]:
    """The token ids of each request's text. SmolLM2 has no special tokens that would come before the soft tokens."""
    prompts = llm.tokenizer.prompts(prompt_texts(rows))
    assert not any(prompt.before for prompt in prompts)
    return [list(prompt.after) for prompt in prompts]


def reference_soft_tokens(model: PersonalizedLLM, rows: Sequence[Row]) -> Tensor:
    """[I; P] of PPlug eq. 5, shape (B, S, D), from histories padded to 512 behaviors that are all projected."""
    plug, text = model.plug, model.query_text
    assert text is not None
    history_BNd = torch.zeros(len(rows), _BEHAVIORS, _WIDTH)
    mask_BN = torch.zeros(len(rows), _BEHAVIORS, dtype=torch.bool)
    for i, row in enumerate(rows):
        behaviors_Nd = vectors.from_bytes(row["history"], _WIDTH).astype(np.float32)
        history_BNd[i, : len(behaviors_Nd)] = torch.from_numpy(behaviors_Nd)
        mask_BN[i, : len(behaviors_Nd)] = True
    tokens = text.tokenizer(
        [row["query"] for row in rows],
        truncation=True,
        padding="max_length",
        max_length=_ROW_TOKENS,
        return_tensors="pt",
    )
    assert plug.query_encoder is not None and plug.query_head is not None
    hidden_BTd = plug.query_encoder(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    query_Bd = plug.query_head(hidden_BTd, tokens["attention_mask"])
    scores_BN = (history_BNd @ query_Bd.unsqueeze(-1)).squeeze(-1) * plug.temperature()
    weights_BN = scores_BN.masked_fill(~mask_BN, -torch.inf).softmax(dim=-1)
    persona_BD = (plug.projector(history_BNd) * weights_BN.unsqueeze(-1)).sum(dim=1)
    instruction_B1D = plug.instruction.expand(len(rows), 1, -1)
    return plug.scale * torch.cat([instruction_B1D, persona_BD.unsqueeze(1)], dim=1)


class Answers:
    """Answers to some requests, in batches, as in `jobs.generate`."""

    def __init__(self, n: int, beams: int, precision: Precision = "auto") -> None:
        self.rows = rows(n)
        self.beams = beams
        self.decoding = Decoding(beams=beams, max_new_tokens=24)
        self.model = self.load(precision)
        self.engine = LocalEngine(self.model.llm, batch_size=_BATCH_SIZE)

    def load(self, precision: Precision) -> PersonalizedLLM:
        """The model, prepared for inference."""
        model = new_model(precision)
        prepare_for_inference(model.plug, dtype=model.llm.dtype, device=model.llm.device)
        return model

    def result(self) -> list[str]:
        """The answers to the first requests in float32. In bf16, padding alone can change a word."""
        return type(self)(_COMPARED, self.beams, "fp32").answer()

    def turn(self) -> tuple[float, float]:
        """Answer all requests."""
        return len(self.rows), timed(self.answer)

    @torch.inference_mode()
    def answer(self) -> list[str]:
        """The answers, in the order of the requests."""
        import pyarrow as pa

        from persona.plug.request_tables import answer_all

        answerer = Answerer(self.model.plug, self.engine, self.model.query_text, batch_size=_BATCH_SIZE)
        answers = answer_all(answerer, pa.Table.from_pylist(self.rows), self.decoding)
        return [str(text) for text in answers["output"].to_pylist()]


class PlainAttention(Answers):
    """With the default attention of transformers, and the query encoder as trained."""

    def load(self, precision: Precision) -> PersonalizedLLM:
        """The model as loaded."""
        model = new_model(precision)
        model.llm.model.set_attn_implementation("sdpa")
        return model


class ReferenceAnswers(PlainAttention):
    """The reference implementation: one row at a time with `transformers.generate`, padded on the left."""

    @torch.inference_mode()
    def answer(self) -> list[str]:
        """The answers, in the order of the requests."""
        llm = self.model.llm
        generated = []
        for row in self.rows:
            [ids] = input_ids(llm, [row])
            n_padded = _ROW_TOKENS - len(ids)
            soft_BSD = reference_soft_tokens(self.model, [row]).to(llm.model.dtype)
            padding_BLD = llm.embed(torch.full((1, n_padded), llm.tokenizer.pad_id))
            embeds_BLD = torch.cat([padding_BLD, soft_BSD, llm.embed(torch.tensor([ids]))], dim=1)
            mask_BL = torch.ones(embeds_BLD.shape[:2], dtype=torch.long)
            mask_BL[:, :n_padded] = 0
            [output] = generate_plainly(self.engine, self.decoding, inputs_embeds=embeds_BLD, attention_mask=mask_BL)
            generated.append(llm.tokenizer.decode(output))
        return generated


class PlainAnswers(PlainAttention):
    """The limit: `transformers.generate` on the same requests in one batch, without a plug."""

    def result(self) -> list[str]:
        """Nothing to compare: without a plug the answers differ."""
        return []

    @torch.inference_mode()
    def answer(self) -> list[str]:
        """The answers, in the order of the requests."""
        llm = self.model.llm
        ids = input_ids(llm, self.rows)
        length = max(map(len, ids))
        ids_BL = torch.tensor([[llm.tokenizer.pad_id] * (length - len(row)) + row for row in ids])
        mask_BL = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids])
        output = generate_plainly(self.engine, self.decoding, input_ids=ids_BL, attention_mask=mask_BL)[:, length:]
        return [str(text) for text in llm.tokenizer.pretrained.batch_decode(output, skip_special_tokens=True)]


def generate_plainly(engine: LocalEngine, decoding: Decoding, **inputs: Tensor) -> Tensor:
    """The output of `transformers.generate` with the same settings."""
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.beams,
        do_sample=False,
        eos_token_id=engine.eos_ids,
        pad_token_id=engine.tokenizer.pad_id,
    )
    output: Tensor = engine.llm.model.generate(**inputs, generation_config=config)
    return output
