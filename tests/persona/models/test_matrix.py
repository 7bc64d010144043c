"""The short form of `make models`: an LLM of each family equals plain transformers or is refused, as the page says."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.llms import LLMS, Family, build
from tests.matrix import page
from tests.matrix.findings import Findings
from tests.matrix.llm_checks import SHORT, Check, answers, check_llm, gradients, losses, new_pair
from tests.matrix.ours import OurLLM

ON_THE_PAGE = page.read()


def named(name: str) -> Family:
    return next(family for family in LLMS if family.name == name)


def check(name: str, folder: Path) -> Findings:
    torch.set_num_threads(1)
    return check_llm(build(named(name), folder), SHORT, seq2seq=named(name).seq2seq)


def strict() -> None:
    """Warnings are errors, as in the process of the tests."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "Passing `repetition_penalty` with `inputs_embeds`", UserWarning)


@pytest.fixture(scope="module")
def beside(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, Future[Findings]]]:
    """The findings on the second half of the families, from a process beside this one, which takes the first half."""
    cases = [
        item.callspec.params
        for item in request.session.items
        if item.path == Path(__file__) and hasattr(item, "callspec")
    ]
    names = [params["family"].name for params in cases if "family" in params]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=strict) as pool:
        yield {name: pool.submit(check, name, tmp_path_factory.mktemp("llm")) for name in names[len(names) // 2 :]}


# transformers says so about its own answers, as the reference wants them.
@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`:UserWarning")
@pytest.mark.parametrize("family", LLMS, ids=lambda family: family.name)
def test_an_llm_equals_plain_transformers_or_is_refused(
    family: Family, tmp_path: Path, beside: Mapping[str, Future[Findings]]
) -> None:
    findings = beside[family.name].result() if family.name in beside else check(family.name, tmp_path)
    assert not findings.failures
    # The long form may add limits that the short one does not look for.
    assert ON_THE_PAGE[family.name].startswith(findings.verdict)


def test_the_page_has_a_row_for_each_model() -> None:
    names = [model.name for models in page.sections().values() for model in models]
    assert len(names) == len(set(names))
    assert [*ON_THE_PAGE] == names
    assert not [verdict for verdict in ON_THE_PAGE.values() if verdict.startswith("fails")]


def scaled(ours: OurLLM) -> None:
    embed = ours.llm.embed
    ours.llm.embed = lambda ids: 1.02 * embed(ids)


def without_bos(ours: OurLLM) -> None:
    ours.llm.tokenizer.opening = []


def with_dropout(ours: OurLLM) -> None:
    ours.llm.model.train()


def without_positions(ours: OurLLM) -> None:
    mask_arguments = ours.llm.mask_arguments
    ours.llm.mask_arguments = lambda mask_BL, n_new=None: {"attention_mask": mask_arguments(mask_BL)["attention_mask"]}


def with_half_a_gradient(ours: OurLLM) -> None:
    target_logits = ours.llm.target_logits

    def halved(soft_BSD: Tensor, *args: object, **options: object) -> Tensor:
        return target_logits(0.5 * soft_BSD + 0.5 * soft_BSD.detach(), *args, **options)

    ours.llm.target_logits = halved


@pytest.mark.parametrize(
    ("fault", "check", "name"),
    [
        (scaled, losses, "GPT-2"),
        (without_bos, losses, "Llama 3"),
        (with_dropout, losses, "Llama 3"),
        (without_positions, answers, "GPT-2"),
        (with_half_a_gradient, gradients, "Llama 3"),
    ],
)
def test_the_matrix_finds_a_fault(fault: Callable[[OurLLM], None], check: Check, name: str, tmp_path: Path) -> None:
    pair = new_pair(build(named(name), tmp_path), seq2seq=False)
    assert not list(check(pair))
    torch.manual_seed(0)
    fault(pair.ours)
    assert list(check(pair))
