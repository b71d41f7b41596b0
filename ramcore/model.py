"""The Recurrent Attention Model (Mnih et al. 2014, section 3).

`RAM.look` takes the glimpses one after another: the retina reads the canvas, the glimpse network encodes what it read
and where, the core updates its state, and the location network chooses the next location. `RAM.rollout` then computes
what the losses need from all glimpses at once. A sampled location carries no gradient, so ordinary autograd through
`look` gives the policy gradient.

R replicates, B images of a batch, T glimpses, t of these glimpses, K scales, P patch side, G units of a glimpse path,
H hidden units, C classes. Locations are (x, y) in [-1, 1], 0 the canvas' centre.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ramcore.config import Config
from ramcore.layers import LayerNorm, Linear, Weights
from ramcore.retina import Pyramid, Retina

State = tuple[Tensor, ...]  # of the core; its first tensor is the output h, (R, B, H)


class Glimpses(NamedTuple):
    """T glimpses at B images by R networks, one tensor a glimpse.

    seen: T of (R, B, K * P * P), what the retina read.
    locations: T of (R, B, 2), clipped to the canvas.
    samples: T - 1 of (R, B, 2), the later locations before clipping; the policy's means where nothing was sampled.
    means: T - 1 of (R, B, 2), of the location policy; none with model ram-random.
    hiddens: T of (R, B, H), the core's output after each glimpse.
    """

    seen: list[Tensor]
    locations: list[Tensor]
    samples: list[Tensor]
    means: list[Tensor]
    hiddens: list[Tensor]


class Rollout(NamedTuple):
    """What the losses need of T glimpses at B images by R networks.

    logits: (R, t, B, C) class scores after each of the last t glimpses; t is T or 1.
    log_probs: (R, T - 1, B) of the sampled locations of the second and later glimpses.
    baselines: (R, T - 1, B) predicted return at each of those decisions.
    """

    logits: Tensor
    log_probs: Tensor
    baselines: Tensor

    @classmethod
    def without_decisions(cls, logits: Tensor) -> Rollout:
        """The rollout of a network that chooses no location, from its scores (R, t, B, C)."""
        none = logits.new_empty(len(logits), 0, logits.shape[2])
        return cls(logits, none, none)


class GlimpseNetwork(nn.Module):
    """Encodes what was seen and where: Rect(Linear(Rect(Linear(what))) + Linear(Rect(Linear(where)))).

    The two outer linear layers are one layer on the concatenated paths.
    """

    def __init__(self, weights: Weights, config: Config) -> None:
        super().__init__()
        self.what = Linear(weights, config.glimpse_pixels, config.glimpse_size)
        self.where = Linear(weights, 2, config.glimpse_size)
        self.code = Linear(weights, 2 * config.glimpse_size, config.hidden_size)
        self.norm = LayerNorm(weights, config.hidden_size) if config.layer_norm else nn.Identity()

    def forward(self, seen: Tensor, location: Tensor) -> tuple[Tensor, Tensor]:
        """seen: (R, B, K * P * P), location: (R, B, 2); returns the paths (R, B, 2 * G) and the code (R, B, H)."""
        paths = torch.cat([self.what(seen), self.where(location)], -1).relu()
        return paths, self.norm(self.code(paths)).relu()


class CoreNetwork(nn.Module):
    """The recurrent state: the papers' rectified RNN, a GRU (Cho et al. 2014) or an LSTM (Hochreiter et al. 1997)."""

    def __init__(self, weights: Weights, config: Config) -> None:
        super().__init__()
        self.kind = config.core
        self.size = config.hidden_size
        gates = {"rnn": 1, "gru": 3, "lstm": 4}[config.core]
        self.input = Linear(weights, self.size, gates * self.size)
        self.recurrent = Linear(weights, self.size, gates * self.size)
        # A GRU's candidate resets its recurrent part, so the two parts have a norm each. Else one norm has their sum.
        norms = 2 if config.core == "gru" else 1
        self.norms = nn.ModuleList(
            LayerNorm(weights, self.size, gates) if config.layer_norm else nn.Identity() for _ in range(norms)
        )

    def start(self, code: Tensor) -> State:
        """The state after the first glimpse's code (R, B, H). The state before it is zero, and needs no product."""
        zero = torch.zeros_like(code)
        return self._step(self.input(code), self.recurrent.bias, (zero, zero))

    def forward(self, code: Tensor, state: State) -> State:
        """The state after a later glimpse's code (R, B, H)."""
        return self._step(self.input(code), self.recurrent(state[0]), state)

    def _step(self, from_input: Tensor, from_h: Tensor, state: State) -> State:
        """from_input and from_h: (R, B, gates * H), or from_h (R, 1, gates * H)."""
        if self.kind == "gru":
            reset, update, candidate = self.norms[0](from_input).split(self.size, dim=-1)
            reset_h, update_h, candidate_h = self.norms[1](from_h).split(self.size, dim=-1)
            update = torch.sigmoid(update + update_h)
            candidate = torch.tanh(candidate + torch.sigmoid(reset + reset_h) * candidate_h)
            return (torch.lerp(candidate, state[0], update),)
        pre = self.norms[0](from_input + from_h)
        if self.kind == "rnn":
            return (pre.relu(),)
        enter, forget, candidate, leave = pre.split(self.size, dim=-1)
        cell = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(candidate)
        return torch.sigmoid(leave) * torch.tanh(cell), cell


