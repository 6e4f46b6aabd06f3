#!/usr/bin/env bash
# Expected: EDMEulerScheduler.set_timesteps(sigmas=...) takes custom sigmas, as its documentation
# says.
# What happens: the numbers are used as places along the ramp from sigma_max (0) to sigma_min (1).
# With the Karras schedule the sigmas 1, 0.5, 0.1 become a rising row from 0.002 to 45; with the
# exponential schedule only how many there are counts.
# Who meets it: whoever brings a schedule of their own.
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
from diffusers import EDMEulerScheduler

wanted = torch.tensor([1.0, 0.5, 0.1])
seen = {}
for schedule in ("karras", "exponential"):
    scheduler = EDMEulerScheduler(sigma_schedule=schedule)
    scheduler.set_timesteps(sigmas=wanted)
    seen[schedule] = scheduler.sigmas.clone()
    print(f"{schedule}: asked for {wanted.tolist()}, got {[round(value, 4) for value in seen[schedule].tolist()]}")
assert torch.allclose(seen["karras"], torch.tensor([0.002, 2.5152, 45.3141, 0]), rtol=1e-3)
scheduler.set_timesteps(3)
assert torch.equal(seen["exponential"], scheduler.sigmas)
EOF
