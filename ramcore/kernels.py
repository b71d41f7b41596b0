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

extern "C" __global__ void sum_rows(  // a block 32 columns
    const float* x, float* out, int rows, int columns, int x_stride, int row_stride, int out_stride) {
    __shared__ float parts[32][32];
    int blocks = (columns + 31) / 32, r = blockIdx.x / blocks;
    int lane = threadIdx.x % 32, first = threadIdx.x / 32, column = blockIdx.x % blocks * 32 + lane;
    float sum = 0;
    if (column < columns)
        for (int row = first; row < rows; row += 32) sum += x[(i64)r * x_stride + (i64)row * row_stride + column];
    parts[first][lane] = sum;
    __syncthreads();
    if (first || column >= columns) return;
    for (int other = 1; other < 32; other++) sum += parts[other][lane];
    out[(i64)r * out_stride + column] = sum;
}

extern "C" __global__ void losses(  // a block a replicate; out: the fields of Losses
    const float* logits, const float* means, const float* baselines, float* to_logits, float* to_means,
    float* to_baselines, const float* samples, const float* std, const i64* labels, const float* uniform,
    float* rewards, float* out, int replicates, int steps, int batch, int classes, int decisions, int by_probability,
    int every, double mixing, double spread, double discount, double policy_weight) {
    __shared__ float parts[5][256];
    int r = blockIdx.x;
    float classification = 0, policy = 0, baseline = 0, last_reward = 0, accuracy = 0;
    for (int i = threadIdx.x; i < steps * batch; i += blockDim.x) {  // a decision for a class
        int b = i % batch, label = labels[r * batch + b], last = i / batch == steps - 1, best = 0;
        i64 row = (i64)r * steps * batch + i;
        const float* score = logits + row * classes;
        for (int c = 1; c < classes; c++) best = score[c] > score[best] ? c : best;
        float total = 0, mix = mixing, weight = ((last ? 1 - spread : 0) + spread / steps) / batch;
        for (int c = 0; c < classes; c++) total += expf(score[c] - score[best]);
        float log_total = score[best] + logf(total), log_true = score[label] - log_total, right = expf(log_true);
        float loss = -mix * log_true, advantage = 0;
        int chosen = label;
        if (mix < 1) {  // REINFORCE on a sampled class
            float cumulative = 0;
            chosen = 0;
            for (int c = 0; c < classes; c++) {
                cumulative += expf(score[c] - log_total);
                chosen += uniform[r * batch + b] >= cumulative;
            }
            chosen = min(chosen, classes - 1);
            advantage = (1 - mix) * ((chosen == label) - right);
            loss -= advantage * (score[chosen] - log_total);
        }
        for (int c = 0; c < classes; c++) {
            float p = expf(score[c] - log_total);
            to_logits[row * classes + c] = weight * (mix * (p - (c == label)) + advantage * (p - (c == chosen)));
        }
        rewards[row] = by_probability ? right : best == label;
        classification += weight * loss;
        if (last) last_reward += rewards[row] / batch, accuracy += (best == label) / (float)batch;
    }
    __syncthreads();
    float s = std[r];
    for (int b = threadIdx.x; b < batch; b += blockDim.x) {  // the decisions for the locations of an image
        float earned = 0;
        for (int i = decisions - 1; i >= 0; i--) {
            earned *= (float)discount;
            if (every || i == decisions - 1) earned += rewards[((i64)r * steps + steps - decisions + i) * batch + b];
            i64 at = ((i64)r * decisions + i) * batch + b;
            float error = earned - baselines[at], x = samples[2 * at] - means[2 * at];
            float y = samples[2 * at + 1] - means[2 * at + 1], slope = -(float)policy_weight * error / batch / (s * s);
            policy += error * (0.5f * (x * x + y * y) / (s * s) + 2 * logf(s) + 1.8378770664f) / batch;  // log(2 pi)
            baseline += error * error / (decisions * batch);
            to_means[2 * at] = slope * x, to_means[2 * at + 1] = slope * y;
            to_baselines[at] = -2 * error / (decisions * batch);
        }
    }
    float mine[5] = {classification, policy, baseline, last_reward, accuracy};
    for (int k = 0; k < 5; k++) parts[k][threadIdx.x] = mine[k];
    for (int half = blockDim.x / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x >= half) continue;
        for (int k = 0; k < 5; k++) parts[k][threadIdx.x] += parts[k][threadIdx.x + half];
    }
    if (threadIdx.x) return;
    out[r] = parts[0][0] + (float)policy_weight * parts[1][0] + parts[2][0];
    for (int k = 0; k < 5; k++) out[(k + 1) * replicates + r] = parts[k][0];
}