class LocationNetwork(nn.Module):
    """The mean of the location policy: tanh of a linear map of its input, or of one rectified layer on its input.

    The input is the core's state, as in the papers, or the state and the newest glimpse's paths. The state is trained
    to classify the digit and holds little about its place in the glimpse.
    """

    def __init__(self, weights: Weights, config: Config) -> None:
        super().__init__()
        self.reads_paths = config.location_input == "state+paths"
        size = config.hidden_size + (2 * config.glimpse_size if self.reads_paths else 0)
        hidden = config.location_hidden
        self.hidden = Linear(weights, size, hidden) if hidden else None
        self.mean = Linear(weights, hidden or size, 2)

    def forward(self, h: Tensor, paths: Tensor) -> Tensor:
        """h: (R, B, H), paths: (R, B, 2 * G); returns the mean (R, B, 2) in (-1, 1)."""
        read = torch.cat([h, paths], -1) if self.reads_paths else h
        if self.hidden is not None:
            read = self.hidden(read).relu()
        return torch.tanh(self.mean(read))


class RAM(nn.Module):
    """R Recurrent Attention Models of one configuration, one a seed."""

    def __init__(self, config: Config, seeds: Tensor) -> None:
        """seeds: (R,) int64, on the device of the weights."""
        super().__init__()
        weights = Weights(seeds)
        self.config = config
        self.retina = Retina(
            patch_size=config.patch_size,
            num_scales=config.num_scales,
            scale_factor=config.scale_factor,
            canvas_size=config.canvas_size,
            gain=config.input_gain,
        )
        self.glimpse = GlimpseNetwork(weights, config)
        self.core = CoreNetwork(weights, config)
        self.location = LocationNetwork(weights, config)
        self.action = Linear(weights, config.hidden_size, config.num_classes)
        self.baseline = Linear(weights, config.hidden_size, 1)
        # The policy's present standard deviation. It is saved with the weights that were trained with it.
        self.location_std: Tensor
        self.register_buffer("location_std", torch.full((len(seeds), 1, 1), config.location_std, device=seeds.device))

    def look(self, pyramid: Pyramid, first: Tensor, noise: Tensor | None = None) -> Glimpses:
        """Take the glimpses.

        This is one pass with ordinary autograd. A version with a second pass and handwritten gradients saved 2, 4 and
        7 % of a training step's CPU time at 1, 2 and 8 seeds (tuned recipe, one thread), for 110 more lines.

        Args:
            pyramid: of the canvases, from `self.retina`, leading dimensions (R, B) or (1, B).
            first: (R, B, 2), the first locations.
            noise: (R, T - 1, B, 2) standard normal, to sample the later locations; None: they are the policy's means.
                With model ram-random: the later locations themselves.
        """
        config = self.config
        glimpses = Glimpses([], [], [], [], [])
        state, location = None, first
        for t in range(config.num_glimpses):
            seen = self.retina.read(pyramid, location)
            paths, code = self.glimpse(seen, location)
            state = self.core.start(code) if state is None else self.core(code, state)
            glimpses.seen.append(seen)
            glimpses.locations.append(location)
            glimpses.hiddens.append(state[0])
            if t == config.num_glimpses - 1:
                break
            if config.model == "ram-random":
                assert noise is not None
                sample = noise[:, t]
            else:
                h = state[0]
                if not config.reinforce_core:
                    h, paths = h.detach(), paths.detach()
                mean = self.location(h, paths)
                glimpses.means.append(mean)
                sample = mean.detach()  # the policy gradient comes from log_probs alone
                if noise is not None:
                    sample = torch.addcmul(sample, noise[:, t], self.location_std)
            glimpses.samples.append(sample)
            location = sample.clamp(-1, 1)
        return glimpses

    def scores(self, hiddens: list[Tensor]) -> Tensor:
        """hiddens: t of (R, B, H); returns class scores (R, t, B, C)."""
        return self.action(torch.cat(hiddens, 1)).unflatten(1, (len(hiddens), -1))

    def rollout(self, glimpses: Glimpses, *, every_step: bool = False) -> Rollout:
        """What the losses need of glimpses that `look` has just taken, with noise.

        every_step: score classes after every glimpse, not only after the last.
        """
        logits = self.scores(glimpses.hiddens if every_step else glimpses.hiddens[-1:])
        if not glimpses.means:
            return Rollout.without_decisions(logits)
        log_probs = gaussian_log_prob(
            torch.stack(glimpses.samples, 1), torch.stack(glimpses.means, 1), self.location_std[:, None]
        )
        decided = torch.cat(glimpses.hiddens[:-1], 1).detach()  # the baseline does not train the core
        return Rollout(logits, log_probs, self.baseline(decided).view_as(log_probs))


def gaussian_log_prob(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log density of a Gaussian, summed over the last dimension (x and y)."""
    scaled = (sample - mean) / std
    return -(0.5 * scaled.square() + std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)
