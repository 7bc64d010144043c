"""Compare the speed of the jobs with other ways to do the same work: `make bench`.

    python -m tests.benchmarks.bench --acl FOLDER --only embed

A full run writes `results.json` and the marked part of `RESULTS.md`. The exit code is 1 if a ratio is below its goal by
more than the measured noise. The goals of models are for CPUs that multiply bf16; on others there are none. Without
`--acl` the texts are generated, with the same lengths.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.runtime import session
from persona.models.device import choose_precision
from tests.benchmarks import corpus, data_path, encoding, llm_work
from tests.benchmarks.contest import Contender, compete, ratio, spread

_HERE = Path(__file__).parent
_BEGIN, _END = "<!-- make bench: begin -->", "<!-- make bench: end -->"
_CORES = session.usable_cores()
_MULTIPLIES_BF16 = choose_precision("auto", torch.device("cpu")) == torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Line:
    """One comparison. A higher `ratio` is better; `limit_share` is our rate divided by the limit's."""

    work: str
    peer: str
    ours: str
    theirs: str
    ratio: float | None = None
    goal: float | None = None
    noise: float | None = None
    limit_share: float | None = None
    limit: str = ""
    ours_mib: float | None = None
    theirs_mib: float | None = None

    @property
    def misses(self) -> bool:
        """Whether the ratio is below the goal by more than the noise."""
        return self.ratio is not None and self.goal is not None and self.ratio + (self.noise or 0.0) < self.goal


def embed(arguments: argparse.Namespace) -> Iterable[Line]:
    """`jobs.embed` end to end, on titles and abstracts."""
    contenders: dict[str, list[Contender]] = {}
    for kind, n in (("titles", arguments.titles), ("abstracts", arguments.abstracts)):
        texts = corpus.texts(kind, n, acl=arguments.acl)
        sample = {"texts": texts[::14]}  # enough to measure the rate of a peer that is already loaded
        peer, limit = encoding.SentenceTransformers, encoding.LinearLayers
        plain, bf16 = {**sample, "dtype": "float32"}, {**sample, "dtype": "bfloat16"}
        contenders[kind] = [
            Contender(name="jobs.embed", work=encoding.Embed, settings={"texts": texts}, process="ray"),
            Contender(name="Ray's recipe", work=encoding.RaysRecipe, settings=sample, process="ray"),
            Contender(name="sentence_transformers as it comes (fp32)", work=peer, settings=plain),
            Contender(name="sentence_transformers, bf16, best batch size", work=peer, settings=bf16),
            Contender(name="linear layers alone", work=limit, settings=sample),
        ]
    compete([one for of_kind in contenders.values() for one in of_kind], arguments.turns)
    for kind, goals in (("titles", (2.2, 2.2, 1.3)), ("abstracts", (2.2, 2.2, 1.2))):
        ours, *peers, limit_of_kind = contenders[kind]
        for one, goal in zip(peers, goals, strict=True):
            yield _line(f"embed, {kind}", ours, one, goal, limit_of_kind)


def train(arguments: argparse.Namespace) -> Iterable[Line]:
    """A training step; the reference implementation must start at the same loss."""
    ours = Contender(name="ours", work=llm_work.Step, settings={"n": 16})
    peer = Contender(name="the reference's way", work=llm_work.ReferenceStep, settings={"n": 8})
    limit = Contender(name="frozen LLM alone", work=llm_work.FrozenStep, settings={"n": 16})
    yield _steps("training step", ours, peer, 5.0, limit, arguments.turns)


def texts(arguments: argparse.Namespace) -> Iterable[Line]:
    """A training step with retrieved texts, at the default micro-batch."""
    ours = Contender(name="ours", work=llm_work.StepWithTexts, settings={"n": 8})
    peer = Contender(name="everything read at once", work=llm_work.StepReadAtOnce, settings={"n": 8})
    limit = Contender(name="without the texts", work=llm_work.Step, settings={"n": 8})
    yield _steps("training step, past texts in front", ours, peer, 1.3, limit, arguments.turns)


def _steps(work: str, ours: Contender, peer: Contender, goal: float, limit: Contender, turns: int) -> Line:
    compete([ours, peer, limit], turns)
    if not math.isclose(ours.result, peer.result, rel_tol=0.01):
        raise AssertionError(f"the losses differ: {ours.result:.4f}, and {peer.result:.4f} of {peer.name}")
    return _line(work, ours, peer, goal, limit)


