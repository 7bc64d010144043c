"""What limits how personal a plug is: the LLM's input tokens, or the encoder's vectors?

    python -m tests.benchmarks.ceiling --acl FOLDER --out run
    python -m tests.benchmarks.ceiling --acl FOLDER --out run --encoder FOLDER --only tokens
    python -m tests.benchmarks.ceiling --acl FOLDER --out run --train-rows 800 --only tokens tuning    # 50 steps

Trains plugs on the next titles of ACL authors with the same requests in the same order, in one process without Ray, and
prints a table: the plug of the recipe (`tokens`), a plug that gives the LLM keys and values in every layer instead of
input tokens (`prefix`), one of four times its rank (`prefix-wide`), and the controls of both kinds, which see no
histories. Three more read a history as more than one mean: `resampler`, `latest` and `peers` (`history_plugs`). For
vectors of another encoder, run the command once more with `--encoder`. Results that `--out` already has are kept, so
the same command resumes.

The second table has the loss when the history is the vector of the title to be written. `near` moves that vector to the
typical behavior, until it is as far from there as the mean of a history: plugs are trained on such means.
"""

import argparse
import importlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from jobs.runtime.configuration import read_config
from persona.models import packaged
from persona.models.encoder import TextEncoder
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import ModelFolder, resolve
from persona.options import PersonaKind, TrainingOptions
from persona.plug import warm_start
from persona.plug.module import Plug
from persona.plug.personalized import Batch, PersonalizedLLM
from persona.plug.request_tables import loss_of_all
from persona.store.store import Store
from persona.training.augmentation import step_rows
from persona.training.deepspeed import new_optimizer, trainable
from persona.training.order import Window, order_in_window
from persona.training.step import train_step
from tests.benchmarks import ceiling_data, ceiling_table, encoder_ranking, history_plugs
from tests.benchmarks.prefix_plug import PrefixLLM

_RECIPE = "jobs/recipes/acl_next_title/best.yaml"
_BATCH = 16
# With this rank a prefix of seventeen positions has as many weights as sixteen tokens.
_RANK = 26
_FITTED_BEHAVIORS = 512
_RANKS = {"prefix": _RANK, "prefix-wide": 4 * _RANK, "prefix-tuning": _RANK}
_WITHOUT_HISTORIES = ("tuning", "prefix-tuning")
PLUGS = ("tokens", "prefix", "prefix-tuning", "tuning", "prefix-wide", *history_plugs.PLUGS)


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--acl", type=Path, required=True, help="folder with histories.parquet and the requests")
    parser.add_argument("--out", type=Path, required=True, help="folder for the stores and results")
    parser.add_argument("--encoder", type=Path, help="folder of the encoder; default the packaged MiniLM")
    parser.add_argument("--llm", type=Path, help="folder of the frozen LLM; default the packaged SmolLM2-135M-Instruct")
    parser.add_argument(
        "--only", nargs="*", choices=PLUGS, default=PLUGS[:4], metavar="PLUG", help=f"{', '.join(PLUGS)}; none: no plug"
    )
    parser.add_argument("--task", choices=ceiling_data.TASKS, default="next", help="what the input says of the title")
    parser.add_argument("--split", choices=("dev", "test"), default="dev", help="requests to evaluate")
    parser.add_argument("--train-rows", type=int, default=2_480, help="number of training requests, 16 per step")
    parser.add_argument("--every", type=int, default=4, help="evaluate every N-th request of the split")
    parser.add_argument("--max-tokens", type=int, default=256, help="cut texts to this length for the encoder")
    parser.add_argument("--prefix-rate", type=float, default=1e-2, help="peak learning rate of the prefix plugs")
    parser.add_argument("--persona-warmup", type=int, default=100, help="as of jobs.train; the older tables have 0")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of requests")
    run = Run(parser.parse_args())
    run.rank_by_encoder()
    for name in run.arguments.only:
        run.measure(name)
    ceiling_table.show(run.comparable())


