"""The Recurrent Attention Model (Mnih et al. 2014, section 3).

`RAM.look` takes the glimpses one after another: the retina reads the canvas, the glimpse network encodes what it read
and where, the core updates its state, and the location network chooses the next location. `RAM.rollout` then computes
what the losses need from all glimpses at once. `ramcore.loss` takes the losses' gradients back to the class scores, the
baselines and the policy's means, and `RAM.backward` takes them on to the weights. A sampled location carries no
gradient, so this is the policy gradient.

Why not autograd all the way: what a glimpse reads is fixed once it is taken, so only the core's state has to be
followed from glimpse to glimpse. Every other gradient is one matrix product for all glimpses, where autograd makes one
a glimpse and adds them up. A GPU's step has half as many kernels this way.

R replicates, B images of a batch, T glimpses, t of these glimpses, K scales, P patch side, G units of a glimpse path,
H hidden units, L units of the location network's hidden layer, C classes. Locations are (x, y) in [-1, 1], 0 the
canvas' centre.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ramcore import kernels
from ramcore.config import Config
from ramcore.layers import (
    LayerNorm,
    Linear,
    Weights,
    gradient_of,
    rectified,
    rows,
    sum_rows,
    summed,
    through,
    weight_gradients,
)
from ramcore.retina import Pyramid, Retina

threshold_backward = torch.ops.aten.threshold_backward
State = tuple[Tensor, ...]  # of the core; its first tensor is the output h, (R, B, H)


class Glimpses(NamedTuple):
    """T glimpses at B images by R networks.

    locations: (R, T, B, 2), clipped to the canvas.
    samples: (R, T - 1, B, 2), the later locations before clipping; the policy's means where nothing was sampled.
    means: (R, T - 1, B, 2), of the location policy; not set with model ram-random.
    hiddens: (R, T, B, H), the core's output after each glimpse.

    For `RAM.backward`; without `keep`, of the last glimpse alone:
    seen: (R, T, B, K * P * P), what the retina read.
    paths: (R, T, B, 2 * G). codes: (R, T, B, H), before the norm if there is one.
    aims: (R, T - 1, B, L), the location network's hidden layer.
    core: for each glimpse what `CoreNetwork.backward` needs.
    """

    locations: Tensor
    samples: Tensor
    means: Tensor
    hiddens: Tensor
    seen: Tensor
    paths: Tensor
    codes: Tensor
    aims: Tensor
    core: list[tuple[Tensor, Tensor, State]]


class Rollout(NamedTuple):
    """What the losses need of T glimpses at B images by R networks.

    logits: (R, t, B, C) class scores after each of the last t glimpses; t is T or 1.
    means, samples: (R, T - 1, B, 2) of the policy that places the second and later glimpses.
    std: (R, 1, 1), the policy's standard deviation.
    baselines: (R, T - 1, B) predicted return at each of those decisions.
    """

    logits: Tensor
    means: Tensor
    samples: Tensor
    std: Tensor
    baselines: Tensor

    @classmethod
    def without_decisions(cls, logits: Tensor) -> Rollout:
        """The rollout of a network that chooses no location, from its scores (R, t, B, C)."""
        none = logits.new_empty(len(logits), 0, logits.shape[2])
        places = logits.new_empty(*none.shape, 2)
        return cls(logits, places, places, logits.new_ones(len(logits), 1, 1), none)

    @property
    def log_probs(self) -> Tensor:
        """(R, T - 1, B), of the samples."""
        return gaussian_log_prob(self.samples, self.means, self.std[:, None])


class GlimpseNetwork(nn.Module):
    """Encodes what was seen and where: Rect(Linear(Rect(Linear(what))) + Linear(Rect(Linear(where)))).

    The two outer linear layers are one layer on the concatenated paths.
    """

    def __init__(self, weights: Weights, config: Config) -> None:
        super().__init__()
        self.what = Linear(weights, config.glimpse_pixels, config.glimpse_size)
        self.where = Linear(weights, 2, config.glimpse_size)
        self.code = Linear(weights, 2 * config.glimpse_size, config.hidden_size)
        self.norm = LayerNorm(weights, config.hidden_size) if config.layer_norm else None

    def forward(self, seen: Tensor, location: Tensor, paths: Tensor, code: Tensor) -> Tensor:
        """seen: (R, B, K * P * P), location: (R, B, 2); fills paths (R, B, 2 * G), and code (R, B, H) before the norm.

        Returns the code.
        """
        what, where = paths.chunk(2, -1)
        if kernels.usable(seen.device):
            torch.bmm(seen, self.what.weight, out=what)
            kernels.paths(paths, self.what.bias, location, self.where.weight, self.where.bias)
        else:
            torch.baddbmm(self.what.bias, seen, self.what.weight, out=what)
            torch.baddbmm(self.where.bias, location, self.where.weight, out=where)
            paths.relu_()
        if self.norm is None:
            return rectified(code, [self.code.bias], [(paths, self.code.weight)])
        return self.norm(torch.baddbmm(self.code.bias, paths, self.code.weight, out=code)).relu_()

    def rectify(self, code: Tensor) -> Tensor:
        """The code, from what `Glimpses.codes` keeps of it."""
        return code if self.norm is None else self.norm(code).relu()

    def backward(self, glimpses: Glimpses, to_code: Tensor, to_paths: Tensor | None) -> None:
        """Write the gradients.

        Args:
            glimpses: all T of them.
            to_code: the gradient of the codes (R, T * B, H).
            to_paths: the gradient of the first T - 1 glimpses' paths that comes from elsewhere.
        """
        code, paths = glimpses.codes.flatten(1, 2), glimpses.paths.flatten(1, 2)
        if self.norm is None:
            to_code = threshold_backward(to_code, code, 0)
        else:
            (to_code,) = through(self.rectify, [code], [to_code], list(self.norm.parameters()))
        weight_gradients(self.code, [paths], to_code)
        total = to_code.bmm(self.code.weight.mT)
        if to_paths is not None:
            total[:, : to_paths.shape[1]] += to_paths
        total = threshold_backward(total, paths, 0)
        to_what, to_where = total.chunk(2, -1)
        weight_gradients(self.what, [glimpses.seen.flatten(1, 2)], to_what)
        weight_gradients(self.where, [glimpses.locations.flatten(1, 2)], to_where)


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
        self.is_plain = config.core == "rnn" and not config.layer_norm

    def forward(
        self, code: Tensor, state: State | None, out: Tensor, kept: list[tuple[Tensor, Tensor, State]]
    ) -> State:
        """The state after a glimpse's code (R, B, H), whose output goes into out; None is the state before the first.

        That state is zero and needs no product. `kept` gets what `backward` needs.
        """
        if self.is_plain:
            products = [(code, self.input.weight)] + ([(state[0], self.recurrent.weight)] if state else [])
            return (rectified(out, [self.input.bias, self.recurrent.bias], products),)
        from_h = self.recurrent(state[0]) if state else self.recurrent.bias
        zero = torch.zeros_like(code)
        kept.append((self.input(code), from_h, state or (zero, zero)[: 2 if self.kind == "lstm" else 1]))
        new = self.step(*kept[-1])
        return (out.copy_(new[0]), *new[1:])

    def step(self, from_input: Tensor, from_h: Tensor, state: State) -> State:
        """The next state. from_input and from_h: (R, B, gates * H), or from_h (R, 1, gates * H)."""
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

    def backward(self, glimpses: Glimpses, code: Tensor, to_hiddens: Tensor, *, filled: bool) -> Tensor:
        """Write the gradients; returns that of the codes (R, T * B, H).

        Args:
            glimpses: all T of them.
            code: (R, T * B, H).
            to_hiddens: (R, T, B, H), the gradient of the hiddens from elsewhere. It is overwritten.
            filled: whether all of it is set; else only the last glimpse's is.
        """
        hiddens, last = glimpses.hiddens, glimpses.hiddens.shape[1] - 1
        if self.is_plain:
            for t in reversed(range(last + 1)):
                here = to_hiddens[:, t]
                if t < last:
                    here.baddbmm_(to_hiddens[:, t + 1], self.recurrent.weight.mT, beta=float(filled))
                threshold_backward.grad_input(here, hiddens[:, t], 0, grad_input=here)
            to_input = to_h = to_hiddens
        else:
            to_hiddens[:, : 0 if filled else last] = 0
            to_input, to_h = self._backward_by_glimpse(glimpses, to_hiddens)
        to_input = to_input.flatten(1, 2)
        weight_gradients(self.input, [code], to_input)
        if last:
            before = hiddens[:, :last].flatten(1, 2)
            torch.bmm(before.mT, to_h[:, 1:].flatten(1, 2), out=gradient_of(self.recurrent.weight))
        if self.is_plain:
            gradient_of(self.recurrent.bias).copy_(gradient_of(self.input.bias))
        else:
            sum_rows(to_h.flatten(1, 2), out=gradient_of(self.recurrent.bias))
        return to_input.bmm(self.input.weight.mT)

    def _backward_by_glimpse(self, glimpses: Glimpses, to_hiddens: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of what the products with the codes and with the states gave, each (R, T, B, gates * H)."""
        replicates, steps, batch = to_hiddens.shape[:3]
        to_input, to_h = to_hiddens.new_zeros(2, replicates, steps, batch, self.input.weight.shape[-1])
        to_state = [torch.zeros_like(to_hiddens[:, 0]) for _ in glimpses.core[0][2]]
        for t in reversed(range(steps)):
            from_input, from_h, state = glimpses.core[t]
            from_h = from_h.expand(from_input.shape)
            to_state[0] = to_state[0] + to_hiddens[:, t]
            parts = [from_input, from_h, *state]
            to_input[:, t], to_h[:, t], *to_state = through(
                lambda i, h, *s: self.step(i, h, s), parts, to_state, list(self.norms.parameters())
            )
            to_state[0] = to_state[0] + to_h[:, t].bmm(self.recurrent.weight.mT)
        return to_input, to_h


