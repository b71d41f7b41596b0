"""The Recurrent Attention Model (Mnih et al. 2014, section 3): where to look, what to make of it.

A step of training has two phases. `RAM.look` takes the glimpses, one after the other, without gradients: where the next one
looks depends on those before. `RAM.learn` then goes over the same glimpses with gradients. What is seen is fixed by then,
so the glimpse network and the heads handle all glimpses at once, and no matrix product of the first phase is done again.
Evaluation is the first phase alone.

R replicates, B images of a batch, T glimpses, K scales, P patch side, G units of a glimpse path, H hidden units, C classes.
Locations are (x, y) in [-1, 1], 0 the canvas' centre.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ramcore.config import NUM_CLASSES, Config
from ramcore.layers import LayerNorm, Linear, Weights
from ramcore.retina import Pyramid, Retina

State = tuple[Tensor, ...]  # of the core; its first tensor is the output h, (R, B, H)


class GlimpseProducts(NamedTuple):
    """The glimpse network's large matrix products: what (R, N, G), code (R, N, H)."""

    what: Tensor
    code: Tensor


class Looks(NamedTuple):
    """T glimpses at B images by R networks, as taken.

    seen: (R, T, B, K * P * P). locations: (R, T, B, 2), clipped to the canvas.
    drawn: (R, T - 1, B, 2), the later locations before clipping; the policy's means where nothing was drawn.
    hiddens: (R, T, B, H), the core's output after each glimpse.
    glimpse_products, inputs, recurrents: results of matrix products, (R, T, B, ...), for `RAM.learn`.
    """

    seen: Tensor
    locations: Tensor
    drawn: Tensor
    hiddens: Tensor
    glimpse_products: GlimpseProducts
    inputs: Tensor
    recurrents: Tensor


class Rollout(NamedTuple):
    """What the losses need of T glimpses at B images by R networks.

    logits: (R, t, B, C) class scores after each of the last t glimpses: all T of them, or only the last.
    log_probs: (R, T - 1, B) of the locations drawn for the second and later glimpses.
    baselines: (R, T - 1, B) predicted return at each of those decisions.
    """

    logits: Tensor
    log_probs: Tensor
    baselines: Tensor


class GlimpseNetwork(nn.Module):
    """What was seen and where, into one code: Rect(Linear(Rect(Linear(what))) + Linear(Rect(Linear(where)))).

    The two last linear layers are one, on the concatenated paths.
    """

    def __init__(self, weights: Weights, config: Config) -> None:
        super().__init__()
        self.what = Linear(weights, config.glimpse_pixels, config.glimpse_size)
        self.where = Linear(weights, 2, config.glimpse_size)
        self.code = Linear(weights, 2 * config.glimpse_size, config.hidden_size)
        self.norm = LayerNorm(weights, config.hidden_size) if config.layer_norm else nn.Identity()

    def forward(
        self, seen: Tensor, location: Tensor, known: GlimpseProducts | None = None
    ) -> tuple[Tensor, GlimpseProducts]:
        """seen: (R, N, K * P * P), location: (R, N, 2); returns the code (R, N, H) and the products behind it."""
        what = self.what(seen, known.what if known else None)
        paths = torch.cat([what, self.where(location)], dim=-1).relu()
        code = self.code(paths, known.code if known else None)
        return self.norm(code).relu(), GlimpseProducts(what, code)


class CoreNetwork(nn.Module):
    """The recurrent state: the papers' rectified RNN, or a GRU (Cho et al. 2014) or LSTM (Hochreiter, Schmidhuber 1997)."""

    def __init__(self, weights: Weights, config: Config) -> None:
        super().__init__()
        self.kind = config.core
        self.size = config.hidden_size
        gates = {"rnn": 1, "gru": 3, "lstm": 4}[config.core]
        self.input = Linear(weights, self.size, gates * self.size)
        self.recurrent = Linear(weights, self.size, gates * self.size)
        # A GRU's candidate resets its recurrent part, so there the two parts are normalised apart.
        norms = (2 * gates if config.core == "gru" else gates) if config.layer_norm else 0
        self.norms = nn.ModuleList(LayerNorm(weights, self.size) for _ in range(norms))

    def start(self, h: Tensor) -> State:
        """The state before the first glimpse: zeros, shaped as h (R, B, H)."""
        return (h, h) if self.kind == "lstm" else (h,)

    def forward(self, from_input: Tensor, from_h: Tensor, state: State) -> State:
        """One step. from_input: self.input(code), from_h: self.recurrent(h), both (R, B, gates * H)."""
        if self.kind == "gru":
            reset, update, candidate = self._gates(from_input, 0)
            reset_h, update_h, candidate_h = self._gates(from_h, 3)
            update = torch.sigmoid(update + update_h)
            candidate = torch.tanh(candidate + torch.sigmoid(reset + reset_h) * candidate_h)
            return (torch.lerp(candidate, state[0], update),)
        gates = self._gates(from_input + from_h, 0)
        if self.kind == "rnn":
            return (gates[0].relu(),)
        enter, forget, candidate, leave = gates
        cell = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(candidate)
        return torch.sigmoid(leave) * torch.tanh(cell), cell

    def _gates(self, pre: Tensor, first_norm: int) -> tuple[Tensor, ...]:
        gates = pre.split(self.size, dim=-1)
        if not self.norms:
            return gates
        return tuple(self.norms[first_norm + i](gate) for i, gate in enumerate(gates))