extern "C" __global__ void factors(  // a thread a replicate: what `adam` multiplies its gradients by, 0 once diverged
    const float* norm, const float* total, u8* alive, float* factor, float* steps, const float* rate, int replicates,
    double clip, double beta1, double beta2) {
    INDEX(replicates)
    alive[i] &= isfinite(norm[i] + total[i]);
    factor[i] = !alive[i] ? 0 : clip > 0 ? fminf((float)clip / norm[i], 1) : 1;
    if (i) return;
    *steps += 1;
    factor[replicates] = *rate / (1 - pow(beta1, (double)*steps));
    factor[replicates + 1] = 1 / sqrt(1 - pow(beta2, (double)*steps));
}

extern "C" __global__ void adam(  // a thread a weight
    float* weights, const float* gradient, float* mean, float* square, const float* factor, int replicates, int size,
    double beta1, double beta2, double epsilon) {
    int blocks = (size + blockDim.x - 1) / blockDim.x, r = blockIdx.x / blocks;
    int j = blockIdx.x % blocks * blockDim.x + threadIdx.x;
    if (j >= size) return;
    i64 i = (i64)r * size + j;
    float g = factor[r] ? factor[r] * gradient[i] : 0, m = mean[i], v = square[i];
    mean[i] = m += (float)(1 - beta1) * (g - m);
    square[i] = v = (float)beta2 * v + (float)(1 - beta2) * g * g;
    weights[i] -= factor[replicates] * m / (sqrtf(v) * factor[replicates + 1] + (float)epsilon);
}
"""
_NAMES = ["render", "read", "rectify", "paths", "policy", "sum_rows", "losses", "factors", "adam"]
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


def sum_rows(x: Tensor, out: Tensor) -> None:
    """out (R, 1, O) = the sum of x (R, N, O) over N."""
    replicates, rows, columns = x.shape
    sizes = [rows, columns, x.stride(0), x.stride(1), out.stride(0)]
    _launch("sum_rows", replicates * math.ceil(columns / 32) * 1024, [x, out, *sizes], block=1024)


def losses(
    leaves: list[Tensor],
    gradients: list[Tensor],
    samples: Tensor,
    std: Tensor,
    labels: Tensor,
    class_uniform: Tensor | None,
    flags: tuple[bool, bool],
    numbers: tuple[float, float, float, float],
) -> tuple[Tensor, ...]:
    """As `ramcore.loss.losses_with_gradients`: the fields of Losses, each (R,); fills the gradients of the leaves.

    leaves: the rollout's logits, means and baselines. flags: whether the reward is the true class's probability, and
    whether every glimpse has one. numbers: loss_mixing, step_supervision, discount and reinforce_weight.
    """
    replicates, steps, batch, classes = leaves[0].shape
    rewards = std.new_empty(replicates, steps, batch)
    out = std.new_empty(6, replicates)
    uniform = std if class_uniform is None else class_uniform.contiguous()
    tensors = [*leaves, *gradients, samples, std, labels, uniform, rewards, out]
    sizes = [replicates, steps, batch, classes, leaves[2].shape[1], *map(int, flags)]
    _launch("losses", replicates * _THREADS, [*tensors, *sizes, *map(float, numbers)])
    return out.unbind()


def adam(
    weights: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
    norm: Tensor,
    total: Tensor,
    alive: Tensor,
    clip: float,
) -> None:
    """One step of Adam, as in `Trainer.optimise`; a replicate that has diverged gets a gradient of 0.

    weights: (R, W), with .grad. state and group: torch.optim.Adam's. norm: (R,), of the gradients, which are clipped to
    `clip` if it is above 0. total: (R,), the losses. alive: (R,) bool, becomes false for one that has just diverged.
    """
    gradient = weights.grad
    assert gradient is not None
    replicates, size = weights.shape
    factor = norm.new_empty(replicates + 2)
    rate = torch.as_tensor(group["lr"], device=weights.device)
    betas = list(map(float, group["betas"]))
    _launch("factors", replicates, [norm, total, alive, factor, state["step"], rate, replicates, clip, *betas])
    tensors = [weights.detach(), gradient, state["exp_avg"], state["exp_avg_sq"], factor]
    threads = replicates * math.ceil(size / _THREADS) * _THREADS
    _launch("adam", threads, [*tensors, replicates, size, *betas, float(group["eps"])])


def _launch(name: str, threads: int, args: list[Any], block: int = _THREADS) -> None:
    device = args[0].device
    kernels = _kernels(device)
    assert kernels is not None
    kernels[name](grid=(math.ceil(threads / block), 1, 1), block=(block, 1, 1), args=args)


@functools.cache
def _kernels(device: torch.device) -> dict[str, Callable[..., None]] | None:
    """The compiled kernels; None where torch cannot compile them: its own operations do the work then, slower."""
    try:
        from torch.cuda._utils import _cuda_load_module, _get_nvrtc_library  # torch's own compiler, not public yet

        with torch.cuda.device(device):
            loaded = _cuda_load_module(_compiled(_get_nvrtc_library()), _NAMES)
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
