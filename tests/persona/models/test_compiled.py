"""Compiled layers give the losses and gradients of plain ones, or are not used."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from persona.models.compiled import compile_layers, use_plain_layers
from persona.models.frozen_llm import FrozenLLM
from persona.models.prompts import PromptText
from tests.plugs import random_soft_tokens

# The compiler looks at tensors that are no leaves, and would warn if somebody else did.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
# The operations are the same, so only the order of a few sums may differ.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Graphs are kept per process and limited in number."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def losses_and_gradient(llm: FrozenLLM, n: int, words: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `n` rows of different lengths, the losses and the gradient to their soft tokens."""
    soft_BSD = random_soft_tokens(llm, n).requires_grad_()
    prompts = llm.tokenizer.prompts([PromptText(input="the movie " * (words + number)) for number in range(n)])
    losses_B = llm.nll(soft_BSD, prompts, llm.tokenizer.targets(["good", "a longer one", "x", "paper"][:n]))
    losses_B.sum().backward()
    assert soft_BSD.grad is not None
    return losses_B.detach(), soft_BSD.grad


def compiled_graphs(llm: FrozenLLM, backend: str) -> list[Any]:
    """Compiles the layers of `llm`; the list of graphs grows with each new one."""
    graphs: list[Any] = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        compiled: Callable[..., Any] = torch._dynamo.lookup_backend(backend)(graph, inputs)
        return compiled

    assert compile_layers(llm, backend=count) is None
    return graphs


# Inductor, the backend for GPUs, would call a C++ compiler for each graph. `aot_eager` makes the graphs of both passes
# as Inductor does, and runs their operations one by one; `eager` makes that of the forward pass only.
@pytest.mark.parametrize(("kind", "backend"), [("llama", "aot_eager"), ("t5", "eager")])
def test_compiled_layers_give_the_losses_and_gradients_of_plain_ones(request, kind, backend):
    llm = FrozenLLM.load(request.getfixturevalue(f"{kind}_folder"), precision="fp32", device="cpu")
    shapes = [(2, 5), (3, 9), (4, 30)]
    plain = [losses_and_gradient(llm, *shape) for shape in shapes]
    graphs = compiled_graphs(llm, backend)
    n_graphs = len(graphs)
    compiled = [losses_and_gradient(llm, *shape) for shape in shapes]
    torch.testing.assert_close(compiled, plain, **FLOAT32)
    assert len(graphs) == n_graphs > 0  # no shape needs another graph
    use_plain_layers(llm)
    torch.testing.assert_close(losses_and_gradient(llm, *shapes[0]), plain[0], rtol=0, atol=0)


def test_a_compiler_that_fails_is_not_used(llama_folder):
    llm = FrozenLLM.load(llama_folder, precision="fp32", device="cpu")
    plain = losses_and_gradient(llm, 3)

    def broken(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        raise NotImplementedError("no such kernel")

    reason = compile_layers(llm, backend=broken)
    assert reason is not None
    assert "no such kernel" in reason
    torch.testing.assert_close(losses_and_gradient(llm, 3), plain, rtol=0, atol=0)


def test_a_compiler_that_gives_other_numbers_is_not_used(llama_folder):
    llm = FrozenLLM.load(llama_folder, precision="fp32", device="cpu")
    plain = losses_and_gradient(llm, 3)

    def wrong(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        return lambda *values: tuple(1.05 * found for found in graph.forward(*values))

    reason = compile_layers(llm, backend=wrong)
    assert reason is not None
    assert "differs by" in reason
    torch.testing.assert_close(losses_and_gradient(llm, 3), plain, rtol=0, atol=0)
