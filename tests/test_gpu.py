"""What only a GPU can show (-m gpu); and, on the CPU, that the code which calls the CUDA kernels calls them rightly."""

from __future__ import annotations

import dataclasses
import gc
import threading

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.synthetic import synthetic
from benchmarks.training import operations
from ramcore import kernels
from ramcore.config import TASKS, Config
from ramcore.evaluation import build_model
from ramcore.model import RAM
from ramcore.retina import Pyramid, Retina
from ramcore.trainer import Trainer, _products

SMALL = Config(num_glimpses=4, patch_size=5, num_scales=3, glimpse_size=8, hidden_size=12)
NETWORKS = [
    {},
    {"location_hidden": 6, "location_input": "state+paths", "reinforce_core": True},
    {"location_input": "state+paths"},
    {"core": "gru", "layer_norm": True, "location_hidden": 6},
    {"core": "lstm", "scale_factor": 3},
    {"model": "ram-random"},
]


def gradients(config: Config, device: str) -> dict[str, Tensor]:
    """Gradients of all weights, and what was seen, for fixed random numbers."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 7, 60, 60), dtype=torch.uint8, generator=generator).to(device)
    first = (torch.rand(2, 7, 2, generator=generator) * 2 - 1).to(device)
    noise = (torch.rand(2, 3, 7, 2, generator=generator) * 2 - 1).to(device)
    model = build_model(config, torch.tensor([3, 4], device=device))
    assert isinstance(model, RAM)
    glimpses = model.look(model.retina.pyramid(images), first, noise, keep=True)
    rollout = model.rollout(glimpses, every_step=True)
    loss = sum((part * torch.linspace(-1, 1, part.numel(), device=device).view_as(part)).sum() for part in rollout)
    assert isinstance(loss, Tensor)
    loss.backward()
    model.backward(glimpses, rollout)
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    followed = None if config.model == "ram" else noise
    mean = model.look(model.retina.pyramid(images[:1]), first, followed)  # as evaluation does
    return found | {"seen": glimpses.seen.cpu(), "locations": glimpses.locations.cpu(), "mean": mean.hiddens.cpu()}


class Pretended:
    """The kernels, done by torch on the CPU; each counts as one operation. As ramcore/kernels.py describes them."""

    def usable(self, device: torch.device) -> bool:
        return True

    def wait_for(self, table: Tensor) -> None:
        pass

    def render(self, images, index, keys, canvas, clutter, sizes) -> Tensor:
        return torch.zeros(*index.shape, canvas, canvas, dtype=torch.uint8)

    def read(
        self, canvases: Tensor, location: Tensor, weight: Tensor, out: Tensor, scales: int, patch: int, factor: int
    ) -> None:
        retina = Retina(patch_size=patch, num_scales=scales, scale_factor=factor, canvas_size=canvases.shape[-1])
        seen = retina.see(canvases.float().expand(len(location), -1, -1, -1) / 255, location).flatten(2)
        out.copy_(seen * weight[0] * 255)

    def rectify(self, out: Tensor, bias: Tensor, other: Tensor | None = None) -> None:
        out.add_(bias if other is None else bias + other).relu_()

    def paths(self, out: Tensor, what_bias: Tensor, location: Tensor, where: Tensor, where_bias: Tensor) -> None:
        what, place = out.chunk(2, -1)
        what += what_bias
        place.copy_(torch.baddbmm(where_bias, location, where))
        out.relu_()

    def policy(self, products, bias, noise, std, mean, sample, location) -> None:
        assert len(products) == 1 or products[1][1].data_ptr() > products[0][1].data_ptr()
        mean.copy_(torch.tanh(sum((x.bmm(w) for x, w in products), bias)))
        sample.copy_(mean if noise is None else mean + noise * std)
        location.copy_(sample.clamp(-1, 1))


@pytest.mark.parametrize("settings", NETWORKS)
def test_code_that_calls_the_kernels_does_what_the_rest_does(settings, monkeypatch):
    config = dataclasses.replace(SMALL, **settings)
    expected = gradients(config, "cpu")
    pretended = Pretended()
    for name in ("usable", "read", "rectify", "paths", "policy"):
        monkeypatch.setattr(kernels, name, getattr(pretended, name))
    found = gradients(config, "cpu")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", NETWORKS)
def test_gpu_and_cpu_have_the_same_gradients(settings):
    config = dataclasses.replace(SMALL, **settings)
    expected, found = gradients(config, "cpu"), gradients(config, "cuda")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(TASKS))
def test_cpu_and_gpu_draw_the_same_canvases(digits_task, name):
    task, seeds = digits_task(name), torch.tensor([0, 5, 11])
    index = torch.arange(90).view(3, 30) * 7
    on_gpu = task.to("cuda")
    for split, chosen in (("train", index), ("test", index[:1])):
        keys = task.placement_keys(split, seeds, 3)
        drawn = on_gpu.render(split, chosen.cuda(), on_gpu.placement_keys(split, seeds.cuda(), 3))
        assert torch.equal(drawn.cpu(), task.render(split, chosen, keys))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("patch", "scales", "factor", "side"), [(12, 3, 2, 60), (5, 2, 3, 100), (1, 6, 2, 28), (60, 1, 2, 60)]
)
def test_cpu_and_gpu_read_the_same_bits(patch, scales, factor, side):
    retina = Retina(patch_size=patch, num_scales=scales, scale_factor=factor, canvas_size=side, gain=4.0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 50, side, side), dtype=torch.uint8, generator=generator)
    location = torch.rand(2, 50, 2, generator=generator) * 2 - 1
    location[0, :4] = torch.tensor([[-1.0, -1], [1, 1], [-1, 1], [0, 0]])
    pyramid: Pyramid = retina.pyramid(images.cuda())
    assert pyramid.origin is None
    assert torch.equal(retina.read(pyramid, location.cuda()).cpu(), retina.read(retina.pyramid(images), location))
    shared = retina.read(retina.pyramid(images[:1].cuda()), location.cuda()).cpu()
    assert torch.equal(shared, retina.read(retina.pyramid(images[:1].expand(2, -1, -1, -1)), location))


@pytest.mark.gpu
def test_gpu_and_cpu_training_agree(tiny):
    config, data = tiny
    cpu, gpu = Trainer(config, data, seeds=(0, 1)), Trainer(config, data, seeds=(0, 1), device="cuda")
    for _ in range(2):
        a, b = cpu.epoch(), gpu.epoch()
    assert b.train_loss == pytest.approx(a.train_loss, rel=1e-2)
    state = gpu.state_dict()
    restored = Trainer(config, data, seeds=(0, 1), device="cuda")
    restored.load_state_dict(state)
    assert dataclasses.replace(restored.epoch(), seconds=0) == dataclasses.replace(gpu.epoch(), seconds=0)


@pytest.mark.gpu
def test_training_continues_on_the_other_kind_of_device(tiny):
    config, data = tiny
    for first, second in (("cpu", "cuda"), ("cuda", "cpu")):
        whole, half = Trainer(config, data, (0, 1), first), Trainer(config, data, (0, 1), first)
        for trainer in (whole, half):
            trainer.epoch()
        moved = Trainer(config, data, (0, 1), second)
        moved.load_state_dict(half.state_dict())
        assert moved.epoch().train_loss == pytest.approx(whole.epoch().train_loss, rel=1e-2)
        assert moved.state_dict()["best_weights"]["action.bias"].device.type == second


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"model": "cnn"}, {"core": "gru"}])
def test_trials_that_share_a_card_give_to_the_last_digit_what_each_gives_alone(tiny, settings):
    config, data = dataclasses.replace(tiny[0], **settings), tiny[1].to("cuda")

    def train(seed: int, found: dict[int, object]) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            trainer = Trainer(config, data, seeds=(seed, 50 + seed), device="cuda")
            metrics = [dataclasses.replace(trainer.epoch(), seconds=0) for _ in range(3)]
            found[seed] = metrics, trainer.evaluate("test")

    alone: dict[int, object] = {}
    together: dict[int, object] = {}
    threads = [threading.Thread(target=train, args=(seed, together)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(6):
        train(seed, alone)
    assert together == alone


def test_precision_of_products_is_set_on_a_gpu_alone_and_put_back():
    for device, inside in (("cuda", "high"), ("cpu", "highest")):
        with _products(Config(matmul_precision="high"), torch.device(device)):
            assert torch.get_float32_matmul_precision() == inside
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.gpu
def test_tf32_products_train_as_well(tiny):
    losses = {}
    for precision in ("highest", "high"):
        config = dataclasses.replace(tiny[0], matmul_precision=precision)
        trainer = Trainer(config, tiny[1], seeds=(0, 1, 2), device="cuda")
        losses[precision] = [trainer.epoch().train_loss for _ in range(2)][-1]
    assert losses["high"] != losses["highest"]
    assert losses["high"] == pytest.approx(losses["highest"], rel=0.05)


@pytest.mark.gpu
def test_memory_is_given_back_between_trials(tiny):
    config, data = tiny
    held = []
    for seed in range(4):
        trainer = Trainer(config, data, seeds=(seed,), device="cuda")
        trainer.epoch()
        del trainer
        gc.collect()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    assert held[3] <= held[1]


def test_a_step_has_at_most_200_operations_where_kernels_do_the_many_small_ones(monkeypatch):
    """On the CPU, with pretended kernels that count as one each. A GPU's products sometimes are two kernels."""
    pretended, called = Pretended(), []

    def one(name):
        def call(*args):
            called.append(name)
            with _disable_current_modes():
                return getattr(pretended, name)(*args)

        return call

    for name in ("read", "render", "rectify", "paths", "policy"):
        monkeypatch.setattr(kernels, name, one(name))
    monkeypatch.setattr(kernels, "usable", pretended.usable)
    assert operations(synthetic("translated", 500), torch.device("cpu"))["operations"] + len(called) // 3 <= 200


@pytest.mark.gpu
def test_a_step_has_at_most_250_kernels():
    device = torch.device("cuda")
    assert operations(synthetic("translated", 500).to(device), device)["kernels"] <= 250
