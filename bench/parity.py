"""Prints the parity table: how far we are from diffusers and transformers, with the same weights and the same noise.

    python bench/parity.py            tiny networks and all samplers, a minute or two
    python bench/parity.py --full     also SD 1.5 at full size, some minutes and 12 GB

It runs the parity tests and notes the largest relative error that each of them measures.
"""

import importlib.metadata
import platform
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1] / "tests"
ROWS = {  # test -> row of the table
    "test_text_encoder_equals_transformers": "text encoder, {count} tiny configurations",
    "test_vae_equals_diffusers": "VAE, {count} tiny configurations",
    "test_unet_equals_diffusers": "UNet, {count} tiny configurations",
    "test_sd15_at_full_size": "the three networks of SD 1.5 at full size",
    "test_whole_trajectory_equals_diffusers": "{count} samplers and spacings: 7, 20, 50 steps, eps and v, two tables",
    "test_lcm_without_c_skip_equals_diffusers_to_the_last_digits": "LCM, less the 7e-6 of x that we leave out",
    "test_ddim_eta_equals_diffusers": "DDIM with eta 0.3 and 1, 3 spacings, as above",
    "test_every_spacing_equals_diffusers_as_shipped": "{count} samplers and spacings, diffusers untouched",
    "test_defaults_equal_diffusers_as_shipped": "{count} samplers with their defaults, diffusers untouched",
}


LEFT_OUT = ("test_whole_trajectory_equals_diffusers[lcm-None]",)  # has a row of its own


class Recorder:
    """A pytest plugin: the largest number that `error` or `relative` gave in each test."""

    def __init__(self):
        self.worst = defaultdict(float)
        self.cases = defaultdict(set)

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.originalname in ROWS and item.name not in LEFT_OUT]
        for module in {item.module for item in items}:
            for name in ("error", "relative"):
                if hasattr(module, name):
                    setattr(module, name, self.noting(getattr(module, name)))

    def noting(self, measure):
        def measured(*arguments):
            value = measure(*arguments)
            self.worst[self.row] = max(self.worst[self.row], value)
            return value

        return measured

    def pytest_runtest_setup(self, item):
        case = item.callspec.id if hasattr(item, "callspec") else ""
        double = "float32" not in case and not item.originalname.endswith("as_shipped")
        self.row = item.originalname, "float64" if double else "float32"
        self.cases[item.originalname].add(case.replace("float32", "").replace("float64", ""))


def written(error: float | None) -> str:
    if error is None:
        return ""
    return f"{error:.0e}" if error else "equal"


def main() -> int:
    recorder = Recorder()
    marks = "not gpu" if "--full" in sys.argv else "not full and not gpu"
    files = [str(TESTS / name) for name in ("test_models.py", "test_samplers.py")]
    code = pytest.main([*files, "-q", "-m", marks, "-p", "no:cacheprovider", "--no-header"], plugins=[recorder])
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("diffusers", "transformers", "torch")
    )
    print(f"\n{versions}, {platform.machine()}, {torch.get_num_threads()} threads\n")
    print("| largest relative error | float32 | float64 |\n|---|---|---|")
    for test, title in ROWS.items():
        if test in recorder.cases:
            cells = [recorder.worst.get((test, kind)) for kind in ("float32", "float64")]
            row = title.format(count=len(recorder.cases[test]))
            print(f"| {row} | {' | '.join(written(cell) for cell in cells)} |")
    return code


if __name__ == "__main__":
    sys.exit(main())
