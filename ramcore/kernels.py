"""CUDA kernels for what is many small operations in torch: on a GPU a step waits for launches, not for arithmetic.

Each function does what the torch code beside its one caller does, and tests marked gpu hold the two together: `render`
and `read` give the same bits. The source is compiled by NVRTC, which comes with torch: no compiler is needed. Tensors
are float32 and rows (the last dimension) contiguous; the leading dimension, of replicates, may have any stride.

R: replicates, B: images of a batch, S: canvas side, K: scales, P: patch side, G: units of a glimpse path.
"""

from __future__ import annotations

import ctypes
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_SOURCE = r"""
typedef unsigned char u8;
typedef unsigned long long u64;
typedef long long i64;
#define INDEX(n) i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; if (i >= (n)) return;

__device__ u64 mix(u64 x) {  // ramcore.rng
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
    return x ^ (x >> 31);
}

extern "C" __global__ void render(  // a thread a pixel
    const u8* images, const i64* index, const i64* keys, u8* out, int count, int batch, int side, int clutter,
    int digit, int patch, int counters, int num_images, int num_keys) {
    INDEX((i64)count * side * side)
    int canvas = i / (side * side), pixel = i % (side * side), y = pixel / side, x = pixel % side;
    i64 image = index[canvas];
    u64 key = keys[num_keys == 1 ? 0 : canvas / batch];
    auto draw = [&](int d, int high) {
        u64 bits = mix(key + (u64)(image * counters + d) * 0x9E3779B97F4A7C15ULL);
        return (int)(((bits >> 33) * (u64)high) >> 31);
    };
    int row = y - draw(0, side - digit + 1), column = x - draw(1, side - digit + 1);
    int area = digit * digit;
    u8 value = 0;
    if (row >= 0 && row < digit && column >= 0 && column < digit) value = images[image * area + row * digit + column];
    for (int c = 0; c < clutter; c++) {
        int to_row = y - draw(2 + 3 * clutter + c, side - patch + 1);
        int to_column = x - draw(2 + 4 * clutter + c, side - patch + 1);
        if (to_row < 0 || to_row >= patch || to_column < 0 || to_column >= patch) continue;
        i64 other = (image + 1 + draw(2 + c, num_images - 1)) % num_images;
        int row_there = to_row + draw(2 + clutter + c, digit - patch + 1);
        int column_there = to_column + draw(2 + 2 * clutter + c, digit - patch + 1);
        u8 pasted = images[other * area + row_there * digit + column_there];
        value = pasted > value ? pasted : value;
    }
    out[i] = value;
}

extern "C" __global__ void read(  // a thread a value
    const u8* canvases, const float* location, const float* weight, float* out, int replicates, int batch, int side,
    int scales, int patch, int factor, int shared, int location_stride, int out_stride) {
    int size = scales * patch * patch;
    INDEX((i64)replicates * batch * size)
    int r = i / ((i64)batch * size), b = i / size % batch, value = i % size;
    int k = value / (patch * patch), row = value / patch % patch, column = value % patch, width = 1;
    for (int j = 0; j < k; j++) width *= factor;
    const float* at = location + (i64)r * location_stride + 2 * b;
    int corner = (patch * width) / 2;
    float half = side / 2.0f;
    int left = (int)floorf(__fadd_rn(__fmul_rn(__fadd_rn(at[0], 1.0f), half), 0.5f)) + column * width - corner;
    int top = (int)floorf(__fadd_rn(__fmul_rn(__fadd_rn(at[1], 1.0f), half), 0.5f)) + row * width - corner;
    const u8* canvas = canvases + ((i64)(shared ? 0 : r) * batch + b) * side * side;
    int sum = 0;
    for (int y = max(top, 0); y < min(top + width, side); y++)
        for (int x = max(left, 0); x < min(left + width, side); x++) sum += canvas[y * side + x];
    out[(i64)r * out_stride + (i64)b * size + value] = __fmul_rn((float)sum, weight[value]);
}

extern "C" __global__ void rectify(  // out = Rect(out + bias + other)
    float* out, const float* bias, const float* other, int replicates, int rows, int columns, int stride,
    int bias_stride, int other_stride) {
    INDEX((i64)replicates * rows * columns)
    int r = i / ((i64)rows * columns), column = i % columns;
    float* at = out + (i64)r * stride + i % ((i64)rows * columns);
    float value = *at + bias[(i64)r * bias_stride + column];
    if (other_stride) value += other[(i64)r * other_stride + column];
    *at = value < 0 ? 0 : value;
}

extern "C" __global__ void paths(  // the what path, of which out has the product, and the where path
    float* out, const float* what_bias, const float* location, const float* where, const float* where_bias,
    int replicates, int rows, int units, int stride, int what_bias_stride, int location_stride, int where_stride,
    int where_bias_stride) {
    INDEX((i64)replicates * rows * 2 * units)
    int r = i / ((i64)rows * 2 * units), row = i / (2 * units) % rows, column = i % (2 * units);
    float* at = out + (i64)r * stride + (i64)row * 2 * units + column;
    float value;
    if (column < units) {
        value = *at + what_bias[(i64)r * what_bias_stride + column];
    } else {
        int unit = column - units;
        const float* place = location + (i64)r * location_stride + 2 * row;
        const float* weight = where + (i64)r * where_stride + unit;
        value = where_bias[(i64)r * where_bias_stride + unit] + place[0] * weight[0] + place[1] * weight[units];
    }
    *at = value < 0 ? 0 : value;
}

extern "C" __global__ void policy(  // a warp a row: mean = tanh(x W + x2 W2 + bias), the sample, and its clipped place
    const float* x, const float* x2, const float* weight, const float* bias, const float* noise, const float* std,
    float* mean, float* sample, float* location, int replicates, int rows, int inputs, int inputs2, int x_stride,
    int x2_stride, int weight_stride, int bias_stride, int noise_stride, int mean_stride, int location_stride) {
    int lane = threadIdx.x % 32;
    i64 i = (blockIdx.x * (i64)blockDim.x + threadIdx.x) / 32;
    if (i >= (i64)replicates * rows) return;
    int r = i / rows, row = i % rows;
    const float* w = weight + (i64)r * weight_stride;
    float a = 0, b = 0;
    for (int n = lane; n < inputs; n += 32) {
        float value = x[(i64)r * x_stride + (i64)row * inputs + n];
        a += value * w[2 * n], b += value * w[2 * n + 1];
    }
    for (int n = lane; n < inputs2; n += 32) {
        float value = x2[(i64)r * x2_stride + (i64)row * inputs2 + n];
        a += value * w[2 * (inputs + n)], b += value * w[2 * (inputs + n) + 1];
    }
    for (int step = 16; step; step /= 2) {
        a += __shfl_xor_sync(0xffffffff, a, step);
        b += __shfl_xor_sync(0xffffffff, b, step);
    }
    if (lane > 1) return;
    float m = tanhf((lane ? b : a) + bias[(i64)r * bias_stride + lane]);
    float s = noise_stride ? m + noise[(i64)r * noise_stride + 2 * row + lane] * std[r] : m;
    mean[(i64)r * mean_stride + 2 * row + lane] = m;
    sample[(i64)r * mean_stride + 2 * row + lane] = s;
    location[(i64)r * location_stride + 2 * row + lane] = fminf(fmaxf(s, -1), 1);
}
"""
_THREADS = 256  # of a block