class Run:
    """All plugs with one encoder; `--out` may have results of others."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.encoder_folder = resolve(str(arguments.encoder or packaged.minilm()), flag="--encoder")
        self.llm_folder = resolve(str(arguments.llm or packaged.smollm2()), flag="--llm")
        self.results = arguments.out / "results.jsonl"
        needed = ("--requests", "--store", "--plug", "--run", "--runs")
        flags = [word for flag in needed for word in (flag, "unused")]
        self.config: Any = read_config(importlib.import_module("jobs.train").Config, ["--config", _RECIPE, *flags])
        self._data: Data | None = None

    def records(self) -> list[dict[str, Any]]:
        """The results so far."""
        return [json.loads(line) for line in self.results.read_text().splitlines()] if self.results.exists() else []

    def comparable(self) -> list[dict[str, Any]]:
        """The results with any encoder and plug, of the same LLM on the same requests."""
        same = self._requests_key().items()
        return [record for record in self.records() if same <= record.items()]

    def measure(self, name: str) -> None:
        """Trains and evaluates one plug."""
        key = self._key(name)
        if self._is_done(key):
            return
        print(ceiling_table.label(key), flush=True)
        started = time.perf_counter()
        with_histories = name not in _WITHOUT_HISTORIES
        options = replace(
            self.config.training,
            epochs=1,
            micro_batch=_BATCH,
            global_batch=_BATCH,
            seed=self.arguments.seed,
            learning_rate=key.get("rate", self.config.training.learning_rate),
            persona_warmup=self.arguments.persona_warmup,
        )
        if not with_histories:
            options = replace(options, empty_history=1.0, alignment=0.0)
        data = self._load()
        model = self._new_model(name, data)
        n_weights = sum(parameter.numel() for parameter in trainable(model).values())
        losses = train(model, data.train, options, data.encoder_fp32)
        seconds = time.perf_counter() - started
        personas = ("own", "none", "other", "title", "near") if with_histories else ("none",)
        found = {
            "weights": n_weights,
            "training_losses": losses,
            "training_s": round(seconds),
            "losses": evaluate(model, data, personas),
        }
        self._keep(key | found)

    def rank_by_encoder(self) -> None:
        """How often the encoder alone finds the author's title of two."""
        key = self._key("encoder alone")
        if self._is_done(key):
            return
        data = self._load()
        titles = list(zip(data.held_out["target"].to_pylist(), data.held_out["rejected"].to_pylist(), strict=True))
        shares = encoder_ranking.rank(
            data.held_out, titles, data.store, data.encoder, max_behaviors=self.config.max_behaviors
        )
        self._keep(key | {"ranking": {method: share.rounded() for method, share in shares.items()}})

    def _key(self, name: str) -> dict[str, Any]:
        """What a result depends on."""
        encoder = {"encoder": self.encoder_folder.fingerprint[:12], "width": self.encoder_folder.config["hidden_size"]}
        rate = {"rate": self.arguments.prefix_rate} if name in _RANKS else {}
        return {"plug": name, **encoder, **rate, **self._requests_key()}

    def _requests_key(self) -> dict[str, Any]:
        names = ("task", "split", "train_rows", "every", "max_tokens", "persona_warmup", "seed")
        return {"llm": self.llm_folder.fingerprint[:12], **{name: getattr(self.arguments, name) for name in names}}

    def _is_done(self, key: dict[str, Any]) -> bool:
        return any(key.items() <= record.items() for record in self.records())

    def _keep(self, record: dict[str, Any]) -> None:
        with self.results.open("a") as file:
            file.write(f"{json.dumps(record)}\n")

    def _load(self) -> "Data":
        if self._data is None:
            self._data = Data(self.arguments, self.encoder_folder, max_behaviors=self.config.max_behaviors)
        return self._data

    def _new_model(self, name: str, data: "Data") -> PersonalizedLLM:
        """An untrained plug in front of the LLM, as `jobs.train` makes it."""
        llm = FrozenLLM.load(self.llm_folder, prompt=self.config.prompt, max_input_tokens=self.config.max_input_tokens)
        torch.manual_seed(self.arguments.seed)
        width = data.store.identity.width
        options = self.config.plug_options
        kind = history_plugs.PLUGS.get(name, Plug)
        plug = kind(options, query_encoder=None, width=width, llm_width=llm.width, token_norm=llm.token_norm())
        behaviors = torch.from_numpy(data.typical).float()
        plug.set_typical_behavior(behaviors)
        warm_start.fit(plug, data.encoder_fp32, llm, data.typical)
        if isinstance(plug, history_plugs.Resampler | history_plugs.Peers):
            seen_Nd = ceiling_data.seen_behaviors(data.train, width)
            plug.start(torch.from_numpy(seen_Nd).float(), seed=self.arguments.seed)
        model = PersonalizedLLM(plug, llm, None)
        if name not in _RANKS:
            return model
        return PrefixLLM.from_soft_tokens(model, behaviors[-_FITTED_BEHAVIORS:], rank=_RANKS[name])


