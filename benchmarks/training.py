"""How fast ramcore trains, at 6 glimpses, 12x12, 3 scales, hidden 256, batch 100, canvas 60x60.

    python -m benchmarks.training                                      # CPU, one thread
    python -m benchmarks.training --quick                              # a check, not a measurement
    python -m benchmarks.training --device cuda --rounds 3 --out gpu.json    # a GPU, in under 4 minutes

Three cases are timed in turns, round after round, so that noise of the machine affects all of them. Ratios are medians
of the rounds' ratios.

(a) ramcore's training step for R seeds at once, from random numbers and canvases to Adam;
(b) `benchmarks.plain_ram`: the same model as public repositories write it, on canvases that are already rendered;
(c) the floor: only the large matrix products of ramcore's step for one seed, at their shapes, on contiguous operands.
    Products with 2, 10 or 1 columns or rows (where, location, action, baseline) are left out: under 1 % of the
    operations.

The images are random, so nothing is downloaded: the speed depends only on their number and size. The weights stay close
to their initial values. In a long run, Adam's moments of idle units become denormal; the trainer flushes these to zero,
the plain RAM does not.

With --device cuda it also prints: kernels a step; the share of the card's fp32 rate, measured on the spot, that the
products of the tuned recipe's step reach; an epoch, and evaluation's part of it; and the steps a second of 1 to 16
trials that share the card in three ways (`benchmarks.packing`).

Tried in ramcore on a CPU, each alone, without a clear gain: the pyramid in cache-sized strips; torch.take or indexing
for index_select; transposed copies of the weights for the backward products; torch.mm per replicate for the batched
product; torch._foreach_norm.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import math
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.packing import packing
from benchmarks.plain_ram import PlainTrainer
from benchmarks.synthetic import EVALUATION_IMAGES, synthetic
from ramcore.config import Config
from ramcore.data import TaskData
from ramcore.evaluation import evaluate
from ramcore.recipes import TUNED
from ramcore.retina import Retina
from ramcore.rng import Stream, key
from ramcore.trainer import Trainer

CONFIG = Config()
TRAIN_IMAGES = 50_000
PLAIN, FLOOR = "plain RAM", "matrix products alone"

Cases = dict[str, Callable[[], object]]  # what is timed, by name


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure and print the figures, write them to --out, and return them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description="How fast ramcore trains.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds, for the medians (default 15)")
    parser.add_argument("--quick", action="store_true", help="3 short rounds, fewer images: a check, not a measurement")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use; found none")
    torch.set_num_threads(args.threads)
    rounds, seconds, images = (3, 0.05, 2_000) if args.quick else (args.rounds, 0.3, TRAIN_IMAGES)
    device = torch.device(args.device)

    data = synthetic(CONFIG.task, images)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine(),
        "threads": args.threads,
        "torch": torch.__version__,
        "rounds": rounds,
        "steps": step_times(data.to(device), device, rounds, seconds),
        "set_up_seconds": set_up_seconds(data, device),
        "rendering_share": rendering_share(images, device, rounds),
        "evaluation_images_per_second": evaluation_speed(data.to(device), device),
        "retina_ms_per_100_images": retina_times(device, rounds),
        "memory_mib": memory_mib(device),
        "operations": operations(data.to(device), device),
    }
    if args.device == "cuda":
        result["tuned"] = tuned_step(images, rounds)
        result["epoch"] = epoch_seconds(images)
        result["packing"] = packing(seconds=4 * seconds)
    print(table(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


def step_times(data: TaskData, device: torch.device, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Medians: milliseconds a step and seed, and ratios to the plain RAM and to the floor."""
    cases: Cases = {PLAIN: plain_step(data, device), FLOOR: floor(device)}
    seeds = {PLAIN: 1, FLOOR: 1}
    for count in (1, 2, 8, 32) if device.type == "cuda" else (1, 2, 8):
        name = f"ramcore, {count} seed{'s' if count > 1 else ''}"
        cases[name], seeds[name] = ramcore_step(data, device, count), count
    times = interleaved(cases, device, rounds, seconds)
    per_seed = {name: [1e3 * t / seeds[name] for t in values] for name, values in times.items()}
    return {
        name: {
            "ms": statistics.median(values),
            "images_x_seeds_per_second": 1e3 * CONFIG.batch_size / statistics.median(values),
            "times_plain": _ratio(per_seed[PLAIN], values),
            "share_of_floor": _ratio(per_seed[FLOOR], values),
        }
        for name, values in per_seed.items()
    }


