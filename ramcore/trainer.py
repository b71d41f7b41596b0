"""The trainer: R replicates of one configuration, one a seed, trained in one step.

`Trainer.epoch()` trains one epoch and returns its metrics; the caller reports, saves and stops. All random numbers are
functions of (seed, epoch, step) (see `ramcore.rng`). So the trainer's state is the weights, Adam's moments and the
number of epochs done, and a replicate does not depend on the others.

R replicates, B images of a batch, N training images.
"""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ramcore import kernels
from ramcore.config import Config
from ramcore.data import SplitName, TaskData
from ramcore.errors import UserError
from ramcore.evaluation import Evaluation, build_model, evaluate, policy_noise, whole_image_input
from ramcore.layers import gradient_of
from ramcore.loss import Losses, hybrid_loss, losses_with_gradients, needs_every_step
from ramcore.model import RAM, Rollout
from ramcore.rng import Stream, key, permutation, uniform


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """Metrics of one epoch, a value a seed. A seed that has diverged has NaN."""

    epoch: int  # the first is 1
    seconds: float  # training and validation
    seeds: tuple[int, ...]
    train_loss: tuple[float, ...]  # mean classification loss, nats
    train_accuracy: tuple[float, ...]  # of sampled rollouts while training, fraction
    reward: tuple[float, ...]  # mean, at the last glimpse
    baseline_error: tuple[float, ...]  # mean squared
    gradient_norm: tuple[float, ...]  # mean, before clipping
    val_loss: tuple[float, ...]  # mean cross-entropy, nats
    val_accuracy: tuple[float, ...]  # fraction
    diverged: tuple[bool, ...]  # a loss or gradient was not finite, in this epoch or before

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EpochMetrics:
        """The inverse of `to_dict`, also after JSON has turned tuples into lists."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in values.items()}
        return cls(**fields)


_STEPS_DRAWN = 50  # steps whose random numbers are drawn at once: far cheaper than step by step
_CAPTURING = threading.Lock()  # CUDA lets no other thread begin to capture a graph, which waits for the whole GPU
_CNN_CHANNELS = 20  # maps of the cnn's second convolution; dropout drops whole maps


@contextmanager
def _denormals_as_zero() -> Iterator[None]:
    """Flush denormals to zero. Adam's moments of idle units become denormal, which slows a training step by 10 %."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def _products(config: Config, device: torch.device) -> Iterator[None]:
    """Compute a GPU's matrix products and convolutions in the configuration's precision, and the same way every time.

    A CPU's stay as they are.
    """
    if device.type != "cuda":
        yield
        return
    before, precision = torch.get_float32_matmul_precision(), config.matmul_precision
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=precision == "high"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class Draws(NamedTuple):
    """The random numbers of one step. A field that the configuration does not use has no elements.

    images: (R, B) int64, indices of training images. placement: (R,) keys of `TaskData.render`.
    first: (R, B, 2) and noise: (R, T - 1, B, 2), of `RAM.look`.
    classes: (R, B) and dropout: (R, B, channels), uniform in [0, 1).
    """

    images: Tensor
    placement: Tensor
    first: Tensor
    noise: Tensor
    classes: Tensor
    dropout: Tensor


def _flatten(model: nn.Module) -> nn.Parameter:
    """Put all weights of a model side by side, and their gradients too: (R, W), a row a replicate.

    The model's own weights and gradients become views, and what is done to all of them is one operation.
    """
    parameters = list(model.parameters())
    flat = nn.Parameter(torch.cat([p.detach().flatten(1) for p in parameters], 1))
    flat.grad = torch.zeros_like(flat)
    for part, whole in (("data", flat.data), ("grad", flat.grad)):
        views = whole.split([p[0].numel() for p in parameters], 1)
        for parameter, view in zip(parameters, views, strict=True):
            setattr(parameter, part, view.unflatten(1, parameter.shape[1:]))
    return flat


# The fields of EpochMetrics that are means over the steps, in the order of `Trainer._sums`.
_SUMMED = ("train_loss", "train_accuracy", "reward", "baseline_error", "gradient_norm")


