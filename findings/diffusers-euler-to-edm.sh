#!/usr/bin/env bash
# Expected: a class that EulerDiscreteScheduler().compatibles lists can take over by from_config and
# samples the same model.
# What happens: the list holds EDMEulerScheduler, which has no betas and scales its network's inputs
# and outputs otherwise (EDM's preconditioning). from_config makes it and merely logs that betas are
# ignored. Given the exact noise, Euler reckons the picture from it, EDM something else; the times
# and levels differ too.
# Who meets it: whoever offers the samplers of "compatibles" to a Stable Diffusion model.
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
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler

betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
euler = EulerDiscreteScheduler(**betas)
assert EDMEulerScheduler in euler.compatibles
edm = EDMEulerScheduler.from_config(euler.config)

torch.manual_seed(0)
picture, noise = torch.randn(2, 1, 4, 8, 8)
error = {}
for scheduler in (euler, edm):
    name = type(scheduler).__name__
    scheduler.set_timesteps(10)
    time, sigma = scheduler.timesteps[0], scheduler.sigmas[0]
    sample = picture + sigma * noise
    scheduler.scale_model_input(sample, time)
    error[name] = (scheduler.step(noise, time, sample).pred_original_sample - picture).abs().max().item()
    print(f"{name}: first time {time.item():.4g}, sigma {sigma.item():.4g}, error of the picture {error[name]:.1e}")
assert error["EulerDiscreteScheduler"] < 1e-4 and error["EDMEulerScheduler"] > 1
assert 14.6 < euler.sigmas[0] < 14.7 and abs(edm.sigmas[0] - 80) < 1e-3
EOF
