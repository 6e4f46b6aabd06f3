#!/usr/bin/env bash
# Expected: EMAModel(decay=0.9999, use_ema_warmup=False) averages with 0.9999 from the first step on: after 1,000 steps the first
# weights still make up 90 %. With update_after_step=100 the average stays at them for the first 100 steps.
# What happens: without the warmup there is another one, (1 + step) / (10 + step), which reaches 0.9999 after 90,000 steps: after
# 1,000 steps nothing of the first weights is left, and the average is one over the last tenth of the run or so. It
# rises as fast as the warmup that the flag turns on. And until update_after_step the average is a copy of the weights.
# Who meets it: whoever fine-tunes for some thousand steps with EMA, and expects the given decay to hold; the weights drawn
# with are then nearly those of the last steps. min_decay=0.9999 makes the decay what was asked for.
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


def share_of_first(steps, **options):
    """What is left of the first weights, 1, after steps at which the weights are 0; and the decay then."""
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    ema = EMAModel([weight], decay=0.9999, **options)
    weight.data.zero_()
    for _ in range(steps):
        ema.step([weight])
    return ema.shadow_params[0].item(), ema.cur_decay_value


seen = {}
for name, options in {
    "use_ema_warmup=False": {},
    "use_ema_warmup=True": {"use_ema_warmup": True},
    "min_decay=0.9999": {"min_decay": 0.9999},
}.items():
    for steps in (1, 100, 1000):
        seen[name, steps] = share_of_first(steps, **options)
        print(f"{name}: after {steps} steps {seen[name, steps][0]:.2g} of the first weights, decay {seen[name, steps][1]:.4f}")
left, decay = share_of_first(50, update_after_step=100)
print(f"update_after_step=100: after 50 steps {left:.2g} of the first weights, decay {decay}")
assert seen["use_ema_warmup=False", 1] == (0, 0)
assert abs(seen["use_ema_warmup=False", 1000][1] - 1000 / 1009) < 1e-9
assert abs(seen["use_ema_warmup=True", 1000][1] - (1 - 1000 ** (-2 / 3))) < 1e-9
assert (left, decay) == (0, 0)
EOF
