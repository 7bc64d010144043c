"""A vLLM engine in separate processes, which is started again when it dies."""

import asyncio
import itertools
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
from vllm import AsyncEngineArgs, SamplingParams
from vllm.inputs import EngineInput
from vllm.outputs import CompletionOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from persona.errors import InputError

T = TypeVar("T")

MAX_RESTARTS = 3
# Twice what vLLM runs at a time, so that a request is there when another one ends. More would only take memory.
_IN_FLIGHT = 512


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt; `inputs` makes its tensors when its turn has come."""

    inputs: Callable[[], EngineInput]
    params: SamplingParams


class Client:
    """Sends requests to vLLM and waits for what it generates; several threads may do so at a time.

    When vLLM dies, the requests in flight are sent again to a new one, `MAX_RESTARTS` times.

    Raises:
        InputError: vLLM does not start with these arguments.
    """

    def __init__(self, arguments: AsyncEngineArgs) -> None:
        self._arguments = arguments
        self._numbers = itertools.count()
        self._n_restarts = 0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vllm-client", daemon=True).start()
        self._replacing, self._in_flight = asyncio.Lock(), asyncio.Semaphore(_IN_FLIGHT)
        self._llm = self._wait(self._start())

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return int(self._llm.model_config.max_model_len)

    def generate(self, requests: Sequence[Request]) -> list[CompletionOutput]:
        """What is generated for each request, in their order. Raises InputError when vLLM dies once too often."""
        return self._wait(self._all(requests))

    def close(self) -> None:
        """Ends vLLM's processes."""
        _end(self._llm)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _start(self) -> AsyncLLM:
        try:
            return AsyncLLM.from_engine_args(self._arguments)
        except Exception as error:  # it fails in many ways
            raise InputError(
                f"--engine vllm does not start with {self._arguments.model!r}: {error}; its own log says more with "
                "VLLM_LOGGING_LEVEL=INFO in the environment"
            ) from error

    async def _all(self, requests: Sequence[Request]) -> list[CompletionOutput]:
        tasks = [asyncio.create_task(self._one(request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()  # if one has failed

    async def _one(self, request: Request) -> CompletionOutput:
        async with self._in_flight:
            inputs = request.inputs()
            while True:
                llm = self._llm
                try:
                    return await self._generate(llm, inputs, request.params)
                except EngineDeadError as error:
                    await self._replace(llm, error)

    async def _generate(self, llm: AsyncLLM, inputs: EngineInput, params: SamplingParams) -> CompletionOutput:
        outputs = [output async for output in llm.generate(inputs, params, request_id=str(next(self._numbers)))]
        [completion] = outputs[-1].outputs
        return completion

    async def _replace(self, dead: AsyncLLM, error: EngineDeadError) -> None:
        """Starts another vLLM, unless another request in flight has already done it."""
        async with self._replacing:
            if self._llm is not dead:
                return
            if self._n_restarts == MAX_RESTARTS:
                raise InputError(
                    f"--engine vllm: vLLM has died {MAX_RESTARTS + 1} times; finished answers are kept. If memory is "
                    "short, lower --gpu-memory-utilization or --max-model-len, or raise --tensor-parallel"
                ) from error
            self._n_restarts += 1
            _end(dead)
            self._llm = await self._start()


def _end(llm: AsyncLLM) -> None:
    with suppress(psutil.NoSuchProcess):  # a process that ends by itself while vLLM looks for it
        llm.shutdown()
