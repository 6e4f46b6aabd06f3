#!/usr/bin/env bash
# Expected: create_lycoris_from_weights reads every LoKr file that LyCORIS wrote.
# What happens: the loader guesses how the layer was factored from the shapes in the file. For a
# convolution it counts the kernel's sides as channels, with use_tucker it takes the rank from the
# wrong axis, and unbalanced_factorization does not occur to it; in all three it then copies into
# tensors of another shape and raises RuntimeError or AttributeError.
# Who meets it: whoever trains LoKr on 3x3 convolutions at a low rank, or with one of these options,
# and loads the result to draw or to merge.
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
    adapter = create_lycoris(network, 1.0, linear_dim=1, linear_alpha=1, algo="lokr", **options)
    adapter.apply_to()
    file = {key: value.clone() for key, value in adapter.state_dict().items()}
    adapter.restore()
    try:
        return f"{len(create_lycoris_from_weights(1.0, None, network, weights_sd=file)[0].loras)} read"
    except (RuntimeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


seen = {
    "linear, 4 to 32": reload(torch.nn.Linear(4, 32)),
    "3x3, 32 to 32": reload(torch.nn.Conv2d(32, 32, 3)),
    "3x3, 4 to 32": reload(torch.nn.Conv2d(4, 32, 3)),
    "3x3, 32 to 32, use_tucker": reload(torch.nn.Conv2d(32, 32, 3), use_tucker=True),
    "linear, 4 to 32, unbalanced_factorization": reload(torch.nn.Linear(4, 32), unbalanced_factorization=True),
}
for name, result in seen.items():
    print(f"{name}: {result}")
read, error, missing = "1 read", "RuntimeError", "AttributeError"
assert [result.split(":")[0] for result in seen.values()] == [read, read, error, missing, error], seen
EOF
