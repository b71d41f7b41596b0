"""A Recurrent Attention Model as public repositories write it, for comparison in `benchmarks.training`.

It is new code in their usual form (such as kevinzakka/recurrent-visual-attention): a retina that slices every image in
a Python loop and pools the wider patches, an nn.Module for each network, one pass through them for each glimpse, and
torch.optim.Adam. The networks, the loss and the sizes are those of ramcore's defaults.

B images, T glimpses, K scales, P patch side, S canvas side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional

from ramcore.config import Config


class Retina:
    """Concentric patches, the wider ones average-pooled to the size of the finest."""

    def __init__(self, patch_size: int, num_scales: int, scale_factor: int) -> None:
        self.patch_size, self.num_scales, self.scale_factor = patch_size, num_scales, scale_factor

    def foveate(self, images: Tensor, location: Tensor) -> Tensor:
        """images: (B, 1, S, S) in [0, 1], location: (B, 2) in [-1, 1]; returns (B, K * P * P)."""
        patches, size = [], self.patch_size
        for _ in range(self.num_scales):
            patch = self.extract(images, location, size)
            patches.append(functional.avg_pool2d(patch, size // self.patch_size))
            size *= self.scale_factor
        return torch.cat(patches, 1).flatten(1)

    def extract(self, images: Tensor, location: Tensor, size: int) -> Tensor:
        """One square patch of each image, (B, 1, size, size), zero beyond the canvas."""
        start = (0.5 * (location + 1) * images.shape[-1] + 0.5).long()
        end = start + size
        padded = functional.pad(images, (size // 2, size // 2, size // 2, size // 2))
        patch = [padded[i, :, start[i, 1] : end[i, 1], start[i, 0] : end[i, 0]] for i in range(len(images))]
        return torch.stack(patch)


class GlimpseNetwork(nn.Module):
    """Encodes what was seen and where."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.retina = Retina(config.patch_size, config.num_scales, config.scale_factor)
        self.what_1 = nn.Linear(config.glimpse_pixels, config.glimpse_size)
        self.where_1 = nn.Linear(2, config.glimpse_size)
        self.what_2 = nn.Linear(config.glimpse_size, config.hidden_size)
        self.where_2 = nn.Linear(config.glimpse_size, config.hidden_size)

    def forward(self, images: Tensor, location: Tensor) -> Tensor:
        """Returns (B, H)."""
        what = torch.relu(self.what_1(self.retina.foveate(images, location)))
        where = torch.relu(self.where_1(location))
        return torch.relu(self.what_2(what) + self.where_2(where))


class CoreNetwork(nn.Module):
    """The rectified RNN."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input = nn.Linear(config.hidden_size, config.hidden_size)
        self.recurrent = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, code: Tensor, h: Tensor) -> Tensor:
        """Returns (B, H)."""
        return torch.relu(self.input(code) + self.recurrent(h))


class LocationNetwork(nn.Module):
    """The Gaussian policy."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.std = config.location_std
        self.mean = nn.Linear(config.hidden_size, 2)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the log probability (B,) of a sampled location and the location (B, 2), clipped to the canvas."""
        policy = Normal(torch.tanh(self.mean(h.detach())), self.std)
        sample = policy.sample()
        return policy.log_prob(sample).sum(1), sample.clamp(-1, 1)


class PlainRAM(nn.Module):
    """All networks; one forward pass is one glimpse."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.sensor = GlimpseNetwork(config)
        self.core = CoreNetwork(config)
        self.locator = LocationNetwork(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_classes)
        self.baseliner = nn.Linear(config.hidden_size, 1)

    def forward(self, images: Tensor, location: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns h (B, H), the next location, its log probability (B,) and the baseline (B,)."""
        h = self.core(self.sensor(images, location), h)
        log_prob, location = self.locator(h)
        return h, location, log_prob, self.baseliner(h.detach()).squeeze(1)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """images: (B, 1, S, S) in [0, 1], labels: (B,); returns the hybrid loss and the accuracy."""
        h = images.new_zeros(len(images), self.config.hidden_size)
        location = torch.rand(len(images), 2, device=images.device) * 2 - 1
        log_probs, baselines = [], []
        for _ in range(self.config.num_glimpses - 1):
            h, location, log_prob, baseline = self(images, location, h)
            log_probs.append(log_prob)
            baselines.append(baseline)
        h = self.core(self.sensor(images, location), h)
        log_classes = functional.log_softmax(self.classifier(h), dim=1)
        reward = (log_classes.detach().argmax(1) == labels).float()
        returns, baseline = reward.expand(len(baselines), -1), torch.stack(baselines)
        policy = -(torch.stack(log_probs) * (returns - baseline.detach())).sum(0).mean()
        total = functional.nll_loss(log_classes, labels) + functional.mse_loss(baseline, returns) + policy
        return total, reward.mean()


class PlainTrainer:
    """Trains on canvases that are already rendered, since these repositories leave that to a data loader."""

    def __init__(self, config: Config, device: torch.device | str = "cpu") -> None:
        self.model = PlainRAM(config).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One optimisation step on images (B, 1, S, S) in [0, 1]; returns the accuracy."""
        total, accuracy = self.model.loss(images, labels)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        return accuracy
