#!/usr/bin/env bash
# Expected: create_lycoris_from_weights reads what state_dict() of the same adapter holds.
# What happens: it reads no IA3 file at all (the loader hands over one argument too many), no DyLoRA
# of a convolution (the file holds lora_up as a matrix, the loader wants four axes) and no DoRA whose
# magnitudes go over the inputs (it always builds them over the outputs).
# Who meets it: whoever trains one of these three and loads the file again with the same library.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet lycoris-lora==4.1.3
"$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "lycoris-lora")), sep=", ")
import logging

import torch
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights

logging.disable(logging.CRITICAL)
LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"]})


def reload(layer, **options):
    network = torch.nn.Sequential(layer)
    adapter = create_lycoris(network, 1.0, linear_dim=4, linear_alpha=4, **options)
    adapter.apply_to()
    file = {key: value.clone() for key, value in adapter.state_dict().items()}
    adapter.restore()
    try:
        return f"{len(create_lycoris_from_weights(1.0, None, network, weights_sd=file)[0].loras)} read"
    except (RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


linear, conv = torch.nn.Linear(16, 32), torch.nn.Conv2d(16, 32, 3)
seen = {
    "LoRA, convolution": reload(conv, algo="lora"),
    "IA3, linear": reload(linear, algo="ia3"),
    "IA3, convolution": reload(conv, algo="ia3"),
    "DyLoRA, linear": reload(linear, algo="dylora"),
    "DyLoRA, convolution": reload(conv, algo="dylora"),
    "DoRA over the outputs": reload(linear, algo="lora", dora_wd=True),
    "DoRA over the inputs": reload(linear, algo="lora", dora_wd=True, wd_on_output=False),
}
for name, result in seen.items():
    print(f"{name}: {result}")
read, kind, error = "1 read", "TypeError", "RuntimeError"
assert [result.split(":")[0] for result in seen.values()] == [read, kind, kind, read, error, read, error], seen
EOF
