#!/usr/bin/env bash
# Expected: EMAModel(decay=0.9999, use_ema_warmup=False) averages with 0.9999 from its first step on. Of 1,000 steps the last 100
# then make up 1 %.
# What happens: without the warmup there is another, (1 + step) / (10 + step), as fast as the one that the flag turns on: the decay
# is 0.99 after 1,000 steps, of which the last 100 make up 61 %, and 0.9999 after 90,000. In either way the average is a copy
# of the weights at the first step, and at each step until update_after_step.
# Who meets it: whoever fine-tunes for some thousand steps with EMA and takes the decay for what was asked: the average is one of the
# last steps. With min_decay=0.9999 it is what was asked, from the second step on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet diffusers==0.42.1
"$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "diffusers")), sep=", ")
import torch
from diffusers.training_utils import EMAModel


def average(before, after, **options):
    """Of weights that are 0 for so many steps, and then 1; and the decay at the end."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    ema = EMAModel([weight], decay=0.9999, **options)
    for step in range(before + after):
        weight.data.fill_(step >= before)
        ema.step([weight])
    return round(ema.shadow_params[0].item(), 3), round(ema.cur_decay_value, 4)


seen = {}
for name, options in {
    "use_ema_warmup=False": {},
    "use_ema_warmup=True": {"use_ema_warmup": True},
    "min_decay=0.9999": {"min_decay": 0.9999},
}.items():
    seen[name] = average(900, 100, **options)
    print(f"{name}: the last 100 of 1,000 steps make up {seen[name][0]:.1%}, decay {seen[name][1]}")
copied = average(49, 1, update_after_step=100)
print(f"update_after_step=100: the last of 50 steps makes up {copied[0]:.0%}, decay {copied[1]}")
assert seen == {
    "use_ema_warmup=False": (0.611, 0.9911),
    "use_ema_warmup=True": (0.647, 0.99),
    "min_decay=0.9999": (0.01, 0.9999),
}, seen
assert copied == (1, 0), copied
EOF
