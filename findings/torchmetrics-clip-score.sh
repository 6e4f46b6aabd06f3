#!/usr/bin/env bash
# Expected: torchmetrics' CLIPScore of several pictures is the mean of their CLIPScores, as Hessel et
# al. 2021 (arXiv:2104.08718, equation 1) define it: 2.5 max(cos, 0) each, of "A photo depicts" and
# the caption.
# What happens: it is max(the mean of 100 cos, 0). A picture that does not fit its caption at all
# takes from the others' scores, where the paper counts it as 0; and captions have nothing before
# them. So dividing by 40 gives the paper's scale, but not the paper's score.
# Who meets it: whoever compares figures of torchmetrics with figures of others.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet torchmetrics==1.9.0 transformers==4.57.6 pillow==12.3.0
"$folder/bin/python" -W ignore - "$folder/clip" <<'EOF'
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from torchmetrics.multimodal.clip_score import CLIPScore
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

print(*(f"{name} {version(name)}" for name in ("torch", "torchmetrics", "transformers")), sep=", ")

# A tiny CLIP with random weights, whose vocabulary is the letters.
place = Path(sys.argv[1])
place.mkdir()
letters = "abcdefghijklmnopqrstuvwxyz"
words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
(place / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
(place / "merges.txt").write_text("#version: 0.2\n")
tokenizer = CLIPTokenizer(str(place / "vocab.json"), str(place / "merges.txt"))
shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
text = shared | {"vocab_size": len(words), "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
torch.manual_seed(0)
model = CLIPModel(
    CLIPConfig(text_config=text, vision_config=shared | {"image_size": 32, "patch_size": 16}, projection_dim=16)
).eval()
for weight in model.parameters():
    torch.nn.init.normal_(weight, std=0.5)
images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
processor = CLIPProcessor(images, tokenizer)
metric = lambda: CLIPScore(lambda: (model, processor))

pictures = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8)
cosines = []
for picture in pictures:
    one = metric()
    one.update(picture, "a cat")
    with torch.no_grad():
        given = processor(text=["a cat"], images=[picture], return_tensors="pt", padding=True)
        out = model(**given)
    cosines.append((out.text_embeds @ out.image_embeds.T).item())
    assert abs(one.compute().item() - max(100 * cosines[-1], 0)) < 1e-3
best, worst = max(range(24), key=cosines.__getitem__), min(range(24), key=cosines.__getitem__)
both = metric()
both.update(pictures[[best, worst]], ["a cat", "a cat"])
found = both.compute().item()
paper = 2.5 * (max(cosines[best], 0) + max(cosines[worst], 0)) / 2
print(f"cosines {cosines[best]:.4f} and {cosines[worst]:.4f}")
print(f"torchmetrics: {found:.4f}, over 40: {found / 40:.4f}; equation 1, without its prefix: {paper:.4f}")
assert abs(found - max(100 * (cosines[best] + cosines[worst]) / 2, 0)) < 1e-3
assert cosines[worst] < 0 < cosines[best] and paper - found / 40 > 0.01
EOF