class LocationNetwork(nn.Module):
    """The mean of the location policy: tanh of a linear map of its input, or of one rectified layer on its input.

    The input is the core's state, as in the papers, or the state and the newest glimpse's paths. The state is trained
    to classify the digit and holds little about its place in the glimpse.
    """

    def __init__(self, weights: Weights, config: Config) -> None:
        super().__init__()
        self.reads_paths = config.location_input == "state+paths"
        self.moves_core = config.reinforce_core
        size = config.hidden_size + (2 * config.glimpse_size if self.reads_paths else 0)
        hidden = config.location_hidden
        self.hidden = Linear(weights, size, hidden) if hidden else None
        self.mean = Linear(weights, hidden or size, 2)

    def forward(self, h: Tensor, paths: Tensor, noise: Tensor | None, std: Tensor, out: tuple[Tensor, ...]) -> None:
        """Choose the next location.

        Args:
            h: (R, B, H). paths: (R, B, 2 * G).
            noise: (R, B, 2) standard normal; None: the location is the policy's mean.
            std: (R, 1, 1), the policy's standard deviation.
            out: to be filled: the hidden layer (R, B, L), and (R, B, 2) each, the mean, the sample and the location.
        """
        aim, mean, sample, location = out
        read = [h, paths] if self.reads_paths else [h]
        if self.hidden is not None:
            read = [rectified(aim, [self.hidden.bias], rows(self.hidden.weight, read))]
        products = rows(self.mean.weight, read)
        if kernels.usable(h.device):
            kernels.policy(products, self.mean.bias, noise, std, mean, sample, location)
            return
        summed(mean, products, self.mean.bias).tanh_()
        if noise is None:
            sample.copy_(mean)
        else:
            torch.addcmul(mean, noise, std, out=sample)
        torch.clamp(sample, -1, 1, out=location)

    def backward(self, glimpses: Glimpses, to_means: Tensor) -> list[Tensor]:
        """Write the gradients, given that of the means (R, T - 1, B, 2).

        Returns the gradients of the states and, if it reads them, of the paths: (R, (T - 1) * B, ...); none if the
        policy does not train the core.
        """
        read = [x[:, :-1].flatten(1, 2) for x in (glimpses.hiddens, glimpses.paths)[: 1 + self.reads_paths]]
        to = torch.ops.aten.tanh_backward(to_means, glimpses.means).flatten(1, 2)
        layer = self.mean
        if self.hidden is not None:
            aims = glimpses.aims.flatten(1, 2)
            weight_gradients(self.mean, [aims], to)
            to = threshold_backward(to.bmm(self.mean.weight.mT), aims, 0)
            layer = self.hidden
        weight_gradients(layer, read, to)
        return [to.bmm(w.mT) for _, w in rows(layer.weight, read)] if self.moves_core else []


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

    @torch.no_grad()
    def look(self, pyramid: Pyramid, first: Tensor, noise: Tensor | None = None, *, keep: bool = False) -> Glimpses:
        """Take the glimpses.

        Args:
            pyramid: of the canvases, from `self.retina`, leading dimensions (R, B) or (1, B).
            first: (R, B, 2), the first locations.
            noise: (R, T - 1, B, 2) standard normal, to sample the later locations; None: they are the policy's means.
                With model ram-random: the later locations themselves.
            keep: whether to keep all that `backward` needs.
        """
        glimpses = self._unfilled(first, keep)
        state = None
        glimpses.locations[:, 0] = first
        for t in range(self.config.num_glimpses):
            slot = t if keep else 0
            location, paths, code = glimpses.locations[:, t], glimpses.paths[:, slot], glimpses.codes[:, slot]
            seen = self.retina.read(pyramid, location, out=glimpses.seen[:, slot])
            code = self.glimpse(seen, location, paths, code)
            state = self.core(code, state, glimpses.hiddens[:, t], glimpses.core)
            if t == self.config.num_glimpses - 1:
                break
            if self.config.model == "ram-random":
                assert noise is not None
                glimpses.samples[:, t] = glimpses.locations[:, t + 1] = noise[:, t]
                continue
            drawn = None if noise is None else noise[:, t]
            filled = (glimpses.means[:, t], glimpses.samples[:, t], glimpses.locations[:, t + 1])
            self.location(state[0], paths, drawn, self.location_std, (glimpses.aims[:, slot], *filled))
        return glimpses

    def _unfilled(self, first: Tensor, keep: bool) -> Glimpses:
        """Memory for all glimpses: written in place, since joining them afterwards would copy everything once more."""
        config = self.config
        steps = config.num_glimpses

        def empty(size: int, count: int) -> Tensor:
            return first.new_empty(len(first), count, first.shape[1], size)

        return Glimpses(
            locations=empty(2, steps),
            samples=empty(2, steps - 1),
            means=empty(2, steps - 1),
            hiddens=empty(config.hidden_size, steps),
            seen=empty(config.glimpse_pixels, steps if keep else 1),
            paths=empty(2 * config.glimpse_size, steps if keep else 1),
            codes=empty(config.hidden_size, steps if keep else 1),
            aims=empty(config.location_hidden, steps - 1 if keep else 1),
            core=[],
        )

    def scores(self, hiddens: Tensor) -> Tensor:
        """hiddens: (R, t, B, H); returns class scores (R, t, B, C)."""
        return self.action(hiddens.flatten(1, 2)).unflatten(1, hiddens.shape[1:3])

    def rollout(self, glimpses: Glimpses, *, every_step: bool = False) -> Rollout:
        """What the losses need of glimpses that `look` has just taken, with noise.

        Its logits, baselines and means are leaves, whose .grad `backward` starts from. every_step: score classes after
        every glimpse, not only after the last.
        """
        hiddens = glimpses.hiddens
        with torch.no_grad():
            logits = self.scores(hiddens if every_step else hiddens[:, -1:]).requires_grad_()
            if not self._decides:
                return Rollout.without_decisions(logits)
            baselines = self.baseline(hiddens[:, :-1].flatten(1, 2)).view(glimpses.means.shape[:3]).requires_grad_()
        return Rollout(logits, glimpses.means.requires_grad_(), glimpses.samples, self.location_std, baselines)

    @property
    def _decides(self) -> bool:
        return self.config.model == "ram" and self.config.num_glimpses > 1

    @torch.no_grad()
    def backward(self, glimpses: Glimpses, rollout: Rollout) -> None:
        """Write the gradients of all weights into their .grad, given those of the rollout's leaves.

        glimpses: taken with `keep`. A weight that has no gradient is left alone.
        """
        for module in self.modules():
            if isinstance(module, LayerNorm):
                for parameter in module.parameters():
                    gradient_of(parameter).zero_()
        hiddens, to_logits = glimpses.hiddens, rollout.logits.grad
        assert to_logits is not None
        scored, to_logits = to_logits.shape[1], to_logits.flatten(1, 2)
        filled = scored == hiddens.shape[1]
        weight_gradients(self.action, [hiddens[:, -scored:].flatten(1, 2)], to_logits)
        to_hiddens = torch.empty_like(hiddens)
        torch.bmm(to_logits, self.action.weight.mT, out=to_hiddens[:, -scored:].flatten(1, 2))
        to_read: list[Tensor] = []
        if self._decides:
            assert rollout.baselines.grad is not None and rollout.means.grad is not None
            # The baseline does not train the core.
            weight_gradients(
                self.baseline, [hiddens[:, :-1].flatten(1, 2)], rollout.baselines.grad.flatten(1)[..., None]
            )
            to_read = self.location.backward(glimpses, rollout.means.grad)
        if to_read:
            to_state = to_read[0].view(to_hiddens[:, :-1].shape)
            to_hiddens[:, :-1] = to_hiddens[:, :-1] + to_state if filled else to_state
            filled = True
        code = self.glimpse.rectify(glimpses.codes.flatten(1, 2))
        to_code = self.core.backward(glimpses, code, to_hiddens, filled=filled)
        self.glimpse.backward(glimpses, to_code, to_read[1] if len(to_read) > 1 else None)


def gaussian_log_prob(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log density of a Gaussian, summed over the last dimension (x and y)."""
    scaled = (sample - mean) / std
    return -(0.5 * scaled.square() + std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)
