from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ramcore.retina import Retina


def slow_glimpse(canvas: np.ndarray, location, patch: int, scales: int, factor: int) -> np.ndarray:
    """The definition of a glimpse, pixel by pixel."""
    size = len(canvas)
    one, half = np.float32(1), np.float32(0.5)  # the sensor's precision: halfway between pixels, the last bit decides
    cx, cy = (int(np.floor((np.float32(v) + one) * np.float32(size / 2) + half)) for v in location)
    seen = np.zeros((scales, patch, patch))
    for k in range(scales):
        w = factor**k
        left, top = cx - patch * w // 2, cy - patch * w // 2
        for i in range(patch):
            for j in range(patch):
                for y in range(top + i * w, top + (i + 1) * w):
                    for x in range(left + j * w, left + (j + 1) * w):
                        if 0 <= y < size and 0 <= x < size:
                            seen[k, i, j] += canvas[y, x] / w**2
    return seen


def test_glimpses_of_a_4x4_canvas_equal_those_computed_by_hand():
    canvas = torch.arange(16.0).view(1, 4, 4)
    retina = Retina(patch_size=2, num_scales=2, canvas_size=4)
    centre = retina.see(canvas, torch.zeros(1, 2))[0]
    assert centre[0].tolist() == [[5, 6], [9, 10]]
    assert centre[1].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    upper_right = retina.see(canvas, torch.tensor([[1.0, -1.0]]))[0]
    assert upper_right[0].tolist() == [[0, 0], [3, 0]]
    assert upper_right[1].tolist() == [[0, 0], [(2 + 3 + 6 + 7) / 4, 0]]


def test_first_coordinate_is_horizontal():
    canvas = torch.zeros(1, 8, 8)
    canvas[0, 1, 6] = 1  # row 1, column 6
    retina = Retina(patch_size=1, num_scales=1, canvas_size=8)
    assert retina.see(canvas, torch.tensor([[0.5, -0.75]])).item() == 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 24),
    patch=st.integers(1, 9),
    scales=st.integers(1, 6),
    factor=st.integers(2, 3),
    x=st.floats(-1, 1, width=32),
    y=st.floats(-1, 1, width=32),
    seed=st.integers(0, 1000),
)
def test_glimpse_equals_the_definition(size, patch, scales, factor, x, y, seed):
    if factor ** (scales - 1) * patch > 64:
        scales = 2
    canvases = np.random.default_rng(seed).integers(0, 256, (2, size, size), np.uint8)
    location = torch.tensor([[x, y], [y, x]])
    retina = Retina(patch_size=patch, num_scales=scales, scale_factor=factor, canvas_size=size)
    seen = retina.see(torch.from_numpy(canvases), location).numpy()
    for i in range(2):
        slow = slow_glimpse(canvases[i] / 255, location[i].tolist(), patch, scales, factor)
        np.testing.assert_allclose(seen[i], slow, atol=1e-6)


def test_six_scales_wider_than_a_100_pixel_canvas_equal_the_definition():
    canvas = torch.randint(0, 256, (1, 100, 100), dtype=torch.uint8)
    retina = Retina(patch_size=5, num_scales=6, canvas_size=100)
    location = torch.tensor([[0.3, -0.9]])
    slow = slow_glimpse(canvas[0].numpy() / 255, location[0].tolist(), 5, 6, 2)
    np.testing.assert_allclose(retina.see(canvas, location)[0].numpy(), slow, atol=1e-6)


def test_float_images_with_leading_dimensions_equal_the_definition():
    canvases = torch.rand(3, 4, 20, 20)
    location = torch.rand(3, 4, 2) * 2 - 1
    retina = Retina(patch_size=6, num_scales=3, canvas_size=20)
    seen = retina.see(canvases, location)
    assert seen.shape == (3, 4, 3, 6, 6)
    np.testing.assert_allclose(
        seen[2, 1].numpy(), slow_glimpse(canvases[2, 1].numpy(), location[2, 1].tolist(), 6, 3, 2), atol=1e-6
    )


def test_replicates_that_share_a_pyramid_see_what_they_see_in_their_own():
    canvases = torch.randint(0, 256, (1, 5, 30, 30), dtype=torch.uint8)
    location = torch.rand(3, 5, 2) * 2 - 1
    retina = Retina(patch_size=4, num_scales=2, canvas_size=30)
    shared = retina.read(retina.pyramid(canvases), location)
    own = retina.read(retina.pyramid(canvases.expand(3, -1, -1, -1)), location)
    assert torch.equal(shared, own)


@pytest.mark.parametrize("canvas_size", [28, 60, 100])
def test_pyramid_grows_with_the_canvas_and_a_glimpse_does_not(canvas_size):
    retina = Retina(patch_size=12, num_scales=3, canvas_size=canvas_size)
    pyramid = retina.pyramid(torch.zeros(1, canvas_size, canvas_size, dtype=torch.uint8))
    assert len(pyramid.values) <= 3 * (canvas_size + 2 * retina.ring + 1) ** 2
    assert retina.read(pyramid, torch.zeros(1, 2)).shape == (1, 3 * 12 * 12)
