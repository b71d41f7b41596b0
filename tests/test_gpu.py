"""The CUDA kernels, compiled for the CPU and (-m gpu) on a GPU; and what only a GPU can show."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import threading
from typing import Any

import cuda_on_cpu
import pytest
import torch
from torch import Tensor

from benchmarks.synthetic import synthetic
from benchmarks.training import operations
from ramcore.config import TASKS, Config
from ramcore.evaluation import build_model
from ramcore.loss import losses_with_gradients, needs_every_step
from ramcore.model import RAM, Rollout
from ramcore.recipes import TUNED
from ramcore.retina import Retina
from ramcore.trainer import Trainer, _products

SMALL = Config(num_glimpses=4, patch_size=5, num_scales=3, glimpse_size=8, hidden_size=12)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
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


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.mark.parametrize("settings", NETWORKS)
def test_kernels_give_the_same_gradients_as_torch(settings, compiled, monkeypatch):
    config = dataclasses.replace(SMALL, **settings)
    expected = gradients(config, "cpu")
    called = cuda_on_cpu.use(compiled, monkeypatch)
    found = gradients(config, "cpu")
    assert found.keys() == expected.keys() and called["read"] and called["paths"]
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


@pytest.mark.parametrize("name", list(TASKS))
@pytest.mark.parametrize("device", DEVICES)
def test_kernel_draws_the_same_canvases_as_torch(digits_task, name, device, compiled, monkeypatch):
    task, seeds = digits_task(name), torch.tensor([0, 5, 11])
    index = torch.arange(90).view(3, 30) * 7
    cases = [("train", index), ("test", index[:1] // 7)]
    expected = [task.render(split, chosen, task.placement_keys(split, seeds, 3)) for split, chosen in cases]
    if device == "cpu":
        cuda_on_cpu.use(compiled, monkeypatch)
    there = task.to(device)
    for (split, chosen), canvases in zip(cases, expected, strict=True):
        keys = there.placement_keys(split, seeds.to(device), 3)
        assert torch.equal(there.render(split, chosen.to(device), keys).cpu(), canvases)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("patch", "scales", "factor", "side"), [(12, 3, 2, 60), (5, 2, 3, 100), (1, 6, 2, 28), (60, 1, 2, 60)]
)
def test_kernel_reads_the_same_bits_as_torch(patch, scales, factor, side, device, compiled, monkeypatch):
    retina = Retina(patch_size=patch, num_scales=scales, scale_factor=factor, canvas_size=side, gain=4.0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 50, side, side), dtype=torch.uint8, generator=generator)
    location = torch.rand(2, 50, 2, generator=generator) * 2 - 1
    location[0, :4] = torch.tensor([[-1.0, -1], [1, 1], [-1, 1], [0, 0]])
    expected = [retina.read(retina.pyramid(part), location) for part in (images, images[:1].expand(2, -1, -1, -1))]
    if device == "cpu":
        cuda_on_cpu.use(compiled, monkeypatch)
    for part, seen in zip((images, images[:1]), expected, strict=True):
        pyramid = retina.pyramid(part.to(device))
        assert pyramid.origin is None
        assert torch.equal(retina.read(pyramid, location.to(device)).cpu(), seen)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_mixing": 0.3, "discount": 0.7, "reinforce_weight": 0.2},
        {"step_supervision": 0.4, "reward": "probability", "reward_steps": "every", "discount": 0.5},
        {"loss_mixing": 0.0, "step_supervision": 1.0},
        {"model": "ram-random", "step_supervision": 0.5},
    ],
)
def test_kernel_follows_the_losses_back_as_autograd_does(settings, device, compiled, monkeypatch):
    config = dataclasses.replace(SMALL, **settings)
    generator = torch.Generator().manual_seed(0)
    batch = 300  # more than the kernel has threads
    logits = 3 * torch.randn(2, 4 if needs_every_step(config) else 1, batch, 10, generator=generator)
    means, samples = torch.randn(2, 2, 3, batch, 2, generator=generator)
    std, baselines = torch.tensor([0.3, 0.6])[:, None, None], torch.randn(2, 3, batch, generator=generator)
    labels = torch.randint(0, 10, (2, batch), generator=generator)
    uniform = torch.rand(2, batch, generator=generator)

    def followed(device: str) -> list[Tensor]:
        rollout = Rollout(*(x.to(device) for x in (logits, means, samples, std, baselines)))
        if config.model == "ram-random":
            rollout = Rollout.without_decisions(rollout.logits)
        leaves = [rollout.logits, rollout.means, rollout.baselines]
        for leaf in leaves:
            leaf.requires_grad_()
        losses = losses_with_gradients(config, rollout, labels.to(device), uniform.to(device))
        return [x.detach().cpu() for x in losses] + [torch.zeros(0) if x.grad is None else x.grad.cpu() for x in leaves]

    expected = followed("cpu")
    called = cuda_on_cpu.use(compiled, monkeypatch) if device == "cpu" else {"losses": 1}
    found = followed(device)
    assert called["losses"] == 1
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.view(reference.shape), reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_kernel_moves_the_weights_as_torchs_adam_does(tiny, clip, device, compiled, monkeypatch):
    config, data = dataclasses.replace(tiny[0], gradient_clip=clip, batch_size=5), tiny[1]

    def moved(device: str) -> dict[str, Any]:
        trainer = Trainer(config, data.to(device), seeds=(0, 1, 2), device=device)
        trainer.model.action.bias.data[1] = torch.inf  # diverges at once
        for draws in itertools.islice(trainer.draws(0), 4):
            trainer.optimise(draws)
        return trainer.state_dict()

    expected = moved("cpu")
    if device == "cpu":
        called = cuda_on_cpu.use(compiled, monkeypatch)
    found = moved(device)
    assert device != "cpu" or called["adam"] == 4
    assert found["alive"].tolist() == expected["alive"].tolist() == [True, False, True]
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name].cpu()[::2], weight[::2], rtol=1e-4, atol=1e-6)
    for mine, reference in zip(found["adam"]["state"].values(), expected["adam"]["state"].values(), strict=True):
        for name, value in reference.items():
            torch.testing.assert_close(mine[name].cpu(), value, rtol=1e-3, atol=1e-7, msg=name)


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
    # A trainer sets this, and puts back what it found: with threads, while another one trains.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
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
        # Products of a few rows and columns are computed in full precision all the same.
        config = dataclasses.replace(tiny[0], matmul_precision=precision, glimpse_size=128, hidden_size=256)
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


def test_a_step_has_at_most_130_operations_where_kernels_do_the_many_small_ones(compiled, monkeypatch):
    """A GPU's products sometimes are two kernels, so that it has some more than operations are counted here."""
    called = cuda_on_cpu.use(compiled, monkeypatch)
    few = dataclasses.replace(TUNED, batch_size=5)
    counted = operations(synthetic("translated", 500), torch.device("cpu"), few)["operations"]
    assert counted + called.total() // 3 <= 130  # three steps were taken


@pytest.mark.gpu
def test_a_step_has_at_most_150_kernels():
    device = torch.device("cuda")
    assert operations(synthetic("translated", 500).to(device), device)["kernels"] <= 150