class LocationNetwork(nn.Module):
    """The mean of the next location's Gaussian: tanh of a linear map of the state, optionally behind one rectified layer."""

    def __init__(self, weights: Weights, config: Config) -> None:
        super().__init__()
        hidden = config.location_hidden
        self.hidden = Linear(weights, config.hidden_size, hidden) if hidden else None
        self.mean = Linear(weights, hidden or config.hidden_size, 2)

    def forward(self, h: Tensor) -> Tensor:
        """h: (R, N, H); returns (R, N, 2) in (-1, 1)."""
        if self.hidden is not None:
            h = self.hidden(h).relu()
        return torch.tanh(self.mean(h))


class RAM(nn.Module):
    """R Recurrent Attention Models of one configuration, one a seed."""

    def __init__(self, config: Config, seeds: Tensor) -> None:
        """seeds: (R,) int64, on the device where the weights are to be."""
        super().__init__()
        weights = Weights(seeds)
        self.config = config
        self.retina = Retina(
            patch_size=config.patch_size,
            num_scales=config.num_scales,
            scale_factor=config.scale_factor,
            canvas_size=config.canvas_size,
        )
        self.glimpse = GlimpseNetwork(weights, config)
        self.core = CoreNetwork(weights, config)
        self.location = LocationNetwork(weights, config)
        self.action = Linear(weights, config.hidden_size, NUM_CLASSES)
        self.baseline = Linear(weights, config.hidden_size, 1)

    @torch.no_grad()
    def look(self, pyramid: Pyramid, first: Tensor, noise: Tensor | None = None) -> Looks:
        """Take the glimpses.

        Args:
            pyramid: of the canvases, from `self.retina`, leading dimensions (R, B) or (1, B).
            first: (R, B, 2), where the first glimpse looks.
            noise: (R, T - 1, B, 2) standard normal: locations are drawn from the policy; None: its mean is followed.
                With model ram-random: the later locations themselves, which no policy chooses.
        """
        config = self.config
        location, locations = first, [first]
        drawn, seen, products, inputs, recurrents, hiddens = [], [], [], [], [], []
        state = self.core.start(first.new_zeros(*first.shape[:-1], config.hidden_size))
        for t in range(config.num_glimpses):
            seen.append(self.retina.glimpse(pyramid, location))
            code, known = self.glimpse(seen[-1], location)
            products.append(known)
            inputs.append(self.core.input(code))
            recurrents.append(self.core.recurrent(state[0]))
            state = self.core(inputs[-1], recurrents[-1], state)
            hiddens.append(state[0])
            if t == config.num_glimpses - 1:
                break
            if config.model == "ram-random":
                assert noise is not None
                draw = noise[:, t]
            else:
                draw = self.location(state[0])
                if noise is not None:
                    draw = draw + config.location_std * noise[:, t]
            drawn.append(draw)
            location = draw.clamp(-1, 1)
            locations.append(location)
        return Looks(
            seen=torch.stack(seen, 1),
            locations=torch.stack(locations, 1),
            drawn=torch.stack(drawn, 1) if drawn else first.new_empty(len(first), 0, *first.shape[1:]),
            hiddens=torch.stack(hiddens, 1),
            glimpse_products=GlimpseProducts(*(torch.stack(p, 1) for p in zip(*products, strict=True))),
            inputs=torch.stack(inputs, 1),
            recurrents=torch.stack(recurrents, 1),
        )

    def scores(self, hiddens: Tensor) -> Tensor:
        """hiddens: (R, t, B, H); returns class scores (R, t, B, C)."""
        return self.action(hiddens.flatten(1, 2)).unflatten(1, hiddens.shape[1:3])

    def learn(self, looks: Looks, *, every_step: bool = False) -> Rollout:
        """Go over glimpses drawn by `look` again, with gradients.

        Args:
            looks: with noise, by the same weights.
            every_step: score classes after every glimpse, not only the last.
        """
        config = self.config
        steps, batch = looks.seen.shape[1:3]
        known = GlimpseProducts(*(product.flatten(1, 2) for product in looks.glimpse_products))
        code, _ = self.glimpse(looks.seen.flatten(1, 2), looks.locations.flatten(1, 2), known)
        inputs = self.core.input(code, looks.inputs.flatten(1, 2)).unflatten(1, (steps, batch)).unbind(1)
        state = self.core.start(torch.zeros_like(looks.hiddens[:, 0]))
        hiddens = []
        for from_input, known_product in zip(inputs, looks.recurrents.unbind(1), strict=True):
            state = self.core(from_input, self.core.recurrent(state[0], known_product), state)
            hiddens.append(state[0])
        logits = self.scores(torch.stack(hiddens if every_step else hiddens[-1:], 1))
        if steps == 1 or config.model == "ram-random":
            none = logits.new_empty(len(logits), 0, batch)
            return Rollout(logits, none, none)
        decided = looks.hiddens[:, :-1].flatten(1, 2)
        baselines = self.baseline(decided).view(-1, steps - 1, batch)
        if config.reinforce_core:
            decided = torch.cat(hiddens[:-1], 1)
        mean = self.location(decided).view(looks.drawn.shape)
        return Rollout(logits, gaussian_log_prob(looks.drawn, mean, config.location_std), baselines)


def gaussian_log_prob(sample: Tensor, mean: Tensor, std: float) -> Tensor:
    """Log density of an isotropic Gaussian, summed over the last dimension (x and y)."""
    scaled = (sample - mean) / std
    return -0.5 * scaled.square().sum(-1) - sample.shape[-1] * (math.log(std) + 0.5 * math.log(2 * math.pi))
