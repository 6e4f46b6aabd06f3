#!/usr/bin/env bash
# Expected: KarrasEMA and PostHocEMA of ema-pytorch average with the power profile of Karras et al. 2023 (arXiv:2312.02696) that
# sigma_rel names; update_every only looks less often, to save work. After 10,000 steps with sigma_rel=0.15 the
# average is of weights of step 8,200 in the mean, and of none of the first ones.
# What happens: the decay is that of one step, but is applied once in update_every steps, so that old weights lose their part as
# if gamma + 1 were divided by update_every. With the default of 100 four fifths of the average are the random weights of
# the start; with the 10 of the README its mean is before a third of the run. PostHocEMA then combines its averages as if
# they had their widths, which gives no better ones. With update_every=1 all is as in the paper.
# Who meets it: who keeps these averages of a diffusion model, by the defaults or by the README, and draws with them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet ema-pytorch==0.8.3
(cd "$folder" && "$folder/bin/python" -W ignore -) <<'EOF'
from importlib.metadata import version
from inspect import signature

print(*(f"{name} {version(name)}" for name in ("torch", "ema-pytorch")), sep=", ")
import torch
from ema_pytorch import PostHocEMA
from ema_pytorch.post_hoc_ema import KarrasEMA, sigma_rel_to_gamma

STEPS, WIDTH = 10_000, 0.15


def profile(ema):
    """Mean and deviation, in parts of the run, of the steps that an average is made of, and the first weights' part."""
    mean, square, first = ema.ema_model.weight[0].tolist()
    return mean / STEPS, max(square - mean**2, 0) ** 0.5 / STEPS, first


default = signature(KarrasEMA).parameters["update_every"].default
gamma = sigma_rel_to_gamma(WIDTH)
print(f"asked for: mean {(gamma + 1) / (gamma + 2):.2f}, deviation {WIDTH}, the first weights' part 0")
seen = {}
for every in (1, 10, default):
    model = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    single = KarrasEMA(model, sigma_rel=WIDTH, update_every=every)
    both = PostHocEMA(
        model, sigma_rels=(0.05, 0.28), update_every=every, checkpoint_every_num_steps=1000,
        checkpoint_dtype=torch.float64, checkpoint_folder=f"every-{every}",
    )  # fmt: skip
    for step in range(STEPS):
        model.weight.data.copy_(torch.tensor([[step, step**2, step == 0]]))
        single.update()
        both.update()
    for name, ema in ("KarrasEMA", single), ("PostHocEMA", both.synthesize_ema_model(sigma_rel=WIDTH)):
        seen[name, every] = mean, deviation, first = profile(ema)
        print(f"{name}, update_every={every}: mean {mean:.2f}, deviation {deviation:.2f}, first weights {first:.2f}")
assert default == 100
for name in ("KarrasEMA", "PostHocEMA"):
    mean, deviation, first = seen[name, 1]
    assert abs(mean - (gamma + 1) / (gamma + 2)) < 0.005 and abs(deviation - WIDTH) < 0.005 and first < 1e-6
    assert seen[name, 10][0] < 0.5 and seen[name, 10][1] > 0.25
    assert seen[name, default][0] < 0.1 and seen[name, default][2] > 0.6
EOF