def generate(arguments: argparse.Namespace) -> Iterable[Line]:
    """Answers; the reference implementation must generate the same texts."""
    for how, beams, n, n_peer, goal in (("greedy", 1, 32, 4, 8.0), ("4 beams", 4, 24, 2, 5.0)):
        settings, fewer = ({"n": count, "beams": beams} for count in (n, n_peer))
        ours = Contender(name="ours", work=llm_work.Answers, settings=settings)
        peer = Contender(name="one row at a time, padded", work=llm_work.ReferenceAnswers, settings=fewer)
        limit = Contender(name="transformers.generate, no plug", work=llm_work.PlainAnswers, settings=settings)
        compete([ours, peer, limit], arguments.turns)
        if ours.result != peer.result:
            raise AssertionError(f"the answers differ: {ours.result}, and {peer.result} of {peer.name}")
        yield _line(f"generation, {how}", ours, peer, goal, limit)
        yield _line(f"generation, {how}", ours, limit, 0.9, limit)


def path(arguments: argparse.Namespace) -> Iterable[Line]:
    """The data path: behaviors per second and core of `jobs.embed` with an encoder that costs almost nothing."""
    settings = {"n": arguments.path}
    ours = Contender(name="jobs.embed, free encoder", work=data_path.DataPath, settings=settings)
    limit = Contender(name="pyarrow scan and write", work=data_path.ScanAndWrite, settings=settings)
    compete([ours, limit], arguments.turns)
    per_core = [rate / _CORES for rate in ours.rates]
    yield Line(
        work="data path, behaviors/s a core, in 10,000",
        peer="-",
        ratio=statistics.median(per_core) / 10_000,
        goal=1.0,
        noise=spread(per_core) / 10_000,
        limit_share=ours.rate / limit.rate,
        ours=f"{ours.rate / _CORES:,.0f}/s a core",
        theirs=f"{limit.rate:,.0f}/s (pyarrow, one process)",
        ours_mib=ours.peak_mib,
    )


def refresh(arguments: argparse.Namespace) -> Iterable[Line]:
    """A refresh with 1 % new behaviors, compared with the full build."""
    ours = Contender(name="refresh", work=data_path.Refresh, settings={"n": arguments.store})
    compete([ours], arguments.turns)
    yield Line(
        work=f"refresh, 1 % new of {arguments.store:,}",
        peer="full build",
        ratio=ours.rate,
        goal=20.0,
        noise=spread(ours.rates),
        limit_share=ours.rate / 100,
        ours=f"1/{ours.rate:.1f} of the build",
        theirs="the build",
        ours_mib=ours.peak_mib,
    )


def gpus(arguments: argparse.Namespace) -> Iterable[Line]:
    """How busy simulated GPUs are, fed by the cores of this machine."""
    for n_gpus in arguments.gpus:
        use = data_path.measure_gpus(n_gpus)
        yield Line(
            work=f"{n_gpus} simulated GPUs busy",
            peer="-",
            ratio=use.busy,
            ours=f"{use.behaviors_per_s:,.0f} behaviors/s",
            theirs=f"{data_path.GPU_TEXTS_PER_S * n_gpus:,}/s if never waiting",
        )


def start(arguments: argparse.Namespace) -> Iterable[Line]:
    """The time from the command to the first encoded batch."""
    ours_s, alone_s, beyond_s = data_path.time_to_first_batch(min(arguments.turns, 2))
    work = "from the command to the first encoded batch"
    yield Line(
        work=work,
        peer="Ray's start and the model's load alone",
        ours=f"{ours_s:.1f} s",
        theirs=f"{alone_s:.1f} s",
    )
    yield Line(work=f"{work}, beyond those", peer="-", ours=f"{beyond_s:.1f} s", theirs="goal 3 s")


_WORKS: dict[str, Callable[[argparse.Namespace], Iterable[Line]]] = {
    one.__name__: one for one in (embed, train, texts, generate, path, refresh, gpus, start)
}


