"""`plainsd upscale`: enlarges pictures with an ESRGAN-type network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from plainsd.commands.flags import flag
from plainsd.commands.output import Target
from plainsd.errors import UserError
from plainsd.pictures.settings import Settings


@dataclass
class Upscale:
    """Enlarges pictures with an ESRGAN-type network, tile by tile. Needs pip install 'plainsd[upscale]'."""

    pictures: Annotated[Positional[tuple[Path, ...]], flag("PICTURE")]
    """one or more picture files"""
    with_: Annotated[Path, flag("FILE", name="with")]
    """the network: a .pth or .safetensors file"""
    times: Annotated[float | None, flag("TIMES")] = None
    """scale factor (default: the network's own)"""
    out: Annotated[Path, flag("FILE")] = Path("out")
    """a .png, .jpg or .webp file, or a folder, in which files are numbered"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""

    def run(self) -> None:
        if not self.pictures:
            raise UserError("there is no picture; give one or more")
        if self.times is not None and not 1 <= self.times <= 16:
            raise UserError(f"times {self.times} is out of range; choose 1 to 16", field="times", value=self.times)
        target = Target(self.out)
        if target.file and len(self.pictures) > 1:
            raise UserError(
                f"--out {self.out} is one file for {len(self.pictures)} pictures; give a folder", field="out"
            )

        from plainsd.device import choose_device
        from plainsd.pictures.images import check_side, open_picture
        from plainsd.pictures.upscaling import check_enlarged, load_upscaler, upscaled

        images = [open_picture(path) for path in self.pictures]
        upscaler = load_upscaler(self.with_, choose_device(self.device))
        times = upscaler.scale if self.times is None else self.times
        sizes = [(round(image.width * times), round(image.height * times)) for image in images]
        for image, size in zip(images, sizes, strict=True):  # before any of them takes its time
            check_enlarged(image, upscaler, size)
            check_side(size, target.file.suffix if target.file else target.suffix)
        for path, image, size in zip(self.pictures, images, sizes, strict=True):
            print(target.write(upscaled(image, upscaler, size), upscaled_settings(path, times, upscaler.name)))


def upscaled_settings(path: Path, times: float, name: str) -> Settings | None:
    """The picture's recorded settings plus the upscaling, in A1111's notation; None where it has none, as a photo."""
    from plainsd.pictures.images import read_settings
    from plainsd.pictures.upscaling import enlarged_notes

    try:
        settings = read_settings(path)
    except UserError:
        return None
    return replace(settings, other=(*settings.other, *enlarged_notes(times, name)))
