#!/usr/bin/env bash
# Expected: vae.enable_tiling() of diffusers decodes large pictures in a few large tiles whose seams are blended, so that
# the result is nearly the untiled one, whichever VAE it is.
# What happens: the tile is as large as the VAE's config says in sample_size, which no network reads. A config without
# it counts as 32 pixels: an autoencoder that was built or trained without naming a sample_size decodes tiles of 4 x 4
# latents, of which one latent overlaps. A picture of 256 pixels is cut into 121 of them, each normalised by itself,
# and is off from the untiled one by more than the picture varies (random weights); no warning. With sample_size 128
# the same weights need 9 tiles and are off by half of that.
# Who meets it: who turns on tiling with an autoencoder of their own, or one whose config names a small size (that of
# its training, not of what it is used for).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 numpy
cat > "$folder/try.py" <<'EOF'
import torch
from diffusers import AutoencoderKL

LEVELS = 4
for size in (None, 128):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * LEVELS, up_block_types=["UpDecoderBlock2D"] * LEVELS,
        block_out_channels=[16, 32, 32, 32], norm_num_groups=8, **({"sample_size": size} if size else {}),
    ).eval()  # fmt: skip
    latents, tiles = torch.randn(1, 4, 32, 32), []
    with torch.no_grad():
        whole = vae.decode(latents).sample
        vae.decoder.register_forward_hook(lambda _, given, out: tiles.append(tuple(given[0].shape[-2:])))
        vae.enable_tiling()
        tiled = vae.decode(latents).sample
    off = ((tiled - whole).norm() / (whole - whole.mean()).norm()).item()
    print(f"sample_size {size or 'not given'}: {len(tiles)} tiles, the first of {tiles[0]}; off by {off:.2f}")
EOF
"$folder/bin/pip" list 2>/dev/null | grep -E "^(torch|diffusers) "
seen=$("$folder/bin/python" -W ignore "$folder/try.py" 2>/dev/null)
echo "$seen"
grep -q "sample_size not given: 121 tiles, the first of (4, 4)" <<< "$seen"
grep -q "sample_size 128: 9 tiles, the first of (16, 16)" <<< "$seen"
