#!/usr/bin/env bash
# Expected: one step goes from pure noise (the last training time, 999) to a picture, whichever
# scheduler is taken with timestep_spacing="linspace".
# What happens: DDIM, DDPM, Euler, Euler ancestral, Heun and KDPM2 step once at time 0, the level of
# nearly no noise; DPMSolverMultistep, UniPC and DEIS step at 999. "linspace" is the default of Euler, Heun
# and KDPM2.
# Who meets it: whoever draws with a one-step model whose configuration does not say "trailing".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet diffusers==0.42.1
"$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "diffusers")), sep=", ")
import diffusers

seen = {}
for name in (
    "DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete",
    "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep",
):
    scheduler = getattr(diffusers, f"{name}Scheduler")(timestep_spacing="linspace")
    scheduler.set_timesteps(1)
    seen[name] = [int(time) for time in scheduler.timesteps]
    print(f"{name}Scheduler: times {seen[name]}")
assert [times[0] for times in seen.values()] == [0] * 6 + [999] * 3, seen
EOF