def usable(device: torch.device) -> bool:
    """Whether these kernels run on a device: a CUDA GPU with a torch that compiles them."""
    return device.type == "cuda" and _kernels(device) is not None


def wait_for(table: Tensor) -> None:
    """Wait until a table that is kept between calls is filled: another stream may be the next to read it."""
    if table.is_cuda:
        torch.cuda.current_stream(table.device).synchronize()


def render(
    images: Tensor, index: Tensor, keys: Tensor, canvas: int, clutter: int, sizes: tuple[int, int, int]
) -> Tensor:
    """As `TaskData.render`. sizes: of a digit and of a clutter patch in pixels, and the counters of an image."""
    out = torch.empty(*index.shape, canvas, canvas, dtype=torch.uint8, device=index.device)
    digit, patch, counters = sizes
    args = [images, index.contiguous(), keys, out, index.numel(), index.shape[-1], canvas, clutter]
    _launch("render", out.numel(), [*args, digit, patch, counters, len(images), len(keys)])
    return out


def read(canvases: Tensor, location: Tensor, weight: Tensor, out: Tensor, scales: int, patch: int, factor: int) -> None:
    """As `Retina.read`. canvases: (R or 1, B, S, S) uint8; location: (R, B, 2); weight: (K * P * P,)."""
    replicates, batch = location.shape[:2]
    sizes = [replicates, batch, canvases.shape[-1], scales, patch, factor, int(len(canvases) == 1)]
    args = [canvases, location, weight, out, *sizes, location.stride(0), out.stride(0)]
    _launch("read", replicates * out[0].numel(), args)


