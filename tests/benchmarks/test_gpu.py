"""The measurements for a GPU run to their end on a CPU, with small models."""

import re
from dataclasses import replace

import torch

from tests.benchmarks import gpu, gpu_models
from tests.benchmarks.gpu_chip import Gpu, _is_product, measure


def test_answers_are_measured_with_floor_step_and_kernels(tmp_path, capsys, monkeypatch):
    sizes = replace(gpu_models.SMALL, answers=2, turns=1)
    monkeypatch.setattr(gpu, "_OUTPUT_TOKENS", 3)
    monkeypatch.setattr(gpu, "_LONG_OUTPUT", 5)
    encoder = gpu_models.new_encoder(sizes, tmp_path)
    chip = Gpu(square=64, copied_mib=1)
    for name, llm in gpu_models.new_llms(sizes, tmp_path):
        gpu.generate(chip, sizes, encoder, name, llm)
    printed = capsys.readouterr().out
    assert printed.count(": a static cache, ") == 2
    rows = re.findall(r"^\| 2 answers of .* \| ([\d.,e+]+) answers/s \| .* a step \S+ ms, floor", printed, re.M)
    assert len(rows) == 5
    assert printed.count("of that is not matrix products: ") == 5


def test_the_profile_tells_matrix_products_from_the_rest():
    left = torch.randn(300, 300)
    [details] = [measure(lambda: torch.sort(left @ left), 1).details]
    assert re.search(r"\d+% of that is not matrix products: aten::sort \d", details)
    products = ("nvjet_tst_128x128", "sm90_xmma_gemm_bf16bf16", "void cutlass::Kernel2<cutlass_80_gemm>", "aten::mm")
    assert all(map(_is_product, products))
    assert not any(map(_is_product, ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "void flash::flash_fwd_kernel")))