class Data:
    """Requests with histories as one encoder sees them."""

    def __init__(self, arguments: argparse.Namespace, folder: ModelFolder, *, max_behaviors: int) -> None:
        train, self.held_out = ceiling_data.requests(
            arguments.acl,
            task=arguments.task,
            train_rows=arguments.train_rows,
            split=arguments.split,
            every=arguments.every,
        )
        uri = arguments.out / f"store-{folder.fingerprint[:12]}-{arguments.max_tokens}"
        self.store: Store
        self.store, self.encoder = ceiling_data.embed(
            arguments.acl, [train, self.held_out], uri, folder, max_tokens=arguments.max_tokens
        )
        identity = self.store.identity
        # As in `jobs.train`, what is encoded while a plug is trained is encoded in float32.
        self.encoder_fp32 = TextEncoder(
            folder, pooling=identity.pooling, max_tokens=identity.max_tokens, precision="fp32", device="cpu"
        )
        self.train = ceiling_data.joined(train, self.store, [PersonaKind.OWN], max_behaviors=max_behaviors)
        self.typical = ceiling_data.typical_behaviors(self.train, identity.width)
        kinds = [PersonaKind.OWN, PersonaKind.NONE, PersonaKind.OTHER]
        self.evaluated = ceiling_data.joined(self.held_out, self.store, kinds, max_behaviors=max_behaviors)


class Engine:
    """The part of a DeepSpeed engine that `train_step` uses, for one process."""

    world_size = 1

    def __init__(self, model: PersonalizedLLM, options: TrainingOptions) -> None:
        self.module = model
        self.optimizer = new_optimizer(model, options)
        self._max_norm = options.max_gradient_norm

    def __call__(self, batch: Batch) -> Tensor:
        nll_B: Tensor = self.module(batch)
        return nll_B

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(trainable(self.module).values(), self._max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def train(model: PersonalizedLLM, requests: pa.Table, options: TrainingOptions, encoder: TextEncoder) -> list[float]:
    """One epoch over joined requests, in the order of `jobs.train`; the loss of each step in nats per token."""
    engine = Engine(model, options)
    n_steps = requests.num_rows // options.global_batch
    window = Window(epoch=0, number=0, first_step=0, n_steps=n_steps, ranges=())
    order = order_in_window(requests, window, seed=options.seed, global_batch=options.global_batch)
    losses: list[float] = []
    for step, numbers in enumerate(order.reshape(n_steps, options.global_batch)):
        rows = step_rows(
            requests.take(numbers).to_pylist(),
            step=step,
            n_steps=n_steps,
            epoch=0,
            width=model.plug.width,
            options=options,
            encoder=encoder,
        )
        loss, _ = train_step(engine, rows, step=step, n_steps=n_steps, options=options)
        losses.append(round(loss, 4))
        if (step + 1) % 10 == 0 or step + 1 == n_steps:
            print(f"  step {step + 1} of {n_steps}, loss {sum(losses[-10:]) / len(losses[-10:]):.3f}", flush=True)
    return losses


def evaluate(model: PersonalizedLLM, data: Data, personas: Sequence[str]) -> dict[str, list[Any]]:
    """The nats of each request's target under each persona, and of its rejected title under `own` and `none`."""
    model.eval()
    rows = {kind: _of(data.evaluated, kind) for kind in ("own", "none", "other")}
    titles = ceiling_data.title_vectors(rows["own"], data.encoder_fp32, data.typical)
    for kind, column in zip(("title", "near"), titles, strict=True):
        rows[kind] = _with(rows["own"], "history", column)
    found: dict[str, list[Any]] = {name: rows["none"][name].to_pylist() for name in ("request_id", "user_id")}
    for kind in personas:
        losses = loss_of_all(model, rows[kind], batch_size=_BATCH)
        found |= {kind: losses["nats"].to_pylist(), "tokens": losses["tokens"].to_pylist()}
    for kind in ("own", "none") if "own" in personas else ():
        rejected = _with(rows[kind], "target", rows[kind]["rejected"])
        found[f"rejected_{kind}"] = loss_of_all(model, rejected, batch_size=_BATCH)["nats"].to_pylist()
    return found


def _of(table: pa.Table, persona: str) -> pa.Table:
    """The rows of one kind of persona, by request."""
    return table.filter(pc.equal(table["persona"], persona)).sort_by("request_id")


def _with(table: pa.Table, name: str, column: Any) -> pa.Table:
    """The table with another column of that name."""
    return table.set_column(table.column_names.index(name), name, column)


if __name__ == "__main__":
    main()
