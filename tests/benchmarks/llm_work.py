"""Training steps and answers in front of SmolLM2-135M: ours, the reference's way, and the limit.

The reference's way, as PAPER section 4 tells it: every row is padded to 266 tokens and every history to 512 behaviors,
Proj sees each behavior, padding included, logits are made at every position, and answers are made one row at a time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from persona.engines.local import LocalEngine
from persona.models import packaged
from persona.models.encoder import pool
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import resolve
from persona.options import Decoding, Precision, RetrievalOptions, TrainingOptions
from persona.plug.answerer import Answerer
from persona.plug.personalized import PersonalizedLLM, prepare_for_inference
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
    """The first of 32 requests of 10 to 60 words, targets like titles; histories of 5 to 200 behaviors, few long."""
    draw = np.random.default_rng(0)
    inputs, targets = corpus.texts("abstracts", _ROWS), corpus.texts("titles", _ROWS)
    found = []
    for number, (text, target) in enumerate(zip(inputs, targets, strict=True)):
        n_behaviors = round(5 * 40 ** draw.random())
        history = plugs.random_history(draw, n_behaviors, _WIDTH)
        words = " ".join(text.split()[: draw.integers(10, 60)])
        found.append(
            {
                "request_id": f"r{number}",
                "persona": "own",
                "input": words,
                "query": words,
                "target": " ".join(target.split()[:12]),
                "history": history,
            }
        )
    return found[:n]


def new_model(precision: Precision = "auto") -> PersonalizedLLM:
    """A plug of the paper's kind, the same each time, in front of SmolLM2."""
    encoder = resolve(str(packaged.minilm()), flag="--encoder")
    llm = FrozenLLM.load(resolve(str(packaged.smollm2()), flag="--llm"), precision=precision)
    options: dict[str, Any] = {"persona_tokens": 1, "temperature": 20.0}
    return plugs.new_model(encoder, llm, pooling="mean", max_query_tokens=_ROW_TOKENS, **options)


class Step:
    """One optimizer step over some rows."""

    def __init__(self, n: int) -> None:
        self.rows = rows(n)
        self.model = new_model()
        self.optimizer = self.new_optimizer()

    def new_optimizer(self) -> torch.optim.AdamW:
        """That of `jobs.train`."""
        return new_optimizer(self.model, TrainingOptions())

    @torch.no_grad()
    def found(self) -> float:
        """The loss of the first rows before any step."""
        rows, self.rows = self.rows, self.rows[:8]
        loss = float(self.loss())
        self.rows = rows
        return loss

    def turn(self) -> tuple[float, float]:
        """All rows once."""
        return len(self.rows), timed(self.step)

    def step(self) -> float:
        """Forward, backward, optimizer."""
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def loss(self) -> Tensor:
        """Nats a token."""
        batch = self.model.collate(self.rows)
        nll_B: Tensor = self.model(batch)
        return nll_B.sum() / batch.n_target_tokens


