"""The noise of a batch: each picture gets the same as alone, on any device.

A picture takes four kinds of noise: the initial latents, fresh noise in ancestral steps, the Brownian path of SDE
samplers, and the sample from the VAE encoder's distribution. The generator is `Settings.noise`; diffusers, A1111 and
ComfyUI seed it in their own ways (`Settings.like`).

Shape letters: B pictures at once, L latent channels, h w height and width of the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from plainsd.diffusion.noise import BrownianTree, Path, Shape, Stream, slerp, slerp_columns, stream
from plainsd.pictures.settings import Resolved, noise_of

Draw = Callable[[Shape], Tensor]  # shape (L, h, w) -> unit noise (B, L, h, w)


class NoiseOfEach:
    """Called with a shape (L, h, w), draws the next noise of each picture, (B, L, h, w)."""

    def __init__(self, each: Sequence[Resolved], device: torch.device, factor: int):
        """`factor`: the VAE's pixels per latent, for `seed_resize`."""
        self.each, self.device, self.factor, kind = each, device, factor, noise_of(each[0])
        like = "comfyui" if kind == "comfyui" else each[0].like
        self.like = None if like == "diffusers" else like
        self.generator = "nv" if kind == "nv" else "cpu"
        # ComfyUI draws a whole batch at once, one row per picture; elsewhere each picture is a batch of its own
        self.places = [(one.batch_index, one.batch_size or 1) if kind == "comfyui" else (0, 1) for one in each]
        self.draw = self._draws([one.seed for one in each])
        seeds = [one.variation_seed or 0 for one in each]
        self.other = self._draws(seeds) if each[0].variation_strength else None  # keeps step with `draw`

    def __call__(self, shape: Shape) -> Tensor:
        return self._there(self._next(shape))

    def first(self, shape: Shape) -> Tensor:
        """The initial noise. Later noise comes from the same generators, or with `ensd` from others; in ComfyUI, on a
        CPU, from seed + 1."""
        noise = self._first(shape)
        if ahead := (self.each[0].ensd or 0) + (self.like == "comfyui"):
            self.draw = self._draws([one.seed + ahead for one in self.each])
            if self.other is not None:
                self.other = self._draws([(one.variation_seed or 0) + ahead for one in self.each])
        return self._there(noise)

    def anew(self, each: Sequence[Resolved]) -> NoiseOfEach:
        """The noise of the hires pass. A1111 and ComfyUI restart the generators for it."""
        return NoiseOfEach(each, self.device, self.factor) if self.like else self

    def encoder(self, shape: Shape) -> Tensor:
        """The noise that samples the encoder's distribution. A1111 and ComfyUI draw it unseeded; for them it is zero,
        the mean."""
        if self.like:
            return torch.zeros(len(self.each), *shape, device=self.device)
        return self._there(self._varied(shape))

    def path(self, shape: Shape, schedule: Sequence[float], visited: Sequence[float]) -> Path | None:
        """The Brownian path over the levels that A1111 (over those of the whole schedule) and ComfyUI (over the visited
        ones) give to SDE samplers. Elsewhere None: each step draws its own noise."""
        if not self.like:
            return None
        levels = [sigma for sigma in (visited if self.like == "comfyui" else schedule) if sigma > 0]
        trees = {key: self._tree(key, shape, min(levels), max(levels)) for key in self._keys(self._seeds())}
        by_logs = self.like == "a1111" and self.each[0].sampler == "dpmpp_sde"  # whose levels k-diffusion takes so
        told = {sigma: torch.tensor(sigma).log().exp().item() for sigma in levels if by_logs}

        def step(sigma: float, sigma_next: float) -> Tensor:
            ends = told.get(sigma, sigma), told.get(sigma_next, sigma_next)
            return self._there(self._rows(self._seeds(), {key: tree.step(*ends) for key, tree in trees.items()}))

        return step

    # --- within ------------------------------------------------------------------------------------------------------

    def _first(self, shape: Shape) -> Tensor:
        if (resized := self._resized(shape)) == shape:
            return self._varied(shape)
        anew = NoiseOfEach(self.each, self.device, self.factor)
        return _centred(anew._varied(resized), self._next(shape))

    def _varied(self, shape: Shape) -> Tensor:
        """The next noise, interpolated towards that of the variation seeds."""
        noise = self.draw(shape)
        if self.other is None:
            return noise
        mix, share = slerp_columns if self.like == "a1111" else slerp, self.each[0].variation_strength
        return torch.stack([mix(a, b, share) for a, b in zip(noise, self.other(shape), strict=True)])

    def _next(self, shape: Shape) -> Tensor:
        if self.other is not None:
            self.other(shape)
        return self.draw(shape)

    def _resized(self, shape: Shape) -> Shape:
        """That of `seed_resize` in whole latents; `shape` itself where it is the picture's own size, padded or not."""
        one = self.each[0]
        own = (shape[0], *(-(-side // self.factor) for side in reversed(one.size)))
        if one.seed_resize is None or (one.seed_resize == one.size and shape == own):
            return shape
        return (shape[0], *(side // self.factor for side in reversed(one.seed_resize)))

    def _draws(self, seeds: Sequence[int]) -> Draw:
        streams: dict[tuple[int, int], Stream] = {key: stream(self.generator, key[0]) for key in self._keys(seeds)}
        return lambda shape: self._rows(seeds, {key: next((key[1], *shape)) for key, next in streams.items()})

    def _tree(self, key: tuple[int, int], shape: Shape, low: float, high: float) -> BrownianTree:
        seed, batch = key
        return BrownianTree(low, high, seed, lambda node: stream(self.generator, node)((batch, *shape)))

    def _seeds(self) -> list[int]:
        return [one.seed for one in self.each]

    def _keys(self, seeds: Sequence[int]) -> list[tuple[int, int]]:
        """Seed and size of each picture's batch, in the order of `each`."""
        return [(seed, batch) for seed, (_, batch) in zip(seeds, self.places, strict=True)]

    def _rows(self, seeds: Sequence[int], batches: dict[tuple[int, int], Tensor]) -> Tensor:
        places = zip(self._keys(seeds), self.places, strict=True)
        return torch.stack([batches[key][index] for key, (index, _) in places])

    def _there(self, noise: Tensor) -> Tensor:
        if self.device.type == "cuda":  # pinned, so that the copy overlaps with GPU work
            return noise.pin_memory().to(self.device, non_blocking=True)
        return noise.to(self.device)


def _centred(noise: Tensor, around: Tensor) -> Tensor:
    """Noise of one size pasted into the middle of another; if larger, it is centre-cropped."""
    inside = around
    for dim in (-2, -1):
        edge = (around.shape[dim] - noise.shape[dim]) // 2
        noise = noise.narrow(dim, max(0, -edge), noise.shape[dim] + 2 * min(0, edge))
        inside = inside.narrow(dim, max(0, edge), noise.shape[dim])
    inside.copy_(noise)
    return around
