#!/usr/bin/env bash
# Expected: sd-parsers reads the fields that A1111 writes below a prompt. A1111 puts values with commas
# or colons into quotation marks, such as those of "Lora hashes" and "Hires prompt", so that each is one
# field, whatever stands in it.
# What happens: the line is cut at every comma, quotation marks or not. With two LoRAs "Lora hashes" is
# missing and the second LoRA is a field of its own; with one it is missing too, as a piece with two
# colons is dropped. Of a "Hires prompt" the first words are kept, with a quotation mark, and a colon
# behind a comma makes a new field, which replaces one of that name. No error, no warning.
# Who meets it: whoever sorts, searches or draws again pictures by what sd-parsers says of them: which
# LoRAs were used is lost for every picture of A1111 or Forge with any.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet sd-parsers==0.6 pillow==13.0.0
"$folder/bin/python" - "$folder" <<'EOF'
import sys
from importlib.metadata import version
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sd_parsers import ParserManager

print(*(f"{name} {version(name)}" for name in ("sd-parsers", "pillow")), sep=", ")
START = "a cat in snow\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, "


def fields(rest):
    """What is read of a picture with these further fields."""
    info = PngInfo()
    info.add_text("parameters", START + rest + ", Version: v1.10.1")
    file = Path(sys.argv[1]) / "picture.png"
    Image.new("RGB", (64, 64)).save(file, pnginfo=info)
    found = ParserManager().parse(file)
    assert found.samplers[0].parameters["seed"] == "1" and found.metadata["Version"] == "v1.10.1"
    return {name: value for name, value in found.metadata.items() if name not in ("Size", "Version")}


seen = {
    rest: fields(rest)
    for rest in (
        'Lora hashes: "snow: 0123456789ab"',
        'Lora hashes: "snow: 0123456789ab, fur: ba9876543210"',
        'Hires prompt: "a cat, sharp, light: evening"',
    )
}
for rest, found in seen.items():
    print(f"{rest} -> {found}")
assert list(seen.values()) == [{}, {"fur": 'ba9876543210"'}, {"Hires prompt": '"a cat', "light": 'evening"'}]
print("as described: quotation marks keep nothing together")
EOF
