#!/usr/bin/env bash
# Expected: merging a LoHa or LoKr adapter of LyCORIS into its layer gives the weights that the
# running adapter has, as it does for LoRA.
# What happens: get_weight already multiplies by alpha / rank, and get_diff_weight multiplies by it
# again, so that merge_to bakes in alpha / rank of the right change: half of it for alpha 2 and
# rank 4. The learned scalar of use_scalar=True is left out of the merge as well.
# Who meets it: whoever merges a LoHa or LoKr trained with alpha other than its rank.
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
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule


def merged_over_running(kind, scalar=None, **options):
    torch.manual_seed(0)
    layer = torch.nn.Linear(32, 32).double()
    adapter = kind("layer", layer, lora_dim=4, use_scalar=scalar is not None, **options).double().eval()
    for weight in adapter.parameters():
        torch.nn.init.normal_(weight)
    if scalar is not None:
        adapter.scalar.data.fill_(scalar)
    x = torch.randn(2, 32).double()
    with torch.no_grad():
        before = layer(x)
        running = adapter(x) - before
        adapter.merge_to(1.0)
        return ((layer(x) - before).norm() / running.norm()).item()


seen = {
    "LoRA, alpha 2, rank 4": merged_over_running(LoConModule, alpha=2),
    "LoHa, alpha 2, rank 4": merged_over_running(LohaModule, alpha=2),
    "LoKr, alpha 2, rank 4": merged_over_running(LokrModule, alpha=2, factor=2),
    "LoHa, alpha 1, rank 4": merged_over_running(LohaModule, alpha=1),
    "LoHa, alpha 4, rank 4": merged_over_running(LohaModule, alpha=4),
    "LoHa, alpha 4, rank 4, scalar 0.5": merged_over_running(LohaModule, scalar=0.5, alpha=4),
}
for name, ratio in seen.items():
    print(f"{name}: the merged change is {ratio:.4f} of the running one")
assert [round(ratio, 4) for ratio in seen.values()] == [1, 0.5, 0.5, 0.25, 1, 2], seen
EOF
