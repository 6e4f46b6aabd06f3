#!/usr/bin/env bash
# Expected: under each interpolation_type of EulerDiscreteScheduler the network is told the time
# whose noise level the sample has.
# What happens: "log_linear" spreads the sigmas anew, by a logarithmic ramp with one level more than
# there are steps, and leaves the times as they were. With 5 steps the last call says time 0, whose
# level is 0.029, while the sample's is 0.101.
# Who meets it: whoever sets interpolation_type="log_linear" on a Stable Diffusion model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet diffusers==0.42.1
"$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "diffusers")), sep=", ")
from diffusers import EulerDiscreteScheduler

betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
worst = {}
for kind in ("linear", "log_linear"):
    scheduler = EulerDiscreteScheduler(**betas, interpolation_type=kind)
    trained = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5
    scheduler.set_timesteps(5)
    worst[kind] = 1.0
    for time, sigma in zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist()):
        low = int(time)
        part = time - low
        level = (trained[low] * (1 - part) + trained[min(low + 1, 999)] * part).item()
        worst[kind] = max(worst[kind], sigma / level, level / sigma)
        print(f"{kind}: time {time:.2f} stands for sigma {level:.4f}, the sample has {sigma:.4f}")
print(f"largest factor between the two: {worst['linear']:.3f} linear, {worst['log_linear']:.3f} log_linear")
assert worst["linear"] < 1.001 and 3.46 < worst["log_linear"] < 3.47
EOF
