#!/usr/bin/env bash
# Expected: torchmetrics' CLIPScore works with the transformers that pip installs beside it.
# What happens: since transformers 5, CLIPModel.get_image_features and get_text_features return a
# BaseModelOutputWithPooling where they returned a tensor. torchmetrics has no upper bound on
# transformers, and its first update raises an AttributeError: no attribute 'norm'.
# Who meets it: whoever installs torchmetrics[multimodal] anew to score pictures, and all code that
# takes these features for a tensor.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet torchmetrics==1.9.0 transformers==5.23.0 pillow==12.3.0
"$folder/bin/python" -W ignore - "$folder/clip" <<'EOF'
import json
import sys
from importlib.metadata import requires, version
from pathlib import Path

import torch
from torchmetrics.multimodal.clip_score import CLIPScore
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

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
images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
processor = CLIPProcessor(images, tokenizer)
needs = [one for one in requires("torchmetrics") if one.startswith("transformers") and "multimodal" in one]
print("torchmetrics needs", *needs)
assert needs and not any("<5" in one.replace(" ", "") for one in needs)

picture = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
with torch.no_grad():
    features = model.get_image_features(processor(images=[picture], return_tensors="pt")["pixel_values"])
print("get_image_features returns", type(features).__name__)
assert not isinstance(features, torch.Tensor)
try:
    CLIPScore(lambda: (model, processor)).update(picture, "a cat")
except AttributeError as error:
    print("AttributeError:", error)
    assert "norm" in str(error)
else:
    raise SystemExit("it works now")
EOF
