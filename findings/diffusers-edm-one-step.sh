#!/usr/bin/env bash
# Expected: the schedulers of EDM begin at sigma_max, whatever the number of steps, as their
# init_noise_sigma says.
# What happens: with sigma_schedule="exponential" and one step the only level is sigma_min (0.002),
# while the first noise is still scaled for sigma_max (80): the network is told of almost clean
# input and gets noise 40000 times as strong. With "karras" one step begins at 80.
# Who meets it: whoever tries one step with EDMEulerScheduler or EDMDPMSolverMultistepScheduler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet diffusers==0.42.1
"$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "diffusers")), sep=", ")
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

for kind in (EDMEulerScheduler, EDMDPMSolverMultistepScheduler):
    for schedule, steps, first in (("karras", 1, 80), ("exponential", 2, 80), ("exponential", 1, 0.002)):
        scheduler = kind(sigma_schedule=schedule)
        scheduler.set_timesteps(steps)
        sigma = scheduler.sigmas[0].item()
        noise = scheduler.init_noise_sigma
        print(f"{kind.__name__}, {schedule}, {steps} step(s): first sigma {sigma:.4g}, noise scaled by {noise:.4g}")
        assert abs(sigma - first) < 1e-4 and abs(noise - 80.00625) < 1e-4
EOF
