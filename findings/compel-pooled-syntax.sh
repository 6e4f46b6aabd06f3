#!/usr/bin/env bash
# Expected: compel's CompelForSDXL reads its prompt language once, and both things that SDXL is given say
# the same: the embeddings of the tokens, and the pooled embedding, which steers the whole picture
# through the timestep. "a (cat)1.5" would have the pooled embedding of "a cat", or a weighted one, and
# a blend the mean of those of its parts.
# What happens: the embeddings follow the language; the pooled embedding is that of the raw string, with
# its brackets, weights, quotation marks and ".blend(1, 0)" read as words. A blend with weights 1 and 0
# has exactly the embeddings of its first part, and another pooled embedding than either of its parts.
# Nothing warns.
# Who meets it: whoever weights or blends prompts for SDXL with compel, and compares pictures of
# different weights with each other or with other programs: the pooled embedding jumps as soon as there
# is syntax in a prompt, and between "(cat)1.0" and "cat", which mean the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet compel==2.5.1 diffusers==0.42.1 transformers==5.23.0
"$folder/bin/python" -W ignore - "$folder" <<'EOF' 2> "$folder/log" || { cat "$folder/log"; exit 1; }
import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from compel import CompelForSDXL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

print(*(f"{name} {version(name)}" for name in ("compel", "transformers", "torch")), sep=", ")
folder = Path(sys.argv[1])

# a tokenizer of single characters in CLIP's format, and two small random text encoders like SDXL's
characters = [chr(code) for code in range(33, 127)]
entries = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
(folder / "vocab.json").write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
(folder / "merges.txt").write_text("#version: 0.2\n")
tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
config = CLIPTextConfig(
    vocab_size=len(entries), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
    projection_dim=16, bos_token_id=len(entries) - 2, eos_token_id=len(entries) - 1,
)
torch.manual_seed(0)
pipe = SimpleNamespace(
    tokenizer=tokenizer, text_encoder=CLIPTextModel(config).eval(),
    tokenizer_2=tokenizer, text_encoder_2=CLIPTextModelWithProjection(config).eval(),
)
compel = CompelForSDXL(pipe)


def pooled_of(text):
    """What the second text encoder itself gives for a string, taken literally."""
    ids = tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder_2(ids).text_embeds


def apart(a, b):
    return float((a - b).norm() / b.norm())


plain, dog = compel("a cat"), compel("a dog")
assert apart(plain.pooled_embeds, pooled_of("a cat")) < 1e-5  # without syntax all is as one would expect
for prompt in ('("a cat", "a dog").blend(1, 0)', "a (cat)1.0", "a (cat)1.5"):
    given = compel(prompt)
    figures = {
        "embeddings from those of 'a cat'": apart(given.embeds, plain.embeds),
        "pooled from that of 'a cat'": apart(given.pooled_embeds, plain.pooled_embeds),
        "pooled from that of the raw string": apart(given.pooled_embeds, pooled_of(prompt)),
    }
    print(f"{prompt}:", "; ".join(f"{what} {value:.2g}" for what, value in figures.items()))
    same = "1.5" not in prompt
    assert (figures["embeddings from those of 'a cat'"] < 1e-5) == same, "the embeddings follow the language"
    assert figures["pooled from that of 'a cat'"] > 0.05, "the pooled embedding is that of 'a cat' now"
    assert figures["pooled from that of the raw string"] < 1e-5, "the pooled embedding is no longer the raw string's"
print("as described: the pooled embedding is that of the raw string, syntax and all")
EOF
