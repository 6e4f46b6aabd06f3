"""How much memory loading a model takes at its peak, for full-size models whose weights are all zeros.

    python bench/load_memory.py [FAMILY FROM TO]...      such as: sd1 float32 bfloat16 sdxl-base float16 bfloat16

Each model is loaded in a process of its own, from files that are holes and take no space on the disk. The peak is the
largest resident memory during the load less that before it; beside it stand the size of the loaded networks, and what
we allow ourselves: 1.15 times that and the largest tensor of the file.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from plainsd.files.names import places
from plainsd.files.single import prefixes
from plainsd.files.stored import empty, parts, place_shape
from plainsd.files.tensorfile import Stored, header_bytes
from plainsd.models.variants import VARIANTS

CASES = ("sd1", "float32", "bfloat16", "sd1", "float16", "float32", "sdxl-base", "float16", "bfloat16")
CHILD = """
import re, sys
from pathlib import Path
from plainsd.checkpoint import load
def status(name): return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = status("VmRSS")
sd = load(sys.argv[1], device="cpu", dtype=sys.argv[2], family=sys.argv[3])
peak = status("VmHWM")                # not getrusage: that is no less than the parent's at the start
tensors = [p for network in (sd.unet, sd.vae, *sd.text_encoders) for p in network.parameters()]
print(peak - before, sum(p.nbytes for p in tensors), max(p.numel() for p in tensors))
"""


def hollow_file(path: Path, family: str, dtype: torch.dtype) -> None:
    """A single file of a full-size model: a true header, and a hole in place of the numbers."""
    variant, tensors = VARIANTS[family], {}
    for name, (kind, config) in parts(variant).items():
        network = empty(kind, config)
        shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
        prefix, layout = prefixes(variant)[name]
        for place in places(network, layout, conv=variant.conv_projections):
            tensors[prefix + place.name] = Stored(dtype, tuple(place_shape(place, shapes)), lambda: torch.empty(0))
    header = header_bytes(tensors, {})
    path.write_bytes(header)
    os.truncate(path, len(header) + sum(stored.nbytes for stored in tensors.values()))


def measure(family: str, kept: str, wanted: str) -> tuple[int, int, int]:
    """Peak, size of the networks, size of the largest tensor in the file: in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        hollow_file(path, family, getattr(torch, kept))
        command = [sys.executable, "-c", CHILD, path, wanted, family]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    peak, size, largest = map(int, done.stdout.split())
    return peak, size, largest * getattr(torch, kept).itemsize


def main() -> None:
    cases = sys.argv[1:] or CASES
    print(
        f"{'model':<14}{'file':<10}{'loaded as':<12}{'networks':>12}{'peak':>12}{'allowed':>12}{'peak / networks':>18}"
    )
    for family, kept, wanted in zip(cases[::3], cases[1::3], cases[2::3], strict=True):
        peak, size, largest = measure(family, kept, wanted)
        cells = "".join(f"{number / 2**30:>8.2f} GiB" for number in (size, peak, 1.15 * size + largest))
        print(f"{family:<14}{kept:<10}{wanted:<12}{cells}{peak / size:>18.2f}")


if __name__ == "__main__":
    main()