class ReferenceStep(Step):
    """The same step the reference's way, with the attention that transformers takes by itself."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.model.llm.model.set_attn_implementation("sdpa")

    def new_optimizer(self) -> torch.optim.AdamW:
        """AdamW as torch gives it."""
        return torch.optim.AdamW(trainable(self.model).values(), lr=1e-4)

    def loss(self) -> Tensor:
        """Nats a token, the mean that transformers' own loss takes."""
        llm = self.model.llm
        inputs = llm.tokenizer.inputs([row["input"] for row in self.rows])
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
    """The same with four past texts, as many tokens of them as by default, in front of each request (eq. r)."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        past = iter(corpus.texts("abstracts", _ROWS + _PREFIX_TEXTS * n)[_ROWS:])
        self.rows = [{**row, "retrieved": [next(past) for _ in range(_PREFIX_TEXTS)]} for row in self.rows]
        self.model.prefix_tokens = _PREFIX_TOKENS


class StepReadAtOnce(StepWithTexts):
    """The past texts as more of the row that gradients pass through, as one would write it."""

    def loss(self) -> Tensor:
        """Nats a token."""
        llm, batch = self.model.llm, self.model.collate(self.rows)
        texts_BFD = llm.embed(torch.tensor(batch.prefix_ids))
        prompt_BLD = torch.cat([texts_BFD, self.model.soft_tokens(batch).to(texts_BFD.dtype)], dim=1)
        return llm.nll(prompt_BLD, batch.inputs, batch.targets).sum() / batch.n_target_tokens


class FrozenStep(Step):
    """The limit: the LLM forward, and backward to the soft tokens, with no plug at all."""

    def loss(self) -> Tensor:
        """Nats a token of random soft tokens."""
        llm = self.model.llm
        inputs = llm.tokenizer.inputs([row["input"] for row in self.rows])
        targets = llm.tokenizer.targets([row["target"] for row in self.rows])
        soft_BSD = torch.randn(len(inputs), self.model.plug.options.n_soft, llm.width, requires_grad=True)
        return llm.nll(soft_BSD, inputs, targets).sum() / sum(map(len, targets))


def reference_soft_tokens(model: PersonalizedLLM, some: Sequence[Row]) -> Tensor:
    """[I; P] (B, S, D) with every history padded to 512 behaviors, and Proj of each of them."""
    plug, text = model.plug, model.query_text
    assert text is not None
    history_BNd = torch.zeros(len(some), _BEHAVIORS, _WIDTH)
    mask_BN = torch.zeros(len(some), _BEHAVIORS, dtype=torch.bool)
    for i, row in enumerate(some):
        vectors = np.frombuffer(row["history"], "<f2").reshape(-1, _WIDTH).astype(np.float32)
        history_BNd[i, : len(vectors)] = torch.from_numpy(vectors)
        mask_BN[i, : len(vectors)] = True
    tokens = text.tokenizer(
        [row["query"] for row in some],
        truncation=True,
        padding="max_length",
        max_length=_ROW_TOKENS,
        return_tensors="pt",
    )
    assert plug.query_encoder is not None
    hidden_BTd = plug.query_encoder(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    query_Bd = pool(hidden_BTd, tokens["attention_mask"], plug.pooling)
    scores_BN = (history_BNd @ query_Bd.unsqueeze(-1)).squeeze(-1) * plug.temperature()
    weights_BN = scores_BN.masked_fill(~mask_BN, -torch.inf).softmax(dim=-1)
    persona_BD = (plug.projector(history_BNd) * weights_BN.unsqueeze(-1)).sum(dim=1)
    instruction_B1D = plug.instruction.expand(len(some), 1, -1)
    return plug.scale * torch.cat([instruction_B1D, persona_BD.unsqueeze(1)], dim=1)


class Answers:
    """Answers to some requests in batches of 32."""

    def __init__(self, n: int, beams: int, precision: Precision = "auto") -> None:
        self.rows = rows(n)
        self.beams = beams
        self.decoding = Decoding(beams=beams, max_new_tokens=24)
        self.model = self.load(precision)
        self.engine = LocalEngine(self.model.llm, batch_size=_BATCH_SIZE)

    def load(self, precision: Precision) -> PersonalizedLLM:
        """As `jobs.generate` has it."""
        model = new_model(precision)
        prepare_for_inference(model.plug, dtype=model.llm.dtype, device=model.llm.device)
        return model

    def found(self) -> list[str]:
        """What the LLM says to the first requests, in float32: in bf16 padding alone can turn one word into another."""
        return type(self)(_COMPARED, self.beams, "fp32").answer()

    def turn(self) -> tuple[float, float]:
        """All requests."""
        return len(self.rows), timed(self.answer)

    @torch.inference_mode()
    def answer(self) -> list[str]:
        """What the LLM said, in order."""
        import pyarrow as pa

        from persona.plug.request_tables import answer_all

        answerer = Answerer(self.model.plug, self.engine, self.model.query_text, batch_size=_BATCH_SIZE)
        found = answer_all(answerer, pa.Table.from_pylist(self.rows), self.decoding)
        return [str(text) for text in found["output"].to_pylist()]


class PlainAttention(Answers):
    """With the attention that transformers takes by itself, and the query encoder as it was trained."""

    def load(self, precision: Precision) -> PersonalizedLLM:
        """As it comes."""
        model = new_model(precision)
        model.llm.model.set_attn_implementation("sdpa")
        return model


class ReferenceAnswers(PlainAttention):
    """One row at a time by `transformers.generate`, padded on the left as in training."""

    @torch.inference_mode()
    def answer(self) -> list[str]:
        """What the LLM said, in order."""
        llm = self.model.llm
        said = []
        for row in self.rows:
            [ids] = llm.tokenizer.inputs([row["input"]])
            n_padded = _ROW_TOKENS - len(ids)
            soft_BSD = reference_soft_tokens(self.model, [row]).to(llm.model.dtype)
            padding_BLD = llm.embed(torch.full((1, n_padded), llm.tokenizer.pad_id))
            embeds_BLD = torch.cat([padding_BLD, soft_BSD, llm.embed(torch.tensor([ids]))], dim=1)
            mask_BL = torch.ones(embeds_BLD.shape[:2], dtype=torch.long)
            mask_BL[:, :n_padded] = 0
            [output] = generate_plainly(self.engine, self.decoding, inputs_embeds=embeds_BLD, attention_mask=mask_BL)
            said.append(llm.tokenizer.decode(output))
        return said


class PlainAnswers(PlainAttention):
    """The limit: `transformers.generate` on the same requests in one batch, without a plug."""

    def found(self) -> list[str]:
        """Without a plug it says something else."""
        return []

    @torch.inference_mode()
    def answer(self) -> list[str]:
        """What the LLM said, in order of the length of the requests."""
        llm = self.model.llm
        ids = llm.tokenizer.inputs([row["input"] for row in self.rows])
        length = max(map(len, ids))
        ids_BL = torch.tensor([[llm.tokenizer.pad_id] * (length - len(row)) + row for row in ids])
        mask_BL = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids])
        output = generate_plainly(self.engine, self.decoding, input_ids=ids_BL, attention_mask=mask_BL)[:, length:]
        return [str(text) for text in llm.tokenizer.pretrained.batch_decode(output, skip_special_tokens=True)]


def generate_plainly(engine: LocalEngine, decoding: Decoding, **inputs: Tensor) -> Tensor:
    """What `transformers.generate` makes of the same settings."""
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.beams,
        do_sample=False,
        eos_token_id=engine.eos_ids,
        pad_token_id=engine.tokenizer.pad_id,
    )
    output: Tensor = engine.llm.model.generate(**inputs, generation_config=config)
    return output
