from __future__ import annotations

import pytest
import torch

from ramcore.rng import Stream, bits, integers, key, normal, permutation, uniform

SEEDS = torch.tensor([0, 1, 12345])


def test_bits_equal_the_published_outputs_of_splitmix64():
    """The first outputs for seed 1234567."""
    found = bits(torch.tensor(1234567), torch.arange(1, 6))
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [x % 2**64 for x in found.tolist()] == expected


def test_numbers_of_a_replicate_do_not_depend_on_the_others():
    together = normal(key(SEEDS, Stream.LOCATION_NOISE, 3, 4), 10)
    for r in range(len(SEEDS)):
        assert torch.equal(together[r : r + 1], normal(key(SEEDS[r : r + 1], Stream.LOCATION_NOISE, 3, 4), 10))


def test_counters_as_tensors_give_the_same_keys_as_numbers():
    numbers = key(SEEDS, Stream.BATCH_ORDER, 5, 7)
    assert torch.equal(numbers, key(SEEDS, Stream.BATCH_ORDER, torch.tensor(5), torch.tensor(7)))
    assert not torch.equal(numbers, key(SEEDS, Stream.BATCH_ORDER, 7, 5))
    assert not torch.equal(numbers, key(SEEDS, Stream.PLACEMENT, 5, 7))


def test_uniform_normal_and_whole_numbers_have_their_distributions():
    keys = key(torch.arange(4), Stream.PLACEMENT)
    u = uniform(keys, 100_000)
    assert 0 <= u.min() and u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=0.002)
    assert u.var().item() == pytest.approx(1 / 12, abs=0.001)
    z = normal(keys, 100_001)
    assert z.shape == (4, 100_001)
    assert z.mean().item() == pytest.approx(0, abs=0.005)
    assert z.std().item() == pytest.approx(1, abs=0.005)
    assert (z.abs() < 1.96).float().mean().item() == pytest.approx(0.95, abs=0.002)
    assert torch.corrcoef(u)[0, 1].abs() < 0.01
    counts = torch.bincount(integers(keys[:, None], torch.arange(66_000), 33).flatten(), minlength=33)
    assert len(counts) == 33
    assert (counts - 8000).abs().max() < 5 * 8000**0.5


def test_permutation_holds_every_index_once_and_differs_between_seeds():
    order = permutation(key(SEEDS, Stream.BATCH_ORDER, 0), 1000)
    assert torch.equal(order.sort(1).values, torch.arange(1000).expand(3, -1))
    assert not torch.equal(order[0], order[1])


@pytest.mark.gpu
def test_cpu_and_gpu_give_the_same_numbers():
    keys = key(SEEDS, Stream.PLACEMENT, 1)
    gpu = key(SEEDS.cuda(), Stream.PLACEMENT, 1)
    assert torch.equal(keys, gpu.cpu())
    assert torch.equal(uniform(keys, 1000), uniform(gpu, 1000).cpu())
    assert torch.equal(permutation(keys, 1000), permutation(gpu, 1000).cpu())
