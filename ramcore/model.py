"""The Recurrent Attention Model (Mnih et al. 2014, section 3): where to look, what to make of it.

A step of training has two phases. `RAM.look` takes the glimpses, one after the other, without gradients: where the
next one looks depends on those before. `RAM.learn` then goes over the same glimpses with gradients. What is seen is
fixed by then, so the glimpse network and the heads handle all glimpses at once, and no matrix product of the first
phase is done again. Evaluation is the first phase alone.

R replicates, B images of a batch, T glimpses, K scales, P patch side, G units of a glimpse path, H hidden units, C
classes. Locations are (x, y) in [-1, 1], 0 the canvas' centre.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ramcore.config import NUM_CLASSES, Config
from ramcore.layers import LayerNorm, Linear, Weights, known_rectified
from ramcore.retina import Pyramid, Retina

State = tuple[Tensor, ...]  # of the core; its first tensor is the output h, (R, B, H)


class Looks(NamedTuple):
    """T glimpses at B images by R networks, as taken.

    seen: (R, T, B, K * P * P). locations: (R, T, B, 2), clipped to the canvas.
    drawn: (R, T - 1, B, 2), the later locations before clipping; the policy's means where nothing was drawn.
    hiddens: (R, T, B, H), the core's output after each glimpse.
    paths, codes, inputs, recurrents, aims: what the large matrix products gave, (R, T, B, ...), so that `RAM.learn`
        need not repeat them; recurrents of the second and later glimpses, as there is no state before the first; aims
        of the first T - 1, as there is no decision after the last.
    """

    seen: Tensor
    locations: Tensor
    drawn: Tensor
    hiddens: Tensor
    paths: Tensor
    codes: Tensor
    inputs: Tensor
    recurrents: Tensor
    aims: Tensor


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

    def forward(self, seen: Tensor, location: Tensor, paths: Tensor, code: Tensor) -> Tensor:
        """See, without gradients.

        Args:
            seen: (R, B, K * P * P).
            location: (R, B, 2).
            paths: (R, B, 2 * G) to be filled with the rectified what and where paths.
            code: (R, B, H) to be filled with the code, where it is normalised with the code before that.

        Returns:
            The code, (R, B, H).
        """
        split = self.what.weight.shape[-1]
        self.what(seen, out=paths[..., :split])
        self.where(location, out=paths[..., split:])
        self.code(paths.relu_(), out=code)
        return code.relu_() if isinstance(self.norm, nn.Identity) else self.norm(code).relu()

    def known(self, seen: Tensor, location: Tensor, paths: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        """The paths, (R, N, 2 * G), and the code, (R, N, H), of N glimpses taken before, now with gradients; paths and
        code as filled then.
        """
        paths = known_rectified(paths, (self.what, seen), (self.where, location))
        if isinstance(self.norm, nn.Identity):
            return paths, known_rectified(code, (self.code, paths))
        return paths, self.norm(self.code.known(paths, code)).relu()


class CoreNetwork(nn.Module):
    """The recurrent state: the papers' rectified RNN, a GRU (Cho et al. 2014) or an LSTM (Hochreiter et al. 1997)."""

    def __init__(self, weights: Weights, config: Config) -> None:
        super().__init__()
        self.kind = config.core
        self.size = config.hidden_size
        gates = {"rnn": 1, "gru": 3, "lstm": 4}[config.core]
        self.input = Linear(weights, self.size, gates * self.size)
        self.recurrent = Linear(weights, self.size, gates * self.size)
        # A GRU's candidate resets its recurrent part, so there the two parts are normalised apart; else their sum is.
        norms = 2 if config.core == "gru" else 1
        self.norms = nn.ModuleList(
            LayerNorm(weights, self.size, gates) if config.layer_norm else nn.Identity() for _ in range(norms)
        )

    def start(self, h: Tensor) -> State:
        """The state before the first glimpse: zeros, shaped as h (R, B, H)."""
        return (h, h) if self.kind == "lstm" else (h,)

    def forward(self, from_input: Tensor, from_h: Tensor, state: State) -> State:
        """One step.

        Args:
            from_input: self.input(code), (R, B, gates * H).
            from_h: self.recurrent(h), the same shape; at the first step, where h is zero, its bias (R, 1, gates * H).
            state: before the step.
        """
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
    """The mean of the next location's Gaussian: tanh of a linear map of what it reads, or of one rectified layer's.

    It reads the core's state, as in the papers, or the state and the newest glimpse's paths: the state is trained to
    name the digit and knows little of where in the glimpse it lay.
    """

    def __init__(self, weights: Weights, config: Config) -> None:
        super().__init__()
        self.reads_paths = config.location_input == "state+paths"
        size = config.hidden_size + (2 * config.glimpse_size if self.reads_paths else 0)
        hidden = config.location_hidden
        self.hidden = Linear(weights, size, hidden) if hidden else None
        self.mean = Linear(weights, hidden or size, 2)

    def forward(self, h: Tensor, paths: Tensor, aim: Tensor) -> Tensor:
        """Decide, without gradients.

        Args:
            h: (R, N, H).
            paths: (R, N, 2 * G).
            aim: (R, N, units of the hidden layer) to be filled with it, rectified; unused where there is none.

        Returns:
            The mean, (R, N, 2) in (-1, 1).
        """
        read = self._read(h, paths)
        if self.hidden is not None:
            read = self.hidden(read, out=aim).relu_()
        return torch.tanh(self.mean(read))

    def known(self, h: Tensor, paths: Tensor, aim: Tensor) -> Tensor:
        """The mean of decisions taken before, now with gradients; aim as filled then."""
        read = self._read(h, paths)
        if self.hidden is not None:
            read = known_rectified(aim, (self.hidden, read))
        return torch.tanh(self.mean(read))

    def _read(self, h: Tensor, paths: Tensor) -> Tensor:
        return torch.cat([h, paths], -1) if self.reads_paths else h


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
            gain=config.input_gain,
        )
        self.glimpse = GlimpseNetwork(weights, config)
        self.core = CoreNetwork(weights, config)
        self.location = LocationNetwork(weights, config)
        self.action = Linear(weights, config.hidden_size, NUM_CLASSES)
        self.baseline = Linear(weights, config.hidden_size, 1)
        # Of the policy, as it is now; kept with the weights, as what they were trained with.
        self.location_std: Tensor
        self.register_buffer("location_std", torch.full((len(seeds), 1, 1), config.location_std, device=seeds.device))

    @torch.no_grad()
    def look(self, pyramid: Pyramid, first: Tensor, noise: Tensor | None = None) -> Looks:
        """Take the glimpses.

        Args:
            pyramid: of the canvases, from `self.retina`, leading dimensions (R, B) or (1, B).
            first: (R, B, 2), where the first glimpse looks.
            noise: (R, T - 1, B, 2) standard normal: locations are drawn from the policy; None: its mean is followed.
                With model ram-random: the later locations themselves, which no policy chooses.
        """
        config, core = self.config, self.core
        steps, rows = config.num_glimpses, first.shape[:-1]
        state = core.start(first.new_zeros(*rows, config.hidden_size))
        looks = self._unfilled(first)
        location = first
        for t in range(steps):
            looks.locations[:, t] = location
            seen = self.retina.glimpse(pyramid, location, out=looks.seen[:, t])
            code = self.glimpse(seen, location, looks.paths[:, t], looks.codes[:, t])
            from_input = core.input(code, out=looks.inputs[:, t])
            from_h = core.recurrent(state[0], out=looks.recurrents[:, t - 1]) if t else core.recurrent.bias
            state = core(from_input, from_h, state)
            looks.hiddens[:, t] = state[0]
            if t == steps - 1:
                break
            if config.model == "ram-random":
                assert noise is not None
                draw = noise[:, t]
            else:
                draw = self.location(state[0], looks.paths[:, t], looks.aims[:, t])
                if noise is not None:
                    draw = torch.addcmul(draw, noise[:, t], self.location_std)
            looks.drawn[:, t] = draw
            location = draw.clamp(-1, 1)
        return looks

    def _unfilled(self, first: Tensor) -> Looks:
        """Memory for all glimpses, written in place: joining them afterwards would copy everything once more."""
        config, gates = self.config, self.core.input.weight.shape[-1]
        replicates, batch = first.shape[:2]

        def empty(size: int, steps: int = config.num_glimpses) -> Tensor:
            return first.new_empty(replicates, steps, batch, size)

        return Looks(
            seen=empty(config.glimpse_pixels),
            locations=empty(2),
            drawn=empty(2, config.num_glimpses - 1),
            hiddens=empty(config.hidden_size),
            paths=empty(2 * config.glimpse_size),
            codes=empty(config.hidden_size),
            inputs=empty(gates),
            recurrents=empty(gates, config.num_glimpses - 1),
            aims=empty(config.location_hidden, config.num_glimpses - 1),
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
        taken = (looks.seen, looks.locations, looks.paths, looks.codes)
        paths, code = self.glimpse.known(*(t.flatten(1, 2) for t in taken))
        inputs = self.core.input.known(code, looks.inputs.flatten(1, 2)).unflatten(1, (steps, batch)).unbind(1)
        # The recurrent weights' gradient sums over all steps, so it is one product; the state's goes step by step.
        before = looks.hiddens[:, :-1].flatten(1, 2)
        recurrents = self.core.recurrent.known(before, looks.recurrents.flatten(1, 2))
        recurrents = recurrents.unflatten(1, (steps - 1, batch)).unbind(1)
        state = self.core.start(torch.zeros_like(looks.hiddens[:, 0]))
        hiddens = []
        for t, from_input in enumerate(inputs):
            from_h = self.core.recurrent.through(state[0], recurrents[t - 1]) if t else self.core.recurrent.bias
            state = self.core(from_input, from_h, state)
            hiddens.append(state[0])
        logits = self.scores(torch.stack(hiddens if every_step else hiddens[-1:], 1))
        if steps == 1 or config.model == "ram-random":
            none = logits.new_empty(len(logits), 0, batch)
            return Rollout(logits, none, none)
        decided = looks.hiddens[:, :-1].flatten(1, 2)
        baselines = self.baseline(decided).view(-1, steps - 1, batch)
        if config.reinforce_core:
            decided = torch.cat(hiddens[:-1], 1)
        else:
            paths = looks.paths.flatten(1, 2)
        mean = self.location.known(decided, paths[:, : decided.shape[1]], looks.aims.flatten(1, 2))
        mean = mean.view(looks.drawn.shape)
        return Rollout(logits, gaussian_log_prob(looks.drawn, mean, self.location_std[:, None]), baselines)


def gaussian_log_prob(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log density of a Gaussian, summed over the last dimension (x and y)."""
    scaled = (sample - mean) / std
    return -(0.5 * scaled.square() + std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)