def _ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def interleaved(cases: Cases, device: torch.device, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds a call of each case, a value a round. A round times every case for about `seconds`."""
    repeats = {}
    for name, case in cases.items():
        _timed(case, 3, device)
        repeats[name] = max(1, round(seconds / _timed(case, 2, device)))
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            times[name].append(_timed(case, repeats[name], device))
    return times


def _timed(case: Callable[[], object], repeats: int, device: torch.device) -> float:
    _synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        case()
    _synchronize(device)
    return (time.perf_counter() - started) / repeats


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ramcore_step(
    data: TaskData, device: torch.device, replicates: int, config: Config | None = None
) -> Callable[[], object]:
    """One training step of the trainer, with its random numbers."""
    trainer = Trainer(config or CONFIG, data, seeds=range(replicates), device=device)
    draws = itertools.chain.from_iterable(map(trainer.draws, itertools.count()))
    return lambda: trainer.step(next(draws))


def plain_step(data: TaskData, device: torch.device) -> Callable[[], object]:
    """One training step of the plain RAM, on a batch that is already rendered."""
    index = torch.arange(CONFIG.batch_size, device=device)[None]
    keys = data.placement_keys("train", torch.zeros(1, dtype=torch.int64, device=device), 0)
    images = data.render("train", index, keys)[0, :, None].float() / 255
    labels = data.train.labels[index[0]]
    trainer = PlainTrainer(CONFIG, device)
    return lambda: trainer.step(images, labels)


def floor(device: torch.device) -> Callable[[], object]:
    """The large matrix products of one step for one seed, in T glimpses at B images.

    Forward: for each of the layers what, code and input T products of B rows, for recurrent T - 1 (the first state is
    zero). Backward: the gradient of each weight is one product of T * B (or T - 1 times B) rows, as are the gradients
    of the paths and of the code; the gradient of the state is T - 1 products of B rows.
    """
    steps, batch, hidden, path = CONFIG.num_glimpses, CONFIG.batch_size, CONFIG.hidden_size, CONFIG.glimpse_size
    # what, code, input, recurrent: (inputs, outputs, glimpses)
    what, code = (CONFIG.glimpse_pixels, path, steps), (2 * path, hidden, steps)
    sizes = [what, code, (hidden, hidden, steps), (hidden, hidden, steps - 1)]
    random = partial(torch.randn, device=device)
    layers = [(random(t * batch, i), random(i, o), random(t * batch, o)) for i, o, t in sizes]

    def products() -> None:
        for x, weight, gradient in layers:
            for rows in x.split(batch):
                torch.mm(rows, weight)
            torch.mm(x.T, gradient)
        for _, weight, gradient in layers[1:3]:
            torch.mm(gradient, weight.T)
        _, weight, gradient = layers[3]
        for rows in gradient.split(batch):
            torch.mm(rows, weight.T)

    return products


def set_up_seconds(data: TaskData, device: torch.device) -> float:
    """Seconds from data in memory to a trainer ready for its first step."""
    started = time.perf_counter()
    trainer = Trainer(CONFIG, data, seeds=(0,), device=device)
    next(trainer.draws(0))
    _synchronize(device)
    return time.perf_counter() - started


def operations(data: TaskData, device: torch.device, config: Config = TUNED) -> dict[str, Any]:
    """Of one training step of two seeds of the tuned recipe: operations (kernels on a GPU), and MACs of its products.

    Those that only make a view of memory, or take some, are not counted.
    """
    trainer = Trainer(config, data, seeds=(0, 1), device=device)
    draws = next(trainer.draws(0))
    trainer.optimise(draws)
    with FlopCounterMode(display=False, custom_mapping=PRODUCTS) as flops:
        trainer.optimise(draws)
    if device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            trainer.optimise(draws)
            torch.cuda.synchronize()
        names = [event.name for event in profiled.events() or () if event.device_type.name == "CUDA"]
        kernels = collections.Counter(name for name in names if not name.startswith(("Mem", "cuda")))
        return {"kernels": sum(kernels.values()), "macs": flops.get_total_flops() / 2, "names": dict(kernels)}
    with _Operations() as counted:
        trainer.optimise(draws)
    return {"operations": counted.count, "macs": flops.get_total_flops() / 2}


class _Operations(TorchDispatchMode):
    """Counts the operations that compute or copy."""

    _FREE = (
        "view",
        "expand",
        "select",
        "slice",
        "transpose",
        "split",
        "unbind",
        "detach",
        "alias",
        "empty",
        "unsqueeze",
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and not any(word in func.name() for word in self._FREE):
            self.count += 1
        return func(*args, **(kwargs or {}))


def _in_place(out: Any, x: Any, weight: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * math.prod(x) * weight[-1]


PRODUCTS = {torch.ops.aten.baddbmm_: _in_place}  # for torch's counter of operations, which does not know it


def tuned_step(images: int, rounds: int) -> dict[str, Any]:
    """Milliseconds a step of the tuned recipe by the number of seeds, the card's fp32 rate, and the share of it."""
    device = torch.device("cuda")
    square = torch.randn(2, 8192, 8192, device=device)
    cases: Cases = {"fp32": lambda: torch.mm(square[0], square[1])}
    data = synthetic("translated", images).to(device)
    macs = operations(data, device)["macs"] / 2
    seeds = {f"{count} seeds": count for count in (1, 2, 3, 8, 32)}
    cases |= {name: ramcore_step(data, device, count, TUNED) for name, count in seeds.items()}
    times = {name: statistics.median(values) for name, values in interleaved(cases, device, rounds, 0.1).items()}
    rate = 8192**3 / times["fp32"]
    return {
        "fp32_macs_per_second": rate,
        "ms": {name: 1e3 * times[name] for name in seeds},
        "share_of_fp32": {name: count * macs / times[name] / rate for name, count in seeds.items()},
    }


def epoch_seconds(images: int) -> dict[str, float]:
    """Seconds of an epoch of two seeds of the tuned recipe, and of its evaluation, of 10,000 images."""
    device = torch.device("cuda")
    data = synthetic("translated", images, evaluated=10_000).to(device)
    trainer = Trainer(TUNED, data, seeds=(0, 1), device=device)
    trainer.epoch()
    case = partial(evaluate, trainer.model, TUNED, (0, 1), data, "validation", every_step=False)
    whole = statistics.median(trainer.epoch().seconds for _ in range(3))
    return {"seconds": whole, "evaluation_seconds": statistics.median(_timed(case, 1, device) for _ in range(5))}


def rendering_share(images: int, device: torch.device, rounds: int) -> dict[str, float]:
    """Share of a training step of one seed that goes into drawing canvases, places and clutter."""
    shares = {}
    for task in ("translated", "cluttered"):
        data = synthetic(task, images).to(device)
        seeds = torch.zeros(1, dtype=torch.int64, device=device)
        index = torch.randint(0, images, (1, CONFIG.batch_size), device=device)
        keys = key(seeds, Stream.PLACEMENT, 0)
        trainer = Trainer(replace(CONFIG, task=task), data, device=device)
        step = partial(trainer.step, next(trainer.draws(0)))
        cases: Cases = {"render": partial(data.render, "train", index, keys), "step": step}
        times = interleaved(cases, device, rounds, 0.05)
        shares[task] = _ratio(times["render"], times["step"])
    return shares


def evaluation_speed(data: TaskData, device: torch.device) -> float:
    """Images a second, one seed, at the policy's means."""
    trainer = Trainer(CONFIG, data, device=device)
    case = partial(evaluate, trainer.model, CONFIG, (0,), data, "validation", every_step=False)
    case()
    return EVALUATION_IMAGES / statistics.median(_timed(case, 1, device) for _ in range(5))


def retina_times(device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds a batch at three canvas sizes, of the pyramid (once a batch) and of a glimpse."""
    cases: Cases = {}
    sizes, parts = (28, 60, 100), ("pyramid", "glimpse")
    for size in sizes:
        retina = Retina(patch_size=12, num_scales=3, canvas_size=size)
        images = torch.randint(0, 256, (1, CONFIG.batch_size, size, size), dtype=torch.uint8, device=device)
        location = torch.rand(1, CONFIG.batch_size, 2, device=device) * 2 - 1
        cases[f"pyramid {size}"] = partial(retina.pyramid, images)
        cases[f"glimpse {size}"] = partial(retina.read, retina.pyramid(images), location)
    times = interleaved(cases, device, rounds, 0.02)
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    return {str(size): {part: medians[f"{part} {size}"] for part in parts} for size in sizes}


def memory_mib(device: torch.device) -> float:
    """Peak memory so far, of the GPU or resident of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def table(result: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [
        f"{result['device']}, CPU threads: {result['threads']}, torch {result['torch']}, "
        f"medians of {result['rounds']} interleaved rounds",
        "6 glimpses, 12x12, 3 scales, hidden 256, batch 100, canvas 60x60",
        "",
        f"{'training step':24}{'ms a step':>12}{'images x seeds':>16}{'times':>12}{'share of':>12}",
        f"{'':24}{'and seed':>12}{'a second':>16}{'plain RAM':>12}{'floor':>12}",
    ]
    for name, (ms, images, plain, share) in ((name, row.values()) for name, row in result["steps"].items()):
        lines.append(f"{name:24}{ms:12.2f}{images:16,.0f}{plain:12.2f}{share:12.2f}")
    shares = result["rendering_share"]
    lines += [
        "",
        f"setting up a run, data in memory      {result['set_up_seconds']:8.3f} s",
        f"drawing translated canvases           {100 * shares['translated']:8.1f} % of a step",
        f"drawing cluttered canvases            {100 * shares['cluttered']:8.1f} % of a step",
        f"evaluation                            {result['evaluation_images_per_second']:8,.0f} images/s",
        f"peak memory                           {result['memory_mib']:8,.0f} MiB",
        "",
        "retina, ms a batch of 100      canvas    pyramid (once)    glimpse (each)",
    ]
    for size, row in result["retina_ms_per_100_images"].items():
        lines.append(f"{size + ' x ' + size:>37}{row['pyramid']:18.2f}{row['glimpse']:18.2f}")
    counted = result["operations"]
    kind, count = next(iter(counted.items()))
    lines += ["", f"{kind} a step, tuned recipe, 2 seeds: {count}"]
    if "packing" in result:
        lines += _gpu_lines(result)
    return "\n".join(lines)


def _gpu_lines(result: dict[str, Any]) -> list[str]:
    tuned, epoch = result["tuned"], result["epoch"]
    lines = ["", f"tuned recipe, translated canvases{'ms a step':>15}{'share of fp32':>15}"]
    for name, ms in tuned["ms"].items():
        lines.append(f"{name:>33}{ms:15.3f}{tuned['share_of_fp32'][name]:15.3f}")
    share = epoch["evaluation_seconds"] / epoch["seconds"]
    lines += [
        f"fp32 products: {2e-12 * tuned['fp32_macs_per_second']:.1f} TFLOP/s",
        f"an epoch of 2 seeds: {epoch['seconds']:.3f} s, {share:.1%} of it evaluation",
        "",
        f"{'training steps a second of all trials, trials at a time':58}"
        + "".join(f"{n:>8}" for n in result["packing"]["processes"]),
    ]
    for way, rates in result["packing"].items():
        lines.append(f"{way:58}" + "".join(f"{rate:8,.0f}" for rate in rates.values()))
    return lines


if __name__ == "__main__":
    main()
