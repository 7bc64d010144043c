"""What a chip can do, measured, and what it does while something runs: time, memory, power, clock, kernels."""

import re
import shutil
import statistics
import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.contest import timed

IS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if IS_GPU else "cpu")
# cuBLAS, cuBLASLt (nvjet) and CUTLASS, and torch's operators on a CPU. Attention is not among them: it is more than its
# matrix products.
_PRODUCT = re.compile(r"gemm|gemv|cutlass|nvjet|xmma|splitk|cublas|^aten::(addmm|baddbmm|bmm|mm)$|mkldnn|onednn", re.I)
_ATTENTION = re.compile(r"attention|flash|fmha", re.I)
_CLUTTER = re.compile(r"void |at::native::|c10::|\(anonymous namespace\)::|std::")
_OTHERS, _NAME_LENGTH = 5, 60
_SENSOR_PAUSE_S = 0.2
_QUERY = ("nvidia-smi", "--query-gpu=power.draw,clocks.sm", "--format=csv,noheader,nounits")


class Gpu:
    """The measured rates of the chip: FLOPs and bytes per second."""

    def __init__(self, *, square: int, copied_mib: int) -> None:
        left, right = (torch.randn(square, square, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        self.flops = 2 * square**3 / median_s(lambda: left @ right, 10)
        source = torch.randn(copied_mib * 2**18, device=DEVICE)
        target = torch.empty_like(source)
        self.bytes = 2 * source.nbytes / median_s(lambda: target.copy_(source), 10)
        name = torch.cuda.get_device_name() if IS_GPU else "CPU"
        print(f"{name}, torch {torch.__version__}: {self.flops / 1e12:.3g} TFLOP/s in a matrix product of {square} x")
        print(f"{square} in bf16, {self.bytes / 1e12:.3g} TB/s in a copy (bytes read and written)\n")
        print("| work | ours | floor | share of the floor | for comparison |\n|---|---|---|---|---|", flush=True)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Median seconds of a call, and in words how the chip spent them."""

    seconds: float
    details: str


def median_s(work: Callable[[], Any], turns: int) -> float:
    """Median seconds of a call over some turns, after one warm-up turn."""
    return statistics.median([timed(lambda: _finish(work)) for _ in range(turns + 1)][1:])


def measure(work: Callable[[], Any], turns: int) -> Measured:
    """Like `median_s`, with peak memory, power and clock of these turns, and the kernels of one more."""
    if IS_GPU:
        torch.cuda.reset_peak_memory_stats()
    with _Sensors() as sensors:
        seconds = median_s(work, turns)
    details = [f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"] if IS_GPU else []
    return Measured(seconds=seconds, details="; ".join([*details, *sensors.summary(), *_kernels(work, seconds)]))


def line(
    work: str, rate: float, floor: float, unit: str, comparison: str = "", measured: Measured | None = None
) -> None:
    """Print one row of the table; `rate` and `floor` are in `unit` per second."""
    print(f"| {work} | {rate:,.4g} {unit}/s | {floor:,.4g} | {rate / floor:.2f} | {comparison} |", flush=True)
    if measured:
        print(f"  {measured.details}", flush=True)


def _finish(work: Callable[[], Any]) -> None:
    work()
    if IS_GPU:
        torch.cuda.synchronize()


class _Sensors:
    """Reads power and clock while something runs, if they are readable."""

    def __enter__(self) -> Self:
        self.readings: list[tuple[float, float]] = []
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def summary(self) -> list[str]:
        """The medians."""
        if not self.readings:
            return []
        watts, mhz = (statistics.median(values) for values in zip(*self.readings, strict=True))
        return [f"{watts:.0f} W, {mhz:.0f} MHz"]

    def _read(self) -> None:
        sensor = _find_sensor()
        while sensor and not self.done.wait(_SENSOR_PAUSE_S):
            self.readings.append(sensor())


def _find_sensor() -> Callable[[], tuple[float, float]] | None:
    """What reads watts and megahertz here: NVML by way of torch, or a command."""

    def by_torch() -> tuple[float, float]:
        return torch.cuda.power_draw() / 1000, torch.cuda.clock_rate()

    def by_command() -> tuple[float, float]:
        first = subprocess.run(_QUERY, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        watts, mhz = map(float, first.split(","))
        return watts, mhz

    for sensor in (by_torch, by_command) if IS_GPU and shutil.which(_QUERY[0]) else (by_torch,) if IS_GPU else ():
        with suppress(Exception):  # no NVML, no permission, no such counter
            sensor()
            return sensor
    return None


def _kernels(work: Callable[[], Any], seconds: float) -> list[str]:
    """How long the chip computes, how much of that is not matrix products, and the largest of the rest."""
    with profile(activities=[ProfilerActivity.CUDA if IS_GPU else ProfilerActivity.CPU]) as profiler:
        _finish(work)
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        if IS_GPU and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            times[event.key] += event.self_device_time_total
        elif not IS_GPU:
            times[event.key] += event.self_cpu_time_total
    total = sum(times.values())
    others = Counter({name: time for name, time in times.items() if not _is_product(name)})
    if not total:
        return []
    largest = ", ".join(
        f"{_CLUTTER.sub('', name)[:_NAME_LENGTH]} {time / total:.1%}" for name, time in others.most_common(_OTHERS)
    )
    busy = f"computes {total / 1e6 / seconds:.0%} of the time"
    return [f"{busy}, and {others.total() / total:.0%} of that is not matrix products: {largest}"]


def _is_product(name: str) -> bool:
    return bool(_PRODUCT.search(name)) and not _ATTENTION.search(name)
