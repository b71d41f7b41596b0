"""Runs the CUDA kernels of ramcore on the CPU: their source, compiled as C++, with CUDA's words defined.

Blocks and threads are taken in turn. Where the threads of a block exchange numbers, they run as threads with barriers.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ramcore import kernels

_CUDA = r"""
#include <algorithm>
#include <barrier>
#include <cmath>
#include <memory>
#include <thread>
#include <vector>
using std::max; using std::min; using std::isfinite;
struct Index { int x; };
static thread_local Index blockIdx, threadIdx;
static Index blockDim;
static float exchanged[1024];
static std::vector<std::unique_ptr<std::barrier<>>> warps;
static std::barrier<> *block_barrier;
#define __global__
#define __shared__ static
#define __device__ static inline
static void __syncthreads() { block_barrier->arrive_and_wait(); }
static float __fadd_rn(float a, float b) { volatile float sum = a + b; return sum; }
static float __fmul_rn(float a, float b) { volatile float product = a * b; return product; }
static float __shfl_xor_sync(unsigned, float value, int step) {
    auto& warp = *warps[threadIdx.x / 32];
    exchanged[threadIdx.x] = value;
    warp.arrive_and_wait();
    float other = exchanged[threadIdx.x ^ step];
    warp.arrive_and_wait();
    return other;
}
"""
_IN_TURN = """
extern "C" void run_{name}(int blocks, int threads, {parameters}) {{
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) cuda_{name}({names});
}}
"""
_TOGETHER = """
extern "C" void run_{name}(int blocks, int threads, {parameters}) {{
    blockDim.x = threads;
    for (int block = 0; block < blocks; block++) {{
        std::barrier<> all(threads);
        block_barrier = &all;
        warps.clear();
        for (int first = 0; first < threads; first += 32) warps.push_back(std::make_unique<std::barrier<>>(32));
        std::vector<std::thread> running;
        for (int thread = 0; thread < threads; thread++) running.emplace_back([=] {{
            blockIdx.x = block, threadIdx.x = thread;
            cuda_{name}({names});
            warps[thread / 32]->arrive_and_drop();
            block_barrier->arrive_and_drop();
        }});
        for (auto& thread : running) thread.join();
    }}
}}
"""


def use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Have ramcore call its kernels on the CPU; returns how often each is called. Skips without a C++ compiler."""
    if shutil.which("g++") is None:
        pytest.skip("no g++, which compiles the CUDA kernels for the CPU")
    library = folder / "kernels.so"
    if not library.exists():
        source = _CUDA + kernels._SOURCE
        for name, parameters in re.findall(r"__global__ void (\w+)\((?:.*\n)?([^)]*)\)", kernels._SOURCE):
            body = kernels._SOURCE.split(f"void {name}(")[1].split("extern")[0]
            names = ", ".join(re.findall(r"(\w+)(?:,|$)", parameters.strip()))
            template = _TOGETHER if "__shfl" in body or "__syncthreads" in body else _IN_TURN
            source = source.replace(f"void {name}(", f"void cuda_{name}(")  # `read` is a word of C's own
            source += template.format(name=name, parameters=parameters, names=names)
        (folder / "kernels.cpp").write_text(source)
        command = ["g++", "-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-w"]
        subprocess.run([*command, "-o", library, folder / "kernels.cpp"], check=True)
    loaded, called = ctypes.CDLL(str(library)), Counter[str]()

    def launcher(name: str) -> Callable[..., None]:
        def launch(grid: tuple[int, ...], block: tuple[int, ...], args: list[Any]) -> None:
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            assert all(not x.ndim or x.stride(-1) == 1 or x.shape[-1] == 1 for x in tensors)
            called[name] += 1
            kinds = {int: ctypes.c_int, float: ctypes.c_double}
            values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else kinds[type(a)](a) for a in args]
            getattr(loaded, f"run_{name}")(grid[0], block[0], *values)

        return launch

    launchers = {name: launcher(name) for name in kernels._NAMES}
    monkeypatch.setattr(kernels, "_kernels", lambda device: launchers)
    monkeypatch.setattr(kernels, "usable", lambda device: device == torch.device("cpu"))
    return called
