"""The reference: plain transformers, token ids only, one request at a time, without padding."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from tests.matrix.requests import Request


class PlainLLM:
    """An LLM and its tokenizer as `from_pretrained` loads them."""

    def __init__(
        self, folder: Path, *, seq2seq: bool, dtype: torch.dtype = torch.float32, soft_first: bool = False
    ) -> None:
        auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
        self.seq2seq, self.soft_first = seq2seq, soft_first
        self.model = auto.from_pretrained(folder, dtype=dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        words, whole = self.ids("it"), self.tokenizer("it")["input_ids"]
        start = whole.index(words[0])
        added = self.tokenizer.added_tokens_decoder
        self.special_ids = {*self.tokenizer.all_special_ids, *(token for token, one in added.items() if one.special)}
        self.is_chat = not seq2seq and self.tokenizer.chat_template is not None
        self.opening, self.closing = whole[:start], whole[start + len(words) :]

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def word_ids(self) -> list[int]:
        """All tokens that are not special."""
        return sorted(set(range(len(self.tokenizer))) - self.special_ids)

    def prompt(self, request: Request) -> list[int]:
        """What the LLM reads, with words in the places of the soft tokens."""
        before, after = self._parts(request)
        return [*before, *request.soft_ids, *after]

    def _parts(self, request: Request) -> tuple[list[int], list[int]]:
        """What is in front of the soft tokens and behind them."""
        end = [] if self.seq2seq else self.ids("\n")
        if not self.is_chat:
            texts = [token for text in request.texts for token in [*self.ids(text), *end]]
            closing = self.closing if self.seq2seq else []
            text = [*self.ids(request.input), *closing, *end]
            return (self.opening, [*texts, *text]) if self.soft_first else ([*self.opening, *texts], text)
        content = "".join(f"{text}\n" for text in request.texts) + request.input
        chat = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        start = text.rindex(request.input)
        at = next(i for i, (_, stop) in enumerate(encoded["offset_mapping"]) if stop > start)
        if self.soft_first:
            at = int(encoded["input_ids"][0] == self.tokenizer.bos_token_id and self.opening != [])
        return encoded["input_ids"][:at], encoded["input_ids"][at:]

    def labels(self, request: Request) -> list[int]:
        """What the LLM is to answer."""
        if self.seq2seq:
            ids = self.tokenizer(text_target=request.target)["input_ids"]
            return ids if self.closing else [*ids, self.tokenizer.eos_token_id]
        if not self.is_chat:
            return [*self.ids(request.target), self.tokenizer.eos_token_id]
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": request.target}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False)
        behind = self.ids(text[text.rindex(request.target) + len(request.target) :])
        return [*self.ids(request.target), next(token for token in behind if token in self.special_ids)]

    @torch.no_grad()
    def loss(self, request: Request) -> float:
        """The summed negative log-likelihood of the target, in nats."""
        return float(self._loss(request))

    def gradient(self, request: Request, soft_SD: Tensor) -> Tensor:
        """The gradient (S, D) of the loss to the embeddings of the words in the places of the soft tokens.

        Where a model scales what its embedding module returns, the gradient is that to the scaled embeddings `soft_SD`.
        """
        prompt = self.prompt(request)
        seen: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not seen and args[0][0, : len(prompt)].tolist() == prompt:
                output.retain_grad()
                seen.append(output)

        embeddings = [module for module in self.model.modules() if isinstance(module, nn.Embedding)]
        hooks = [module.register_forward_hook(keep) for module in embeddings]
        self._loss(request).backward()
        for hook in hooks:
            hook.remove()
        start = len(self._parts(request)[0])
        soft = slice(start, start + len(request.soft_ids))
        scale = soft_SD.norm() / seen[0][0, soft].norm()
        return seen[0].grad[0, soft] / scale

    def _loss(self, request: Request) -> Tensor:
        prompt, labels = self.prompt(request), self.labels(request)
        if self.seq2seq:
            logits = self.model(input_ids=torch.tensor([prompt]), labels=torch.tensor([labels])).logits[0]
        else:
            row = torch.tensor([[*prompt, *labels]])
            logits = self.model(input_ids=row, use_cache=False).logits[0, -len(labels) - 1 : -1]
        return nn.functional.cross_entropy(logits.float(), torch.tensor(labels), reduction="sum")

    def answer(self, request: Request, *, beams: int, max_new_tokens: int) -> list[int]:
        """The tokens that `generate` adds, up to the end."""
        prompt = self.prompt(request)
        ids = torch.tensor([prompt])
        given = {"input_ids": ids}
        # A penalty for what was said before counts the prompt's tokens only if `generate` knows their ids.
        if not self.seq2seq and self.model.generation_config.repetition_penalty is not None:
            given = {"inputs_embeds": self.model.get_input_embeddings()(ids)}
        generated = self.model.generate(
            **given,
            attention_mask=torch.ones_like(ids),
            num_beams=beams,
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )[0].tolist()
        if "input_ids" in given:
            generated = generated[1:] if self.seq2seq else generated[len(prompt) :]
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return generated[: next((i for i, token in enumerate(generated) if token in ends), None)]