class Trainer:
    """Trains R replicates of one configuration, one a seed."""

    def __init__(
        self, config: Config, data: TaskData, seeds: Sequence[int] = (0,), device: torch.device | str = "cpu"
    ) -> None:
        """Build untrained replicates, one for each seed. Data that is on another device is copied.

        Raises:
            UserError: seeds are missing, repeated or negative; the data is another task's; a batch exceeds the training
                split.
        """
        if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
            raise UserError(f"seeds must be different whole numbers of at least 0; got {list(seeds)}")
        data.check(config)
        if config.batch_size > data.sizes["train"]:
            largest = f"{data.sizes['train']}, the training images"
            raise UserError(f"batch_size must be at most {largest}; got {config.batch_size}")
        self.config = config
        self.device = torch.device(device)
        self.data = data if data.device == self.device else data.to(self.device)
        self.seeds = tuple(seeds)
        self.epochs_done = 0
        self._seeds = torch.tensor(self.seeds, device=self.device)
        self.model = build_model(config, self._seeds)
        self._weights = _flatten(self.model)
        on_gpu = self.device.type == "cuda"  # where a CUDA graph is captured, and the rate must be a tensor
        rate = torch.tensor(config.learning_rate, device=self.device) if on_gpu else config.learning_rate
        self._adam = torch.optim.Adam([self._weights], lr=rate, fused=True, capturable=on_gpu)
        moments = {name: torch.zeros_like(self._weights.detach()) for name in ("exp_avg", "exp_avg_sq")}
        self._adam.state[self._weights] = {"step": torch.zeros((), device=self.device), **moments}
        self._alive = torch.ones(len(seeds), dtype=torch.bool, device=self.device)
        self._sums = torch.zeros(len(_SUMMED), len(seeds), device=self.device)
        self._best_accuracy = torch.full((len(seeds),), -1.0)
        self._best_epoch = torch.zeros(len(seeds), dtype=torch.int64)
        self._best_weights = self._copy_weights()
        self._run_step: Callable[[Draws], None] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of the training split. The images left over differ from epoch to epoch."""
        return self.data.sizes["train"] // self.config.batch_size

    def epoch(self) -> EpochMetrics:
        """Train one epoch, evaluate on the validation split and keep each seed's best weights."""
        started = time.perf_counter()
        steps = self.steps_per_epoch
        self._sums.zero_()
        with _denormals_as_zero(), _products(self.config, self.device):
            for step, draws in enumerate(self.draws(self.epochs_done)):
                self._follow_schedules(self.epochs_done * steps + step)
                self.step(draws)
        self.epochs_done += 1
        evaluation = self._evaluate(self.model, "validation", every_step=False)
        diverged = (~self._alive).tolist()
        self._keep_best(evaluation, diverged)
        means = (self._sums / steps).tolist()

        def alive_only(values: Sequence[float]) -> tuple[float, ...]:
            return tuple(math.nan if dead else value for value, dead in zip(values, diverged, strict=True))

        return EpochMetrics(
            epoch=self.epochs_done,
            seconds=time.perf_counter() - started,
            seeds=self.seeds,
            **{name: alive_only(values) for name, values in zip(_SUMMED, means, strict=True)},
            val_loss=alive_only(evaluation.loss),
            val_accuracy=alive_only(evaluation.accuracy),
            diverged=tuple(diverged),
        )

    def evaluate(self, split: SplitName, weights: Literal["best", "last"] = "best") -> Evaluation:
        """Evaluate each seed on a split, with its weights of best validation accuracy or with its last ones."""
        if weights == "last" or self.epochs_done == 0:
            return self._evaluate(self.model, split)
        model = build_model(self.config, self._seeds)
        model.load_state_dict(self._best_weights)
        return self._evaluate(model, split)

    def _evaluate(self, model: nn.Module, split: SplitName, *, every_step: bool = True) -> Evaluation:
        with _products(self.config, self.device):
            return evaluate(model, self.config, self.seeds, self.data, split, every_step=every_step)

    @property
    def best_epoch(self) -> tuple[int, ...]:
        """Epoch of each seed's best validation accuracy; 0 before the first epoch."""
        return tuple(self._best_epoch.tolist())

    def best_weights(self, replicate: int | None = None) -> dict[str, Tensor]:
        """Weights of best validation accuracy, on the CPU. Leading dimension R, or 1 for one replicate."""
        chosen = slice(None) if replicate is None else slice(replicate, replicate + 1)
        return {name: value[chosen].cpu().clone() for name, value in self._best_weights.items()}

    def state_dict(self) -> dict[str, Any]:
        """The state from which training continues bit for bit. torch.load(..., weights_only=True) can load it."""
        return {
            "config": asdict(self.config),
            "seeds": list(self.seeds),
            "epochs_done": self.epochs_done,
            "weights": self._copy_weights(),
            "adam": self._adam_by_weight(),
            "alive": self._alive.clone(),
            "best_accuracy": self._best_accuracy.clone(),
            "best_epoch": self._best_epoch.clone(),
            "best_weights": {name: value.clone() for name, value in self._best_weights.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`. Raises UserError if it is of another configuration or other seeds."""
        config = asdict(Config()) | state["config"]  # a field that is newer than the checkpoint had its default value
        pairs = (("configuration", config, asdict(self.config)), ("seeds", state["seeds"], list(self.seeds)))
        for name, found, own in pairs:
            if found != own:
                raise UserError(f"a checkpoint continues the {name} it was made with, {found}; got {own}")
        self.model.load_state_dict(state["weights"])
        self._load_adam(state["adam"])
        self._alive = state["alive"].to(self.device)
        self._best_accuracy = state["best_accuracy"].clone()
        self._best_epoch = state["best_epoch"].clone()
        self._best_weights = {name: value.to(self.device) for name, value in state["best_weights"].items()}
        self.epochs_done = state["epochs_done"]
        self._run_step = None

    def _adam_by_weight(self) -> dict[str, Any]:
        """Adam's state as torch.optim.Adam has it for the model's own weights, which no layout of memory changes."""
        state = self._adam.state_dict()
        moments = state["state"][0]
        parameters = list(self.model.parameters())
        sizes = [p[0].numel() for p in parameters]
        split = {name: moments[name].split(sizes, 1) for name in ("exp_avg", "exp_avg_sq")}
        by_weight: dict[int, dict[str, Tensor]] = {}
        for i, parameter in enumerate(parameters):
            by_weight[i] = {"step": moments["step"].clone()}
            by_weight[i] |= {name: parts[i].reshape(parameter.shape).clone() for name, parts in split.items()}
        groups = [group | {"params": list(range(len(parameters)))} for group in copy.deepcopy(state["param_groups"])]
        return {"state": by_weight, "param_groups": groups}

    def _load_adam(self, saved: dict[str, Any]) -> None:
        """The inverse of `_adam_by_weight`. In older checkpoints a weight that had no gradient has no state."""
        by_weight, group = saved["state"], saved["param_groups"][0]
        state = {"step": next((one["step"] for one in by_weight.values()), torch.zeros(()))}
        for name in ("exp_avg", "exp_avg_sq"):
            parts = [
                by_weight[i][name].to(self.device) if i in by_weight else torch.zeros_like(p)
                for i, p in enumerate(self.model.parameters())
            ]
            state[name] = torch.cat([part.flatten(1) for part in parts], 1)
        # The checkpoint may come from another kind of device.
        on_gpu, rate = self.device.type == "cuda", float(group["lr"])
        rate = torch.tensor(rate, device=self.device) if on_gpu else rate
        self._adam.load_state_dict(
            {"state": {0: state}, "param_groups": [group | {"params": [0], "capturable": on_gpu, "lr": rate}]}
        )

    def draws(self, epoch: int) -> Iterator[Draws]:
        """The random numbers of each step of an epoch."""
        config, data, seeds = self.config, self.data, self._seeds[:, None]
        batch, steps = config.batch_size, self.steps_per_epoch
        order = permutation(key(self._seeds, Stream.BATCH_ORDER, epoch), data.sizes["train"])
        placement = data.placement_keys("train", self._seeds, 0 if config.placements == "once" else epoch)
        for start in range(0, steps, _STEPS_DRAWN):
            step = torch.arange(start, min(start + _STEPS_DRAWN, steps), device=self.device)
            count = len(step)
            index = order[:, start * batch : (start + count) * batch].unflatten(1, (count, batch))
            first = noise = classes = dropout = torch.empty(len(seeds), count, 0, device=self.device)
            if config.is_recurrent:
                first = uniform(key(seeds, Stream.FIRST_LOCATION, epoch, step), 2 * batch).unflatten(-1, (batch, 2))
                first = torch.zeros_like(first) if config.first_glimpse == "center" else first * 2 - 1
                noise = policy_noise(config, key(seeds, Stream.LOCATION_NOISE, epoch, step), batch)
            if config.loss_mixing < 1:
                classes = uniform(key(seeds, Stream.CLASS_SAMPLE, epoch, step), batch)
            if config.model == "cnn":
                dropout = uniform(key(seeds, Stream.DROPOUT, epoch, step), batch * _CNN_CHANNELS)
                dropout = dropout.unflatten(-1, (batch, _CNN_CHANNELS))
            for i in range(count):
                yield Draws(index[:, i], placement, first[:, i], noise[:, i], classes[:, i], dropout[:, i])

    def step(self, draws: Draws) -> None:
        """One optimisation step; on a GPU a CUDA graph, captured at the first step."""
        if self._run_step is None:
            self._run_step = self._capture() if self.device.type == "cuda" else self.optimise
        self._run_step(draws)

    def optimise(self, draws: Draws) -> None:
        """Compute the losses, clip the gradients, move the weights. No operation waits for the GPU."""
        losses = self._losses(draws)
        gradient = self._weights.grad
        assert gradient is not None
        norm = torch.linalg.vector_norm(gradient, dim=1)
        clip = self.config.gradient_clip
        if kernels.usable(self.device):
            state, (group,) = self._adam.state[self._weights], self._adam.param_groups
            kernels.adam(self._weights, state, group, norm, losses.total, self._alive, clip)
        else:
            self._alive &= torch.isfinite(norm + losses.total)
            if clip > 0:
                gradient *= (clip / norm).clamp(max=1)[:, None]
            # A diverged seed gets no more gradient. A CPU skips this if there is none; a GPU would wait to know.
            if self.device.type != "cpu" or not self._alive.all():
                gradient.masked_fill_(~self._alive[:, None], 0)
            self._adam.step()
        self._sums += torch.stack([losses.classification, losses.accuracy, losses.reward, losses.baseline, norm])

    def _losses(self, draws: Draws) -> Losses:
        """The losses of one batch. All gradients are written."""
        config, data = self.config, self.data
        images = data.render("train", draws.images, draws.placement)
        labels = data.train.labels[draws.images]
        if isinstance(self.model, RAM):
            glimpses = self.model.look(self.model.retina.pyramid(images), draws.first, draws.noise, keep=True)
            rollout = self.model.rollout(glimpses, every_step=needs_every_step(config))
            losses = losses_with_gradients(config, rollout, labels, draws.classes)
            self.model.backward(glimpses, rollout)
            return losses
        dropout = (draws.dropout,) if config.model == "cnn" else ()
        logits = self.model(whole_image_input(config, images), *dropout)
        losses = hybrid_loss(config, Rollout.without_decisions(logits[:, None]), labels, draws.classes)
        parameters = list(self.model.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(losses.total.sum(), parameters), strict=True):
            gradient_of(parameter).copy_(gradient)
        return losses

    def _follow_schedules(self, steps_done: int) -> None:
        """Set the learning rate and the policy's standard deviation for the next step."""
        config = self.config
        progress = steps_done / (config.epochs * self.steps_per_epoch)
        left = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        if isinstance(self.model, RAM) and config.location_std_end < 1:
            end = config.location_std_end
            self.model.location_std.fill_(config.location_std * (end + (1 - end) * left))
        if config.schedule == "constant":
            return
        rate = config.learning_rate * left
        for group in self._adam.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _capture(self) -> Callable[[Draws], None]:
        """The step as a CUDA graph: one launch instead of hundreds, with the same results.

        It is captured on a stream of its own, so that it shares no workspace with the graph of another trainer.
        """
        inputs = Draws(*(t.clone() for t in next(self.draws(0))))
        weights, alive = self._weights.detach().clone(), self._alive.clone()
        moments = {name: value.clone() for name, value in self._adam.state[self._weights].items()}
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # capturing needs loaded kernels
            for _ in range(3):
                self.optimise(inputs)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with _CAPTURING, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.optimise(inputs)
        # Undo the warm-up. The tensors stay in place, since the graph refers to their memory.
        self._weights.data.copy_(weights)
        self._alive.copy_(alive)
        self._sums.zero_()
        for name, value in self._adam.state[self._weights].items():
            value.copy_(moments[name])

        def replay(draws: Draws) -> None:
            for old, new in zip(inputs, draws, strict=True):
                old.copy_(new)
            graph.replay()

        return replay

    def _copy_weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def _keep_best(self, evaluation: Evaluation, diverged: list[bool]) -> None:
        weights = self.model.state_dict()
        for r, accuracy in enumerate(evaluation.accuracy):
            if accuracy > self._best_accuracy[r] and not diverged[r]:
                self._best_accuracy[r] = accuracy
                self._best_epoch[r] = self.epochs_done
                for name, value in self._best_weights.items():
                    value[r].copy_(weights[name][r])
