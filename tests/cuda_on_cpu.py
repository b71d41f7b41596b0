"""Runs the CUDA kernels of ramcore on the CPU: their source, compiled as C++, with CUDA's words defined.

Blocks and threads are taken in turn. The 32 threads of a warp that exchange numbers run as threads with a barrier.
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
#include <thread>
#include <vector>
using std::max; using std::min;
struct Index { int x; };
static thread_local Index blockIdx, threadIdx;
static Index blockDim;
static float exchanged[32];
static std::barrier<> *warp;
#define __global__
#define __device__ static inline
static float __fadd_rn(float a, float b) { volatile float sum = a + b; return sum; }
static float __fmul_rn(float a, float b) { volatile float product = a * b; return product; }
static float __shfl_xor_sync(unsigned, float value, int step) {
    exchanged[threadIdx.x % 32] = value;
    warp->arrive_and_wait();
    float other = exchanged[threadIdx.x % 32 ^ step];
    warp->arrive_and_wait();
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
_WARPS = """
extern "C" void run_{name}(int blocks, int threads, {parameters}) {{
    blockDim.x = threads;
    for (int block = 0; block < blocks; block++)
        for (int first = 0; first < threads; first += 32) {{
            std::barrier<> all(32);
            warp = &all;
            std::vector<std::thread> lanes;
            for (int lane = 0; lane < 32; lane++) lanes.emplace_back([=] {{
                blockIdx.x = block, threadIdx.x = first + lane;
                cuda_{name}({names});
            }});
            for (auto& lane : lanes) lane.join();
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
            template = _WARPS if "__shfl" in body else _IN_TURN
            source = source.replace(f"void {name}(", f"void cuda_{name}(")  # `read` is a word of C's own
            source += template.format(name=name, parameters=parameters, names=names)
        (folder / "kernels.cpp").write_text(source)
        command = ["g++", "-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-w"]
        subprocess.run([*command, "-o", library, folder / "kernels.cpp"], check=True)
    loaded, called = ctypes.CDLL(str(library)), Counter[str]()

    def launcher(name: str) -> Callable[..., None]:
        def launch(grid: tuple[int, ...], block: tuple[int, ...], args: list[Any]) -> None:
            assert all(arg.stride(-1) == 1 or arg.shape[-1] == 1 for arg in args if isinstance(arg, Tensor))
            called[name] += 1
            values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a) for a in args]
            getattr(loaded, f"run_{name}")(grid[0], block[0], *values)

        return launch

    names = ("render", "read", "rectify", "paths", "policy")
    launchers = {name: launcher(name) for name in names}
    monkeypatch.setattr(kernels, "_kernels", lambda device: launchers)
    monkeypatch.setattr(kernels, "usable", lambda device: device == torch.device("cpu"))
    return called
