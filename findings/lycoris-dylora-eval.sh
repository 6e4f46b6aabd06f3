#!/usr/bin/env bash
# Expected: a DyLoRA adapter in eval() uses all of its rank, gives the same output each time, and
# equals its own file, which is that of a LoRA with alpha / rank.
# What happens: the rank is drawn anew at each call, in eval() too, and at each merge. With all
# blocks in play the factor is alpha / (number of blocks), or alpha / (number of blocks + 1) where
# rank= names the full rank, against alpha / rank of the file: with rank 8 in blocks of 4, four
# times the file's change.
# Who meets it: whoever draws with, or merges, a DyLoRA adapter that is still in memory, and compares
# it with its file.
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
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.locon import LoConModule

torch.manual_seed(0)
layer = torch.nn.Linear(16, 16).double()
adapter = DyLoraModule("layer", layer, lora_dim=8, alpha=8, block_size=4).double().eval()
for weight in adapter.parameters():
    torch.nn.init.normal_(weight)
file = adapter.custom_state_dict()
lora = LoConModule.make_module_from_state_dict(
    "layer", layer, file["lora_up.weight"], file["lora_down.weight"], None, file["alpha"], None
)
as_lora = lora.double().get_diff_weight()[0].norm()

x = torch.randn(1, 16).double()
with torch.no_grad():
    outputs = {tuple(adapter(x).flatten().tolist()) for _ in range(50)}
first_blocks = (adapter.get_diff_weight(rank=4)[0].norm() / as_lora).item()
full = (adapter.get_diff_weight(rank=8)[0].norm() / as_lora).item()
print(f"50 calls in eval() gave {len(outputs)} different outputs")
print(f"rank=4, which takes both blocks: {first_blocks:.4f} of the change in the file")
print(f"rank=8: {full:.4f} of the change in the file")
assert len(outputs) == 2 and round(first_blocks, 4) == 4 and round(full, 4) == 2.6667
EOF