def main() -> int:
    """Run the chosen benchmarks; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=list(_WORKS), default=[], help="run these only, and write no result files"
    )
    parser.add_argument("--turns", type=int, default=5, help="measurements per contender")
    parser.add_argument("--acl", type=Path, help="folder with histories.parquet and next_title_train.parquet")
    parser.add_argument("--titles", type=int, default=12_000, help="number of titles that embed encodes")
    parser.add_argument("--abstracts", type=int, default=1_200, help="number of abstracts that embed encodes")
    parser.add_argument("--path", type=int, default=200_000, help="number of behaviors of the data path")
    parser.add_argument("--store", type=int, default=200_000, help="number of behaviors in the refreshed store")
    parser.add_argument("--gpus", type=int, nargs="+", default=(1, 4, 16), help="numbers of simulated GPUs")
    arguments = parser.parse_args()
    lines: list[Line] = []
    started = time.perf_counter()
    for name in arguments.only or _WORKS:
        work_started = time.perf_counter()
        for line in _WORKS[name](arguments):
            lines.append(line)
            print(" | ".join((*_rates(line), *_goals(line)[2:], *_memory(line)[2:])), flush=True)
        print(f"  ({name}: {time.perf_counter() - work_started:,.0f} s)", file=sys.stderr, flush=True)
    if not arguments.only:
        _write(lines, time.perf_counter() - started)
    missed = [line for line in lines if line.misses]
    for line in missed:
        print(f"missed: {line.work} against {line.peer}: {line.ratio:.2f} ± {line.noise:.2f}, goal {line.goal}")
    return 1 if missed else 0


def _line(work: str, ours: Contender, peer: Contender, goal: float, limit: Contender) -> Line:
    median, noise = ratio(ours, peer)
    return Line(
        work=work,
        peer=peer.name,
        ratio=median,
        goal=goal if _MULTIPLIES_BF16 else None,
        noise=noise,
        limit_share=ratio(ours, limit)[0],
        ours=f"{ours.rate:,.4g}/s",
        theirs=f"{peer.rate:,.4g}/s",
        limit=f"{limit.rate:,.4g}/s",
        ours_mib=ours.peak_mib,
        theirs_mib=peer.peak_mib,
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _rates(line: Line) -> Sequence[str]:
    noise = "" if line.noise is None else f" ± {line.noise:.2f}"
    return line.work, line.peer, line.ours, line.theirs, f"{_number(line.ratio, '.2f')}{noise}"


def _goals(line: Line) -> Sequence[str]:
    goal = "" if line.goal is None else f"≥ {line.goal:g}{' **missed**' if line.misses else ''}"
    return line.work, line.peer, goal, line.limit, _number(line.limit_share, ".2f")


def _memory(line: Line) -> Sequence[str]:
    return line.work, line.peer, _number(line.ours_mib, ",.0f"), _number(line.theirs_mib, ",.0f")


def _table(heads: Sequence[str], lines: Sequence[Line], cells: Callable[[Line], Sequence[str]]) -> str:
    """A Markdown table of the lines with at least one value besides their two names."""
    rows = [heads, ["---"] * len(heads), *(row for row in map(cells, lines) if any(row[2:]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _write(lines: Sequence[Line], seconds: float) -> None:
    """Update `results.json` and the marked part of `RESULTS.md`."""
    facts = ("work", "peer", "ratio", "goal", "noise", "limit_share")
    rows = [json.dumps({name: _rounded(getattr(line, name)) for name in facts}, ensure_ascii=False) for line in lines]
    (_HERE / "results.json").write_text("[\n" + ",\n".join(rows) + "\n]\n")
    text = f"""{_table(("work", "compared with", "ours", "theirs", "ratio"), lines, _rates)}

Goals, and the limit of the hardware for the same work:

{_table(("work", "compared with", "goal for the ratio", "limit", "share of the limit"), lines, _goals)}

Peak memory in MiB:

{_table(("work", "compared with", "ours", "theirs"), lines, _memory)}

Last run: {seconds / 60:.0f} minutes, {_CORES} cores, Python {platform.python_version()}. Rates are medians over turns.
A ratio is the median of the ratios of all turns, ± half their interquartile range.
"""
    results = _HERE / "RESULTS.md"
    before, rest = results.read_text().split(_BEGIN)
    after = rest.split(_END)[1]
    results.write_text(f"{before}{_BEGIN}\n\n{text}\n{_END}{after}")


def _rounded(value: str | float | None) -> str | float | None:
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