def rectify(out: Tensor, bias: Tensor, other: Tensor | None = None) -> None:
    """out (R, N, O) = Rect(out + bias + other), biases (R, 1, O)."""
    second, stride = (out, 0) if other is None else (other, other.stride(0))
    _launch("rectify", out.numel(), [out, bias, second, *out.shape, out.stride(0), bias.stride(0), stride])


def paths(out: Tensor, what_bias: Tensor, location: Tensor, where: Tensor, where_bias: Tensor) -> None:
    """Finish the paths (R, N, 2 * G), whose first half holds the product of what: add its bias, make where, rectify."""
    tensors = [out, what_bias, location, where, where_bias]
    sizes = [*out.shape[:2], out.shape[-1] // 2]
    _launch("paths", out.numel(), [*tensors, *sizes, *(t.stride(0) for t in tensors)])


def policy(
    products: list[tuple[Tensor, Tensor]],
    bias: Tensor,
    noise: Tensor | None,
    std: Tensor,
    mean: Tensor,
    sample: Tensor,
    location: Tensor,
) -> None:
    """The location policy: fills mean, sample and location, each (R, N, 2).

    products: one or two of x (R, N, I) and its weights (R, I, 2), which lie behind one another. noise: (R, N, 2).
    """
    (x, weight), (x2, _) = products[0], products[-1]
    inputs2 = x2.shape[-1] if len(products) == 2 else 0
    noised, noise_stride = (mean, 0) if noise is None else (noise, noise.stride(0))
    tensors = [x, x2, weight, bias, noised, std, mean, sample, location]
    strides = [x.stride(0), x2.stride(0), weight.stride(0), bias.stride(0), noise_stride, mean.stride(0)]
    sizes = [*mean.shape[:2], x.shape[-1], inputs2, *strides, location.stride(0)]
    _launch("policy", 32 * mean.shape[0] * mean.shape[1], [*tensors, *sizes])


def _launch(name: str, threads: int, args: list[Any]) -> None:
    device = args[0].device
    kernels = _kernels(device)
    assert kernels is not None
    kernels[name](grid=(math.ceil(threads / _THREADS), 1, 1), block=(_THREADS, 1, 1), args=args)


@functools.cache
def _kernels(device: torch.device) -> dict[str, Callable[..., None]] | None:
    """The compiled kernels; None where torch cannot compile them: its own operations do the work then, slower."""
    try:
        from torch.cuda._utils import _cuda_load_module, _get_nvrtc_library  # torch's own compiler, not public yet

        with torch.cuda.device(device):
            loaded = _cuda_load_module(
                _compiled(_get_nvrtc_library()), ["render", "read", "rectify", "paths", "policy"]
            )
        assert isinstance(loaded, dict)
        return dict(loaded)
    except (ImportError, RuntimeError, OSError) as error:
        warnings.warn(f"torch compiles no CUDA kernels here, so a step is slower: {error}", stacklevel=2)
        return None


def _compiled(nvrtc: ctypes.CDLL) -> bytes:
    """The kernels' machine code for the present device. torch's own wrapper wants CUDA's headers, which these do not.

    Raises RuntimeError.
    """
    major, minor = torch.cuda.get_device_capability()
    options = (ctypes.c_char_p * 1)(f"--gpu-architecture=sm_{major}{minor}".encode())
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), _SOURCE.encode(), b"ramcore.cu", 0, None, None)
    failed = nvrtc.nvrtcCompileProgram(program, 1, options)
    part = "ProgramLog" if failed else "CUBIN"
    getattr(nvrtc, f"nvrtcGet{part}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{part}")(program, text)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise RuntimeError(text.value.decode())
    return text.raw
