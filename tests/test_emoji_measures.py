"""Measures of whole sets of pictures, against scipy and against loops; and how they meet blur."""

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy.linalg import sqrtm
from scipy.stats import binomtest

from plainsd.emoji.measures import (
    cell_means,
    compared,
    features_of,
    frechet_distance,
    gradient_energy,
    kernel_distance,
    standardised,
    wilson,
)


@pytest.mark.parametrize("right, count", [(0, 7), (7, 7), (3, 10), (501, 512), (1, 2)])
def test_wilson_is_scipys(right, count):
    theirs = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson(right, count) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_nothing_counted_says_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


def samples(seed: int, count: int, dims: int = 6, shift: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(shift, 1, (count, dims)) @ random.normal(0, 1, (dims, dims))


def test_frechet_distance_is_that_of_a_matrix_root():
    a, b = samples(1, 200), samples(2, 150, shift=0.5)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    theirs = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_frechet_distance_in_one_dimension_and_with_fewer_pictures_than_features():
    a, b = np.array([[0.0], [2.0]]), np.array([[5.0], [11.0]])  # deviations 2 ** 0.5 and 18 ** 0.5, means 1 and 8
    assert frechet_distance(a, b) == pytest.approx(49 + (18**0.5 - 2**0.5) ** 2)
    few = samples(3, 4)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_the_double_sum():
    a, b = samples(4, 12, 5), samples(5, 9, 5, 0.3)

    def k(x, y):
        return (float(x @ y) / 5 + 1) ** 3

    own_a = sum(k(a[i], a[j]) for i in range(12) for j in range(12) if i != j) / (12 * 11)
    own_b = sum(k(b[i], b[j]) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    cross = sum(k(x, y) for x in a for y in b) / (12 * 9)
    assert kernel_distance(a, b) == pytest.approx(own_a + own_b - 2 * cross, rel=1e-9)


def pictures(seed: int, count: int = 40, side: int = 64) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        pixels = np.full((side, side, 3), random.integers(0, 256, 3), np.uint8)
        for _ in range(6):
            top, left = random.integers(0, side - 12, 2)
            pixels[top : top + 12, left : left + 12] = random.integers(0, 256, 3)
        made.append(Image.fromarray(pixels))
    return made


def test_gradient_energy_by_hand():
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:, 2:] = 255  # of 12 horizontal pairs in each row's 3, one differs by 1
    assert gradient_energy(Image.fromarray(pixels)) == pytest.approx(1 / 3)
    assert gradient_energy(Image.fromarray(pixels.transpose(1, 0, 2))) == pytest.approx(1 / 3)


def test_blur_costs_in_every_measure():
    true, again = pictures(1, 150), pictures(2, 150)
    soft = [picture.filter(ImageFilter.GaussianBlur(1.5)) for picture in again]
    other, blurred = compared(again, true), compared(soft, true)
    assert 0.8 < other["sharpness"] < 1.25 and blurred["sharpness"] < 0.6
    assert blurred["fd"] > 1.5 * other["fd"] and blurred["kid"] > other["kid"]
    noise = np.random.default_rng(0).normal(0, 25, (64, 64, 3))
    noisy = [Image.fromarray((np.asarray(one) + noise).clip(0, 255).astype(np.uint8)) for one in true]
    assert compared(noisy, true)["sharpness"] > 1.05 and compared(true, true)["sharpness"] == 1


@pytest.mark.parametrize("side", [16, 32, 48, 64, 128, 136])
def test_features_have_one_length_at_any_size(side):
    features = features_of(pictures(1, 1, side)[0])
    assert features.shape == (12 + 16,) and np.isfinite(features).all()


def test_features_are_means_of_cells_and_falls_of_detail():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32, 32:] = (255, 51, 0)
    colours = features_of(Image.fromarray(pixels))[:12].reshape(2, 2, 3)
    assert colours[0, 1] == pytest.approx([1, 0.2, 0]) and colours.sum() == pytest.approx(1.2)
    assert cell_means(pixels / 255.0)[0, 1] == pytest.approx([1, 0.2, 0])
    checkered = np.indices((64, 64)).sum(0) % 2 * 255
    detail = features_of(Image.fromarray(checkered.astype(np.uint8)))[12:].reshape(4, 4)
    assert detail[0] == pytest.approx(np.log(0.501 / 0.001))  # the finest has all, 0.5, and the others none
    assert detail[1:3] == pytest.approx(0) and detail[3] == pytest.approx(np.log(0.001))


def test_features_count_alike():
    truth = np.random.default_rng(0).normal(3, (1, 100), (50, 2))
    truth = np.concatenate([truth, np.ones((50, 1))], 1)  # one that never varies says nothing
    found = standardised(truth, truth)
    assert found.shape == (50, 2) and found.mean(0) == pytest.approx([0, 0], abs=1e-9)
    assert found.std(0) == pytest.approx([1, 1])
