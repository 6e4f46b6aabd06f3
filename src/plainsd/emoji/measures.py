"""How drawn pictures differ from true ones as a whole: sharpness, two distances between sets, intervals of shares.

    sharpness   mean squared difference of neighbouring pixels, drawn / true: below 1 is blur, above 1 is noise
    FD          Frechet distance between Gaussians fitted to features (Dowson and Landau 1982; of pictures, Heusel et
                al. 2017, arXiv:1706.08500)
    KID         squared maximum mean discrepancy of features, unbiased (Binkowski et al. 2018, arXiv:1801.01401)
    intervals   Wilson's, of a share (Wilson 1927), at 95 %

The features are fixed, not learned: see `features_of`. They are not those of an Inception network, so that these
numbers compare with each other, and not with FID and KID elsewhere.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

Z = 1.959964  # of a normal distribution, 95 % lie within so many standard deviations
FAINT = 0.001  # added to the detail, so that where there is none its logarithm is a number
BANDS, GRID = 4, 2  # octaves of detail; cells a side in which each is measured


def wilson(right: float, count: int, z: float = Z) -> tuple[float, float]:
    """The interval of a share of `count` trials of which `right` succeeded."""
    if not count:
        return 0.0, 1.0
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def gradient_energy(picture: Image.Image) -> float:
    """The mean squared difference of horizontal and of vertical neighbours, colours in 0..1."""
    pixels = np.asarray(picture.convert("RGB"), np.float64) / 255
    return float((np.diff(pixels, axis=0) ** 2).mean() + (np.diff(pixels, axis=1) ** 2).mean())


def features_of(picture: Image.Image) -> np.ndarray:
    """On a grid of GRID x GRID cells the mean colour, and of the mean detail in each of BANDS octaves how its logarithm
    falls from one to the next finer one, and the coarsest itself: 12 + 16 numbers. Blur changes the falls, whatever the
    picture shows. Detail is what a picture loses when it is halved and enlarged again; the finest is of its pixels.

    A side that is no multiple of GRID * 2 ** (BANDS - 1), 16 pixels, is scaled to the nearest one.
    """
    step = GRID * 2 ** (BANDS - 1)
    side = max(step, round(picture.width / step) * step)
    picture = picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture, np.float64) / 255
    colours, details = cell_means(pixels).ravel(), []
    for _ in range(BANDS):
        half = half_of(pixels)
        detail = np.abs(pixels - half.repeat(2, 0).repeat(2, 1)).mean(-1, keepdims=True)
        details.append(np.log(cell_means(detail).ravel() + FAINT))
        pixels = half
    falls = [fine - coarse for fine, coarse in zip(details, details[1:], strict=False)]
    return np.concatenate([colours, *falls, details[-1]])


def half_of(pixels: np.ndarray) -> np.ndarray:
    """(H, W, C) -> (H / 2, W / 2, C), means of four."""
    height, width, channels = pixels.shape
    return pixels.reshape(height // 2, 2, width // 2, 2, channels).mean((1, 3))


def cell_means(pixels: np.ndarray) -> np.ndarray:
    """(H, W, C) -> (GRID, GRID, C)."""
    height, width, channels = pixels.shape
    return pixels.reshape(GRID, height // GRID, GRID, width // GRID, channels).mean((1, 3))


def standardised(features: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(N, D) in standard deviations of the truth (M, D) from its mean, so that each feature counts alike."""
    spread = truth.std(0)
    varies = spread > 1e-9
    return (features[:, varies] - truth[:, varies].mean(0)) / spread[varies]


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances of (N, D) and (M, D).

    The last trace is the sum of the square roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric.
    """
    cov_a, cov_b = (np.atleast_2d(np.cov(one, rowvar=False)) for one in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    crossed = np.linalg.eigvalsh(root @ cov_b @ root).clip(0)
    apart = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(apart + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(crossed).sum())


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased estimate of the squared MMD under the kernel (x . y / D + 1)^3; it may be below 0."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    own = [(k.sum() - np.trace(k)) / (len(x) * (len(x) - 1)) for x in (a, b) for k in (kernel(x, x),)]
    return float(sum(own) - 2 * kernel(a, b).mean())


def compared(drawn: Sequence[Image.Image], true: Sequence[Image.Image]) -> dict[str, float]:
    """Sharpness, FD and KID of drawn pictures against true ones of the same size."""
    mine, theirs = (np.stack([features_of(picture) for picture in pictures]) for pictures in (drawn, true))
    mine, theirs = standardised(mine, theirs), standardised(theirs, theirs)
    energies = [sum(map(gradient_energy, pictures)) / len(pictures) for pictures in (drawn, true)]
    return {
        "sharpness": energies[0] / energies[1],
        "fd": frechet_distance(mine, theirs),
        "kid": kernel_distance(mine, theirs),
    }
