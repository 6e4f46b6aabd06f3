#!/usr/bin/env bash
# Expected: the last step of a sampler takes the noise that is left away.
# What happens: with use_karras_sigmas or use_exponential_sigmas DEISMultistepScheduler repeats its
# last level instead of ending at 0: the last step returns its sample unchanged, its model call is
# spent for nothing, and with one step the picture is the noise itself. There is no
# final_sigmas_type to choose. DPMSolverMultistepScheduler ends at 0.
# Who meets it: whoever takes DEIS with these sigmas, most visibly with few steps.
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
from diffusers import DEISMultistepScheduler, DPMSolverMultistepScheduler


def last_step(kind, steps, **options):
    torch.manual_seed(0)
    scheduler = kind(**options)
    scheduler.set_timesteps(steps)
    sample = torch.randn(1, 4, 8, 8)
    for time in scheduler.timesteps:
        before, sample = sample, scheduler.step(torch.randn(sample.shape), time, sample).prev_sample
    return (sample - before).abs().max().item(), scheduler.sigmas[-2:].tolist()


assert "final_sigmas_type" not in DEISMultistepScheduler().config
for steps in (1, 4):
    for option in ("use_karras_sigmas", "use_exponential_sigmas"):
        for kind in (DEISMultistepScheduler, DPMSolverMultistepScheduler):
            change, sigmas = last_step(kind, steps, **{option: True})
            print(f"{kind.__name__}, {option}, {steps} step(s): ends {sigmas}, last change {change:.1e}")
            if kind is DEISMultistepScheduler:
                assert sigmas[0] == sigmas[1] and change < 1e-5
            else:
                assert sigmas[1] == 0 and change > 0.01
EOF
