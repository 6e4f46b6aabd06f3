"""Pictures in and out: every kind of file people have, whole writes, the settings inside, grids, previews."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from plainsd.errors import UserError
from plainsd.models.vae import VAE, VAEConfig
from plainsd.pictures import images, previews
from plainsd.pictures.settings import Settings


@pytest.fixture
def photo() -> Image.Image:
    """A smooth picture with four different corners, 24x16."""
    y, x = np.mgrid[:16, :24]
    return Image.fromarray(np.stack([x * 10, y * 15, 255 - x * 5 - y * 5], axis=-1).astype(np.uint8))


def saved(image: Image.Image, path, **options):
    image.save(path, **options)
    return path


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


def test_tensor_and_back_is_the_same_picture(photo):
    pixels = images.to_tensor(photo)
    assert pixels.shape == (1, 3, 16, 24) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() <= 1
    assert difference(images.to_pil(pixels)[0], photo) == 0


def test_to_pil_cuts_off_what_lies_outside():
    image = images.to_pil(torch.tensor([-3.0, 0.0, 3.0]).view(1, 3, 1, 1))[0]
    assert image.getpixel((0, 0)) == (0, 128, 255)


# --- kinds of files that are read -------------------------------------------------------------------------------------


def test_alpha_shows_the_background(tmp_path):
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    path = saved(image, tmp_path / "a.png")
    assert [images.open_picture(path).getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]
    assert images.open_picture(path, background="black").getpixel((1, 0)) == (0, 0, 0)


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    path = saved(image, tmp_path / "p.png", transparency=1)
    assert [images.open_picture(path).getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]


def test_sixteen_bit_grey_keeps_its_levels(tmp_path):
    levels = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    path = saved(Image.fromarray(levels), tmp_path / "g.png")
    assert [images.open_picture(path).getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (100,) * 3, (255,) * 3]


def test_sixteen_bit_colour(tmp_path):
    rows = b"\0" + struct.pack(">6H", 65535, 0, 257 * 77, 257, 257 * 2, 257 * 3)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "c.png").write_bytes(file)
    image = images.open_picture(tmp_path / "c.png")
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 77), (1, 2, 3)]


def test_cmyk_becomes_the_same_colours(photo, tmp_path):
    path = saved(photo.convert("CMYK"), tmp_path / "c.jpg", quality=98, subsampling=0)
    assert Image.open(path).mode == "CMYK"
    assert difference(images.open_picture(path), photo) <= 12


def test_a_profile_is_applied_unless_it_is_srgb(tmp_path):
    image = Image.new("RGB", (4, 4), (200, 30, 60))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    path = saved(image, tmp_path / "s.png", icc_profile=srgb.tobytes())
    assert images.open_picture(path).getpixel((0, 0)) == (200, 30, 60)
    swapped = srgb.tobytes().replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "gRBx".encode("utf-16-be"))  # red and green exchanged
    path = saved(image, tmp_path / "x.png", icc_profile=swapped)
    assert difference(images.open_picture(path), Image.new("RGB", (4, 4), (30, 200, 60))) <= 1
    path = saved(image.convert("RGBA"), tmp_path / "a.png", icc_profile=swapped)
    assert difference(images.open_picture(path), Image.new("RGB", (4, 4), (30, 200, 60))) <= 1
    path = saved(image, tmp_path / "b.png", icc_profile=b"no profile at all")
    assert images.open_picture(path).getpixel((0, 0)) == (200, 30, 60)


def test_exif_rotation_is_undone(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(photo.transpose(Image.Transpose.ROTATE_90), tmp_path / "r.png", exif=exif)
    assert difference(images.open_picture(path), photo) == 0


def test_a_phones_second_view_is_not_an_animation(photo, tmp_path):
    path = saved(photo, tmp_path / "p.mpo", format="MPO", save_all=True, append_images=[photo], quality=98)
    assert Image.open(path).n_frames == 2
    assert difference(images.open_picture(path), photo) <= 12


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "YCbCr", "HSV"])
def test_other_modes_become_rgb(photo, mode):
    assert images.to_rgb(photo.convert(mode)).mode == "RGB"


# --- files that are refused -------------------------------------------------------------------------------------------


def animation(path, photo):
    return saved(photo, path, save_all=True, append_images=[photo.rotate(180)], duration=10)


def test_animations_are_refused(photo, tmp_path):
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        with pytest.raises(UserError, match=f"{name}' is animated or has several pages \\(2\\)"):
            images.open_picture(animation(tmp_path / name, photo))


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif", "bmp", "tif"])
def test_truncated_pictures_are_refused(tmp_path, kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    path = saved(noise, tmp_path / f"t.{kind}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"t\.{kind}' is (broken or cut short|not a picture)") as caught:
        images.open_picture(path)
    assert "\n" not in str(caught.value)


def bomb(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13)
    return start + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"


@pytest.mark.parametrize("side", [10_000, 60_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused(tmp_path, side):
    (tmp_path / "b.png").write_bytes(bomb(side, side))
    with pytest.raises(UserError, match=r"claims .* pixels; scale it below"):
        images.open_picture(tmp_path / "b.png")


def test_float_pixels_are_refused(tmp_path):
    path = saved(Image.fromarray(np.ones((2, 2), np.float32)), tmp_path / "f.tif")
    with pytest.raises(UserError, match=r"f\.tif' has floating-point pixels"):
        images.open_picture(path)


def test_missing_folder_and_text_are_refused(tmp_path):
    (tmp_path / "x.png").write_text("not a picture")
    for path, message in [("none.png", "does not exist"), ("", "is a folder"), ("x.png", "not a picture")]:
        with pytest.raises(UserError, match=message):
            images.open_picture(tmp_path / path)


# --- masks -----------------------------------------------------------------------------------------------------------


def test_masks_are_light_where_something_is_drawn_anew():
    image = Image.new("RGBA", (4, 1), (255, 255, 255, 0))
    for x, colour in enumerate([(255, 255, 255, 255), (127, 127, 127, 255), (128, 128, 128, 255)]):
        image.putpixel((x, 0), colour)
    assert images.to_mask(image).flatten().tolist() == [1, 0, 1, 0]


# --- writing ---------------------------------------------------------------------------------------------------------


def test_settings_travel_in_the_picture(photo, tmp_path):
    for prompt in ("a red apple", "pomme 赤いりんご 🍎, with: commas\nand lines"):
        made = Settings(prompt, "bad", (24, 16), 20, 7.5, "euler_a", None, 3, model="emoji", noise="cpu")
        images.write_png(photo, tmp_path / "x.png", made)
        assert images.read_settings(tmp_path / "x.png") == made
        assert difference(images.open_picture(tmp_path / "x.png"), photo) == 0
    assert Image.open(tmp_path / "x.png").text["parameters"].endswith("Version: plainsd 0.1.0")


def test_a_picture_without_settings(photo, tmp_path):
    with pytest.raises(UserError, match="carries no settings"):
        images.read_settings(saved(photo, tmp_path / "x.png"))
    images.write_png(photo.resize((240, 160)), tmp_path / "t.png", Settings("x", steps=1))
    (tmp_path / "t.png").write_bytes((tmp_path / "t.png").read_bytes()[:400])
    with pytest.raises(UserError, match="broken or cut short"):
        images.read_settings(tmp_path / "t.png")
    with pytest.raises(UserError, match="does not exist"):
        images.read_settings(tmp_path / "none.png")


def test_nothing_half_written_stays(photo, tmp_path, monkeypatch):
    images.write_png(photo, tmp_path / "x.png")
    before = (tmp_path / "x.png").read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="No space"):
        images.write_png(photo.rotate(180), tmp_path / "x.png")
    assert os.listdir(tmp_path) == ["x.png"]
    assert (tmp_path / "x.png").read_bytes() == before


def test_written_files_have_ordinary_permissions(photo, tmp_path):
    old = os.umask(0o022)
    try:
        images.write_png(photo, tmp_path / "x.png")
    finally:
        os.umask(old)
    assert (tmp_path / "x.png").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("links", [True, False])
def test_nothing_is_overwritten(photo, tmp_path, monkeypatch, links):
    def refuse(*args):
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    names = [images.write_new_picture(photo.rotate(90 * turn), tmp_path / "a.png").name for turn in range(3)]
    assert names == ["a.png", "a-2.png", "a-3.png"]
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert difference(Image.open(tmp_path / "a-2.png"), photo.rotate(90)) == 0


# --- grids and previews -----------------------------------------------------------------------------------------------


def test_grid_places_pictures_row_by_row():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]
    pictures = [Image.new("RGB", (64, 48), c) for c in colours]
    plain = images.grid(pictures, columns=2)
    assert plain.size == (128, 96)
    assert [plain.getpixel(p) for p in [(5, 5), (70, 5), (5, 50), (70, 50)]] == colours
    labelled = images.grid(pictures, columns=2, across=["cfg 3", "cfg 5"], down=["steps 10", "steps 20"])
    left, top = labelled.width - 128, labelled.height - 96
    assert left > 40 and top > 12
    assert labelled.crop((left, top, *labelled.size)).tobytes() == plain.tobytes()
    assert min(labelled.crop((left, 0, left + 64, top)).convert("L").get_flattened_data()) < 128  # text is there
    assert min(labelled.crop((0, top, left, top + 48)).convert("L").get_flattened_data()) < 128


def test_labels_do_not_run_into_each_other():
    """Their columns are as wide as they are, and pictures stay in the middle."""
    colours = [(255, 0, 0), (0, 255, 0)]
    pictures = [Image.new("RGB", (16, 16), colour) for colour in colours]
    sheet = images.grid(pictures, columns=2, across=["sampler dpmpp_2m_sde", "sampler euler"])
    wide = sheet.width // 2
    assert wide > 100 and sheet.getpixel((wide // 2, sheet.height - 8)) == colours[0]
    assert sheet.getpixel((wide + wide // 2, sheet.height - 8)) == colours[1]
    edge = sheet.crop((wide - 5, 0, wide + 5, sheet.height - 16)).convert("L")
    assert min(edge.get_flattened_data()) == 255


def test_a_grid_may_have_a_short_last_row():
    assert images.grid([Image.new("RGB", (8, 8))] * 3, columns=2).getpixel((12, 12)) == (255, 255, 255)


class LinearVAE(torch.nn.Module):
    """Decodes by a known linear map, so that the fit has one right answer."""

    config = VAEConfig(channels=(8, 8, 8), latent_channels=4, scaling_factor=0.5)

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.matrix = torch.nn.Parameter(torch.randn(4, 3, generator=generator) * 0.05)

    def decode(self, latents):
        pixels = torch.einsum("blhw,lc->bchw", latents, self.matrix) + torch.tensor([0.1, 0.0, -0.1])[:, None, None]
        return torch.nn.functional.interpolate(pixels, scale_factor=4)


def test_preview_of_a_linear_decoder_is_exact():
    vae = LinearVAE()
    fitted = previews.fit_latent_rgb(vae)
    assert torch.allclose(fitted[:-1], vae.matrix / 0.5, atol=1e-4)
    assert torch.allclose(fitted[-1], torch.tensor([0.1, 0.0, -0.1]), atol=1e-4)
    latents = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(2))
    rough = [images.enlarged_to(image, (20, 12)) for image in previews.preview(latents, fitted)]
    exact = images.to_pil(vae.decode(latents / 0.5).detach())
    assert rough[0].size == (20, 12)
    assert all(difference(a, b) <= 1 for a, b in zip(rough, exact, strict=True))


def test_fit_of_a_real_network_is_repeatable():
    torch.manual_seed(0)
    vae = VAE(VAEConfig(channels=(8, 8, 8), layers=1, groups=4))
    first = previews.fit_latent_rgb(vae)
    assert first.shape == (5, 3) and torch.allclose(first, previews.fit_latent_rgb(vae), atol=1e-4)
