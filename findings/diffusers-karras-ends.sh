#!/usr/bin/env bash
# Expected: use_karras_sigmas means the levels of Karras et al. 2022 (equation 5) between the lowest
# and the highest level of the model's table, in every scheduler that has the option, as it does in
# DPMSolverMultistepScheduler and in k-diffusion.
# What happens: Euler, Heun, LMS and KDPM2 take the ends from the levels that timestep_spacing had
# chosen before. With "leading", which the scheduler files of SD 1.5 and SDXL say, 20 steps begin at
# 11.0 and not at 14.6; with "trailing" the last step begins at 0.22 and not at 0.029. The same for
# exponential levels.
# Who meets it: whoever exchanges schedulers by from_config(pipe.scheduler.config,
# use_karras_sigmas=True), or compares "Euler Karras" with another program.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet diffusers==0.42.1 scipy==1.17.0
"$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "diffusers")), sep=", ")
import diffusers

betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
names = ["Euler", "Heun", "LMS", "KDPM2", "KDPM2Ancestral", "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"]
ends = {}
for name in names:
    kind = next(
        getattr(diffusers, full)
        for full in (f"{name}DiscreteScheduler", f"{name}Scheduler")
        if hasattr(diffusers, full)
    )
    for spacing in ("linspace", "leading", "trailing"):
        scheduler = kind(**betas, timestep_spacing=spacing, use_karras_sigmas=True)
        scheduler.set_timesteps(20)
        sigmas = scheduler.sigmas[scheduler.sigmas > 0]
        ends[name, spacing] = (round(sigmas.max().item(), 2), round(sigmas.min().item(), 3))
    print(f"{name:20}", *(f"{spacing} {ends[name, spacing]}" for spacing in ("linspace", "leading", "trailing")))

for name in names:
    whole = name in ("DPMSolverMultistep", "UniPCMultistep", "DEISMultistep")
    assert ends[name, "linspace"] == (14.61, 0.029)
    assert ends[name, "leading"] == ((14.61, 0.029) if whole else (11.03, 0.041))
    assert ends[name, "trailing"] == ((14.61, 0.029) if whole else (14.61, 0.223))
EOF
