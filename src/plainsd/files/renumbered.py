"""Single files of UNets with one ResBlock a level, as diffusers' conversion script numbers them: with gaps.

`convert_diffusers_to_original_stable_diffusion.py` counts as if every level had two ResBlocks on the way down and three
on the way up, as SD 1.x has. Its files of BK-SDM and similar models therefore skip numbers; the original code does not.
"""

import re
from dataclasses import replace

from plainsd.files.tensorfile import TensorFile

BLOCK = re.compile(r"(model\.diffusion_model\.)(input_blocks|output_blocks)\.(\d+)\.(.+)")
LEFT_OVER = re.compile(
    r"(model\.diffusion_model\.)up_blocks\.0\.attentions\.(\d)\.(.+)"
)  # the script does not expect it there


def without_gaps(file: TensorFile) -> TensorFile:
    """The file with its UNet's blocks renumbered without gaps."""
    found = [match for name in file.tensors if (match := BLOCK.match(name))]
    down = {int(match[3]) for match in found if match[2] == "input_blocks"}
    if 3 not in down or 2 in down:
        return file
    attending = {int(match[3]) // 3 for match in found if match[2] == "output_blocks" and match[4] == "1.norm.weight"}
    attending |= {0} if any(LEFT_OVER.match(name) for name in file.tensors) else set()
    return replace(file, tensors={counted_on(name, attending): stored for name, stored in file.tensors.items()})


def counted_on(name: str, attending: set[int]) -> str:
    """`attending`: the levels, from the deepest, with cross-attention on the way up."""
    if found := LEFT_OVER.match(name):
        return f"{found[1]}output_blocks.{found[2]}.1.{found[3]}"
    if not (found := BLOCK.match(name)):
        return name
    start, way, rest = found[1], found[2], found[4]
    level, place = divmod(int(found[3]), 3)
    if way == "input_blocks":
        return f"{start}{way}.{2 * level + place}.{rest}"
    if place == 2:  # a lone upsampling, which belongs to the previous block
        return f"{start}{way}.{2 * level + 1}.{2 if level in attending else 1}.{rest.partition('.')[2]}"
    return f"{start}{way}.{2 * level + place}.{rest}"
