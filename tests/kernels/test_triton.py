"""The kernels of the GPU against autograd in float64: in Triton's interpreter, which runs anywhere, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crosskd_assign import functional
from crosskd_assign.kernels import chunked

pytest.importorskip("triton")

# Triton reads this variable when it is imported, so the interpreter runs in a process of its own.
CHILD = """
import sys, torch
from crosskd_assign.kernels import triton as kernels_triton
cases = torch.load(sys.argv[1], weights_only=True)
results = {}
for name, (kernel, logits, gamma) in cases.items():
    total, slope = getattr(kernels_triton, kernel)(*logits, gamma=gamma, wanted=True)
    alone, nothing = getattr(kernels_triton, kernel)(*logits, gamma=gamma, wanted=False)
    results[name] = total, slope, alone, nothing, kernels_triton.scaled(slope, torch.tensor(1000.0))
torch.save(results, sys.argv[2])
"""
COMPILING_CHILD = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from crosskd_assign.kernels import triton as kernels_triton
logits, total = "*" + sys.argv[1], "*fp32"
quality = {"z_at": logits, "t_at": logits, "slope_at": logits, "sum_at": total, "n": "i32"}
background = {"z_at": logits, "slope_at": logits, "sum_at": total, "n": "i32"}
scaled = {"x_at": logits, "factor_at": total, "out_at": logits, "n": "i32"}
sums = [("_quality_focal", quality, gamma) for gamma in (0.0, 1.0, 1.5)]  # each way through the kernel
sums += [("_background_focal", background, gamma) for gamma in (1.5, 2.0)]
kernels = [(name, types, {"gamma": gamma, "wanted": True, "block": 1024}) for name, types, gamma in sums]
for name, types, constants in [*kernels, ("_scaled", scaled, {"block": 1024})]:
    signature = types | dict.fromkeys(constants, "constexpr")
    compiled = compile(ASTSource(getattr(kernels_triton, name), signature, constants), target=GPUTarget("cuda", 80, 32))
    print(name if ".entry" in compiled.asm["ptx"] else "nothing")
"""
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run_child(code: str, *arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [sys.executable, "-c", code, *arguments]
    child = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert child.returncode == 0, child.stderr
    return child


def logits(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    z = 4 * torch.randn(count, generator=torch.Generator().manual_seed(seed)) - 3
    extremes = torch.tensor([0.0, 90.0, -90.0, 40.0, -40.0, 1e-3, -17.0, 17.0])[:count]
    z[: len(extremes)] = extremes
    return z.to(dtype)


def every_case() -> Iterator[tuple[str, tuple[str, tuple[Tensor, ...], float]]]:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for count in (1, 1024, 2500):  # less than a block, just one, and some with a rest
            z, teacher = logits(count, dtype, 0), logits(count, dtype, 1)
            teacher[10:20] = z[10:20]
            for gamma in (0.0, 1.0, 1.5, 2.0):
                yield f"quality {dtype} {count} {gamma}", ("quality_focal", (z, teacher), gamma)
                yield f"background {dtype} {count} {gamma}", ("background_focal", (z,), gamma)


CASES = dict(every_case())


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, tuple[Tensor, Tensor, Tensor, None, Tensor]]:
    folder = tmp_path_factory.mktemp("triton")
    torch.save(CASES, folder / "cases.pt")
    run_child(CHILD, str(folder / "cases.pt"), str(folder / "results.pt"), environment={"TRITON_INTERPRET": "1"})
    return torch.load(folder / "results.pt", weights_only=True)


def expected(kernel: str, given: tuple[Tensor, ...], gamma: float) -> tuple[Tensor, Tensor]:
    """The formula, and its derivative by autograd, in float64."""
    z = given[0].double().requires_grad_()
    if kernel == "quality_focal":
        q = given[1].double().sigmoid()
        weight = (z.sigmoid() - q).abs() ** gamma if gamma else torch.ones_like(z)
        loss = (weight * F.binary_cross_entropy_with_logits(z, q, reduction="none")).sum()
    else:
        loss = ((gamma * F.logsigmoid(z)).exp() * F.softplus(z)).sum()
    (slope,) = torch.autograd.grad(loss, z)
    return loss.detach(), slope


def check(case: str, total: Tensor, slope: Tensor) -> None:
    kernel, given, gamma = CASES[case]
    loss, derivative = expected(kernel, given, gamma)
    dtype = given[0].dtype
    assert total.dtype == torch.float32
    assert slope.dtype == dtype
    torch.testing.assert_close(total.double().cpu(), loss, rtol=2e-6, atol=1e-6)
    step = max(torch.finfo(dtype).eps, 4e-6)  # the interpreter cuts off where a GPU rounds
    torch.testing.assert_close(slope.double().cpu(), derivative, rtol=step, atol=max(torch.finfo(dtype).tiny, 5e-7))


@pytest.mark.parametrize("case", CASES)
def test_sums_and_derivatives_are_those_of_autograd(case, interpreted):
    total, slope, alone, nothing, scaled = interpreted[case]
    check(case, total, slope)
    assert alone == total
    assert nothing is None
    torch.testing.assert_close(
        scaled, (1000 * slope.float()).to(slope.dtype), rtol=torch.finfo(slope.dtype).eps, atol=1e-30
    )


@pytest.mark.parametrize("dtype", ["fp32", *(pytest.param(x, marks=pytest.mark.slow) for x in ("fp16", "bf16"))])
def test_the_kernels_compile_for_a_gpu(dtype, tmp_path):
    """What the interpreter runs, a compiler may still refuse; compiling for a GPU takes none."""
    child = run_child(COMPILING_CHILD, dtype, environment={"TRITON_CACHE_DIR": str(tmp_path)})
    assert child.stdout.split() == 3 * ["_quality_focal"] + 2 * ["_background_focal"] + ["_scaled"]


@on_gpu
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_computes_the_same(case):
    kernel, given, gamma = CASES[case]
    kernels = chunked._working_kernels(torch.device("cuda"), given[0].dtype)
    assert kernels is not None
    given = tuple(x.cuda() for x in given)
    total, slope = getattr(kernels, kernel)(*given, gamma=gamma, wanted=True)
    check(case, total, slope)
    assert torch.equal(total, getattr(kernels, kernel)(*given, gamma=gamma, wanted=False)[0])  # in every run


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_losses_on_a_gpu_equal_those_on_the_host(dtype):
    z, teacher = (logits(2 * 700 * 5, dtype, seed).view(2, 5, 700).transpose(1, 2) for seed in (0, 1))
    results = []
    for device in ("cpu", "cuda"):
        x = z.to(device).requires_grad_()
        loss = functional.cross_head_classification_loss(x, teacher.to(device), normalizer=7.0)
        loss.backward()
        results.append((loss.detach().cpu(), x.grad.cpu()))
    torch.testing.assert_close(results[1], results[0], rtol=max(torch.finfo(dtype).eps, 2e-5), atol=1e-6)


def test_without_a_working_triton_there_is_one_warning_and_another_way(monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no C compiler")))
    chunked._working_kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no C compiler.*Fix: install a C compiler"):
            assert chunked._working_kernels(torch.device("cuda"), torch.float32) is None
        assert chunked._working_kernels(torch.device("cuda"), torch.float32) is None  # and no second warning
    finally:
        chunked._working_kernels.cache_clear()
