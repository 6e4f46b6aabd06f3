#!/usr/bin/env bash
# Expected: bypass_mode=True is another way to reckon the same adapter.
# What happens: with weight decomposition (DoRA) the bypass adds the plain low-rank change and
# never looks at the magnitudes, which are saved all the same. The file, read without bypass, draws
# something else than what was trained, and so does merging.
# Who meets it: whoever trains DoRA with bypass_mode.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet lycoris-lora==4.1.3
"$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "lycoris-lora")), sep=", ")
import torch
from lycoris.modules.locon import LoConModule


def change(bypass, decompose, magnitudes=1.0):
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 16).double()
    adapter = LoConModule("layer", layer, alpha=4, weight_decompose=decompose, bypass_mode=bypass).double().eval()
    torch.manual_seed(1)
    torch.nn.init.normal_(adapter.lora_down.weight)
    torch.nn.init.normal_(adapter.lora_up.weight)
    if decompose:
        adapter.dora_scale.data.mul_(magnitudes)
    x = torch.randn(2, 16).double()
    with torch.no_grad():
        return adapter(x) - layer(x), "dora_scale" in adapter.custom_state_dict()


def same(one, other):
    return torch.allclose(one[0], other[0])


seen = {
    "LoRA: bypass equals rebuilt": same(change(True, False), change(False, False)),
    "DoRA: bypass equals rebuilt": same(change(True, True), change(False, True)),
    "DoRA in bypass equals LoRA": same(change(True, True), change(True, False)),
    "DoRA in bypass: magnitudes doubled change nothing": same(change(True, True, 2.0), change(True, True)),
    "DoRA in bypass saves magnitudes": change(True, True)[1],
}
for name, answer in seen.items():
    print(f"{name}: {answer}")
assert list(seen.values()) == [True, False, True, True, True], seen
EOF
