#!/usr/bin/env bash
# Expected: an embedding of the AUTOMATIC1111 web UI answers to its file's name, as it does there.
# What happens: load_textual_inversion without token= calls a .safetensors embedding after its
# tensor, "emb_params", so that a second one is refused as a duplicate, and a .pt embedding after
# the name it was trained under, whatever the file is called now.
# Who meets it: whoever loads downloaded embeddings and writes their file names into prompts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet diffusers==0.42.1 transformers==5.23.0
"$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers")), sep=", ")
import json
import tempfile
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging

logging.set_verbosity_error()


class Pipeline(DiffusionPipeline, TextualInversionLoaderMixin):
    def __init__(self, tokenizer, text_encoder):
        super().__init__()
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder)


with tempfile.TemporaryDirectory() as folder:
    words, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
    words.write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}))
    merges.write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(words), str(merges))
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    pipeline = Pipeline(tokenizer, CLIPTextModel(CLIPTextConfig(vocab_size=3, **shape)))
    vector = torch.ones(1, 8)
    save_file({"emb_params": vector}, f"{folder}/cat.safetensors")
    save_file({"emb_params": vector}, f"{folder}/dog.safetensors")
    torch.save({"string_to_param": {"*": vector}, "string_to_token": {"*": 265}, "name": "first"}, f"{folder}/bird.pt")
    seen = {}
    for file in ("cat.safetensors", "dog.safetensors", "bird.pt"):
        known = set(tokenizer.get_vocab())
        try:
            pipeline.load_textual_inversion(folder, weight_name=file)
            seen[file] = " ".join(set(tokenizer.get_vocab()) - known)
        except ValueError as error:
            seen[file] = f"ValueError: {error}"
        print(f"{file}: {seen[file]}")
assert seen["cat.safetensors"] == "emb_params" and seen["bird.pt"] == "first"
assert seen["dog.safetensors"].startswith("ValueError: Token emb_params already in tokenizer vocabulary")
EOF
