"""Folders and text files as they really are: hidden files, links, endings, masks, marks of order, odd ends of lines;
and that what is held out stays so."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, features
from test_train_data import picture, png, quiet, tiny_vae, written

from plainsd.errors import UserError
from plainsd.listing import files_below, read_prompts
from plainsd.models.vae import VAE
from plainsd.train.data.crops import Framing, boxes, nearest_box
from plainsd.train.data.folders import Reading
from plainsd.train.data.heldout import chosen_before, chosen_pictures, digests, of_run
from plainsd.train.data.latents import WantedView, _add_weights, cache_latents, view_keys
from plainsd.train.data.pictures import PictureSet, read_pictures
from plainsd.train.data.sources import read_source, real_source
from plainsd.train.order import Pick, random

SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


@pytest.fixture
def pairs(tmp_path):
    """Three pictures with captions."""
    place = tmp_path / "pairs"
    for name in "abc":
        pair(place, name)
    return place


def pair(folder, name, text="a caption", size=(16, 16), ending=".png", number=None):
    folder.mkdir(parents=True, exist_ok=True)
    picture(ord(name[0]) if number is None else number, size).save(folder / f"{name}{ending}")
    (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder / f"{name}{ending}"


def names(folder, **more):
    return [str(item.path.relative_to(folder)) for item in read_pictures(folder, 16, say=quiet, **more).items]


# ---- what a folder holds


def test_hidden_files_are_not_data(pairs):
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        pair(pairs / name, "a-checkpoint")
    (pairs / "._a.png").write_bytes(b"\x00\x05\x16\x07 what macOS keeps beside a file")
    (pairs / "._a.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    assert names(pairs) == ["a.png", "b.png", "c.png"]
    hidden = pairs.rename(pairs.with_name(".pairs"))
    assert names(hidden) == ["a.png", "b.png", "c.png"]  # one that is asked for by its name is


def test_linked_folders_are_followed_once(pairs, tmp_path):
    pair(tmp_path / "elsewhere", "x")
    pair(pairs / "sub", "d")
    (pairs / "linked").symlink_to(tmp_path / "elsewhere")
    (pairs / "again").symlink_to(pairs / "sub")
    (pairs / "sub" / "up").symlink_to(pairs)  # a circle
    assert names(pairs) == ["a.png", "b.png", "c.png", "linked/x.png", "sub/d.png"]
    (tmp_path / "all").symlink_to(pairs)
    assert len(names(tmp_path / "all")) == 5


def test_a_link_to_nothing_is_told(pairs):
    (pairs / "gone.png").symlink_to(pairs / "nowhere.png")
    (pairs / "gone.txt").write_text("it was here")
    with pytest.raises(UserError, match="gone.png: No such file or directory .*gone.png"):
        read_pictures(pairs, 16, say=quiet)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_subfolder_that_may_not_be_read_is_told(pairs):
    (pairs / "locked").mkdir(mode=0)
    with pytest.raises(UserError, match="cannot read the folder .*locked"):
        read_pictures(pairs, 16)


def test_unreadable_subfolders_are_heard_of(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert files_below(tmp_path) == []
    with pytest.raises(UserError, match="cannot read the folder .*locked.*Permission denied.*; check its permissions"):
        read_pictures(tmp_path, 16)


KINDS = {
    ".avif": "avif",
    ".tif": None,
    ".TIFF": None,
    ".gif": None,
    ".jp2": "jpg_2000",
    ".j2k": "jpg_2000",
    ".JPG": None,
    ".jfif": None,
    ".webp": "webp",
    ".bmp": None,
    ".tga": None,
    ".ppm": None,
    ".qoi": None,
    ".PNG": None,
}


@pytest.mark.parametrize("ending", KINDS)
def test_pictures_of_every_kind_are_used(tmp_path, ending):
    feature = KINDS[ending]
    if feature and not features.check(feature):
        pytest.skip(f"this Pillow has no {feature}")
    pair(tmp_path / "pictures", "one", ending=ending)
    (item,) = read_pictures(tmp_path / "pictures", 16).items
    assert item.size == (16, 16) and item.open().size == (16, 16)
    assert read_source(str(tmp_path / "pictures"), 16, tmp_path / "cache").items[0].texts == ("a caption",)


def test_pictures_that_cannot_be_read_are_named(pairs):
    for name, content in {
        "d.heic": b"\x00\x00\x00\x18ftypheic",
        "e.avif": b"\x00\x00\x00\x18ftypavif and no more",
    }.items():
        (pairs / name).write_bytes(content)
        (pairs / name).with_suffix(".txt").write_text("a caption")
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(pairs / "f.gif", save_all=True, append_images=frames[1:])
    (pairs / "f.txt").write_text("moving")
    for name in ("g.psd", "h.CR2", "i.svg"):
        (pairs / name).write_bytes(b"layers, exposures and lines")
    (pairs / "notes.md").write_text("nothing about it")
    said = []
    assert len(read_pictures(pairs, 16, bad_share=0.5, say=said.append)) == 3
    assert any("3 not used, of kinds that are not read here; save them as PNG: g.psd, h.CR2, i.svg" in s for s in said)
    told = next(s for s in said if s.startswith("left out 3 of 6"))
    assert "d.heic" in told and "e.avif" in told and "f.gif" in told and "animated" in told


def test_endings_in_upper_case(tmp_path):
    folder = tmp_path / "pictures"
    pair(folder, "a", ending=".PNG")
    (folder / "a.txt").rename(folder / "a.TXT")
    assert [(i.name, i.texts) for i in read_pictures(folder, 16).items] == [("a.PNG", ("a caption",))]
    (folder / "METADATA.JSONL").write_text('{"file_name": "a.PNG", "text": "told"}\n')
    (found,) = read_source(str(folder), 16, tmp_path / "cache").items
    assert found.texts == ("told",)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_shards_in_upper_case(tmp_path, kind):
    place = written(kind, tmp_path / kind)
    for file in (tmp_path / kind).iterdir():
        file.rename(file.with_suffix(file.suffix.upper()))
    (tmp_path / kind / f"._0.{kind}").write_bytes(b"\x00\x05\x16\x07")
    assert len(read_source(place, 16, tmp_path / "cache")) == 5
    one = next(p for p in (tmp_path / kind).iterdir() if not p.name.startswith("."))
    assert len(read_source(str(one), 16, tmp_path / "cache")) in (3, 2, 5)


def test_a_table_under_another_name_is_refused(tmp_path):
    written("csv", tmp_path / "csv")
    (tmp_path / "csv" / "metadata.csv").rename(tmp_path / "csv" / "Metadata.CSV")
    with pytest.raises(UserError, match="Metadata.CSV: the datasets library reads it under the name metadata.csv"):
        read_source(str(tmp_path / "csv"), 16, tmp_path / "cache")


def test_pictures_that_the_metadata_leaves_out_are_named(tmp_path):
    pair(tmp_path, "a"), pair(tmp_path / "sub", "b")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "sub/../a.png", "text": "one"}\n')
    said = []
    assert len(read_pictures(tmp_path, 16, say=said.append)) == 1
    assert said == [f"{tmp_path}: 1 not used, not in metadata.jsonl: sub/b.png"]


# ---- folders within folders


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_what_is_for_something_else_is_left_out(pairs, tmp_path, linked, listed):
    pair(tmp_path / "real" if linked else pairs / "held", "x")
    if linked:
        (pairs / "held").symlink_to(tmp_path / "real")
        (pairs / "y.png").symlink_to(tmp_path / "real" / "x.png")
        (pairs / "y.txt").write_text("a caption")
    if listed:
        rows = [{"file_name": name, "text": "it"} for name in ("a.png", "b.png", "c.png", "held/x.png")]
        (pairs / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert names(pairs, without=[tmp_path / "real" if linked else pairs / "held"]) == ["a.png", "b.png", "c.png"]
    assert len(names(pairs, without=[pairs, tmp_path, tmp_path / "nowhere"])) == 4 + (linked and not listed)
    assert names(pairs, without=[pairs / "b.png"])[:2] == ["a.png", "c.png"]


def test_sources_of_other_kinds_leave_it_out_too(tmp_path):
    place = written("parquet", tmp_path / "parquet")
    held = written("parquet", tmp_path / "parquet" / "held")
    reading = Reading(without=(tmp_path / "parquet" / "held",))
    assert len(read_source(place, 16, tmp_path / "cache", Reading())) == 10
    assert len(read_source(place, 16, tmp_path / "cache", reading)) == 5 == len(read_source(held, 16, tmp_path / "c"))
    place = written("csv", tmp_path / "csv")
    found = read_source(place, 16, tmp_path / "cache", Reading(without=(tmp_path / "csv" / "2.png",)))
    assert [item.texts[0][:9] for item in found.items] == [f"picture {i}" for i in (0, 1, 3, 4)]


# ---- text


def test_lines_end_at_newlines_only(tmp_path):
    text = f"one{SEPARATORS}caption\r\nanother\n"
    pair(tmp_path, "a", text)
    assert read_pictures(tmp_path, 16).items[0].texts == (f"one{SEPARATORS}caption", "another")
    row = json.dumps({"file_name": "a.png", "text": "told\u2028so\x85"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(row + "\n", encoding="utf-8")
    assert read_pictures(tmp_path, 16).items[0].texts == ("told\u2028so\x85",)


def test_a_byte_order_mark_is_no_caption(tmp_path):
    folder = tmp_path / "pictures"
    pair(folder, "a", "\ufeffa cat\n"), pair(folder, "b", "\ufeff\n")
    assert [i.texts for i in read_pictures(folder, 16, bad_share=0.5, say=quiet).items] == [("a cat",)]
    (folder / "metadata.jsonl").write_text('\ufeff{"file_name": "a.png", "text": "told"}\n', encoding="utf-8")
    assert read_pictures(folder, 16, say=quiet).items[0].texts == ("told",)


def test_a_blank_line_is_no_broken_picture(tmp_path):
    pair(tmp_path, "a")
    (tmp_path / "metadata.jsonl").write_text('\n{"file_name": "a.png", "text": "it"}\r\n  \n\nnonsense\n')
    said = []
    assert len(read_pictures(tmp_path, 16, bad_share=0.5, say=said.append)) == 1
    assert said[0].startswith("left out 1 of 2 pictures: metadata.jsonl line 5:")


def test_metadata_that_is_no_text_is_named(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes('{"text": "café"}'.encode("utf-16"))
    with pytest.raises(UserError, match=r"cannot read .*metadata.jsonl .*; give a text file in UTF-8") as caught:
        read_pictures(tmp_path, 16)
    assert "\n" not in str(caught.value)


def test_captions_under_other_names(tmp_path):
    """Of metadata.jsonl; diffusers' scripts have `--caption_column`."""
    for name in "abc":
        picture(ord(name), (16, 16)).save(tmp_path / f"{name}.png")
    rows = [
        {"file_name": "a.png", "prompt": "one", "style": "ink"},
        {"file_name": "b.png", "text": "two", "prompt": "not this", "style": ["oil", "wax"]},
        {"file_name": "c.png", "caption": ["three", "iii"], "style": ""},
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def texts(**more):
        return [item.texts for item in read_pictures(tmp_path, 16, say=quiet, bad_share=0.5, **more).items]

    assert texts() == [("one",), ("two",), ("three", "iii")]
    assert texts(text_column="style") == [("ink",), ("oil", "wax")]
    assert texts(text_column="style", caption="plain") == [("ink",), ("oil", "wax"), ("plain",)]
    with pytest.raises(UserError, match=r"metadata.jsonl: no line has 'stile'; name another with --text-column"):
        texts(text_column="stile")
    reading = Reading(text_column="style", bad_share=0.5)
    assert read_source(str(tmp_path), 16, tmp_path / "cache", reading, quiet).items[1].texts == ("oil", "wax")


def test_captions_in_caption_files(pairs):
    """kohya's --caption_extension is .caption if nothing else is said."""
    (pairs / "a.txt").rename(pairs / "a.CAPTION")
    (pairs / "b.caption").write_text("another")
    said = []
    found = read_pictures(pairs, 16, say=said.append).items
    assert [sorted(item.texts) for item in found] == [["a caption"], ["a caption", "another"], ["a caption"]]
    assert said == [
        "1 pictures have captions in several files (b.caption and b.txt); one is picked at random each time"
    ]


# ---- kohya's folders


@pytest.fixture
def dogs(tmp_path):
    """As sd-scripts wants its --train_data_dir."""
    place = tmp_path / "dogs"
    pair(place / "10_sks dog", "a", "a dog on grass")
    pair(place / "10_sks dog", "b").with_suffix(".txt").unlink()
    pair(place / "2_dog_of clay", "c").with_suffix(".txt").unlink()
    return place


def read(source, tmp_path, **more):
    said = []
    found = read_source(source, 16, tmp_path / "cache", Reading(**more), said.append).items
    return [(item.path.name, item.texts, item.repeats) for item in found], said


def test_kohyas_folders(dogs, tmp_path):
    """sd-scripts, config_util.py: repeats before the first `_`; the class after it, for pictures without a caption."""
    wanted = [("a.png", ("a dog on grass",), 10), ("b.png", ("sks dog",), 10), ("c.png", ("dog_of clay",), 2)]
    assert read(f"kohya:{dogs}", tmp_path) == (wanted, [])
    assert [one[2] for one in read(f"kohya:{dogs}:3", tmp_path)[0]] == [30, 30, 6]
    assert [one[1] for one in read(f"kohya:{dogs}", tmp_path, caption="it")[0]] == [
        ("a dog on grass",),
        ("it",),
        ("it",),
    ]
    found, _ = read(f"kohya:{dogs}", tmp_path, without=(dogs / "2_dog_of clay",))
    assert found == wanted[:2]


def test_a_limit_and_a_share_are_of_the_whole_source(dogs, tmp_path):
    """And not of each folder in it."""
    for limit in (1, 2, 3, 9):
        found, _ = read(f"kohya:{dogs}", tmp_path, limit=limit)
        assert [name for name, *_ in found] == ["a.png", "b.png", "c.png"][:limit]
    (dogs / "2_dog_of clay" / "c.png").write_bytes(b"broken")  # all of its folder, and a third of the source
    found, (said,) = read(f"kohya:{dogs}", tmp_path, bad_share=0.34)
    assert [name for name, *_ in found] == ["a.png", "b.png"] and said.startswith("left out 1 of 3 pictures: c.png")
    with pytest.raises(UserError, match=r"^kohya:.*dogs: 1 of 3 pictures cannot be used, more than 33%"):
        read(f"kohya:{dogs}", tmp_path, bad_share=0.33)


def test_a_source_is_known_however_it_is_written(dogs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linked").symlink_to(dogs)
    for prefix in ("", "kohya:"):
        ways = {real_source(f"{prefix}{way}") for way in ("dogs", "./dogs/", "dogs/../dogs", dogs, "dogs:1", "linked")}
        assert ways == {f"{prefix}{dogs.resolve()}:1"}
        assert real_source(f"{prefix}dogs:3") == f"{prefix}{dogs.resolve()}:3"
    assert real_source("owner/name@v2:3") == "owner/name@v2:3"


def test_what_kohya_leaves_out_is_named(dogs, tmp_path):
    pair(dogs, "loose")
    pair(dogs / "0_off", "never")
    pair(dogs / "plain", "odd")
    (dogs / "3_").mkdir()
    found, (said,) = read(f"kohya:{dogs}", tmp_path)
    assert len(found) == 3
    assert "3 not used, outside of folders such as '10_sks dog': 0_off/never.png, loose.png, plain/odd.png" in said


def test_a_plain_source_of_kohyas_folders_says_so(dogs, tmp_path):
    found, said = read(str(dogs), tmp_path, caption="it")
    assert {repeats for *_, repeats in found} == {1}
    assert said == [f"{dogs}: '10_sks dog' is read like any folder; with --data 'kohya:{dogs}' its name counts"]


def test_folders_that_are_not_kohyas(pairs, tmp_path):
    with pytest.raises(UserError, match="has no folders such as '10_sks dog'.*leave kohya: out"):
        read(f"kohya:{pairs}", tmp_path)
    with pytest.raises(UserError, match="no folder .*nowhere"):
        read(f"kohya:{tmp_path / 'nowhere'}", tmp_path)


def test_a_stream_keeps_every_picture(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = [f"picture {i}{sign} and more" for i, sign in enumerate(SEPARATORS)]
    table = {"image": [png(i, (16, 16)) for i in range(len(texts))], "text": texts}
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "data" / "train.parquet")
    reading, cache = Reading(stream=True, limit=len(texts)), tmp_path / "cache"
    first = read_source(str(tmp_path / "data"), 16, cache, reading)
    assert [item.texts for item in first.items] == [(text,) for text in texts]
    kept = next(cache.glob("stream-*"))
    (kept / "whole").unlink()
    content = (kept / "metadata.jsonl").read_bytes()
    (kept / "metadata.jsonl").write_bytes(content[: content.index("\u2029".encode()) + 1])  # mid-character
    again = read_source(str(tmp_path / "data"), 16, cache, reading)
    assert [item.texts for item in again.items] == [(text,) for text in texts]
    assert torch.equal(again.pixels(range(len(texts))), first.pixels(range(len(texts))))


def test_a_prompts_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff# what we draw\r\na cat\u2028asleep\r\n\r\n  # a dog\r\na dog #1\n", encoding="utf-8")
    assert read_prompts(file) == ["a cat\u2028asleep", "a dog #1"]
    file.write_text("# nothing yet\n")
    with pytest.raises(UserError, match="has no prompts; write one a line"):
        read_prompts(file)


# ---- masks


def half(path, size=(16, 16), light=True):
    mask = Image.new("L", size, 0)
    if light:
        mask.paste(255, (0, 0, size[0] // 2, size[1]))
    mask.save(path)


@pytest.mark.parametrize("name", ["a.mask.PNG", "a.mask.jpg", "a.MASK.tiff", "a.mask.webp"])
def test_masks_of_every_kind(pairs, tmp_path, name):
    half(pairs / name)
    pictures = read_pictures(pairs, 16, say=quiet)
    assert [item.masked for item in pictures.items] == [True, False, False]
    masks = cache_latents(tiny_vae(), pictures, tmp_path / "cache").masks([Pick(0, 0, random(0, 0, 0))])
    assert masks[0, 0, :, :4].min() == 1 and masks[0, 0, :, 4:].max() == 0


def test_masks_that_fit_no_picture_and_two_for_one(pairs):
    half(pairs / "z.mask.png"), half(pairs / "a.mask.png"), half(pairs / "a.mask.jpg")
    said = []
    assert len(read_pictures(pairs, 16, bad_share=0.5, say=said.append)) == 2
    assert said[0] == f"{pairs}: 1 not used, masks without a picture: z.mask.png"
    assert "a.png: it has 2 masks (a.mask.jpg, a.mask.png)" in said[1]


def test_a_mask_that_changes_is_noticed(pairs, tmp_path):
    """Edited, removed, added, of another size: the scan and the cache look again, and only at that picture."""
    vae, mask, known = tiny_vae(), pairs / "a.mask.png", tmp_path / "cache" / "scanned.json"

    def light():
        pictures = read_pictures(pairs, 16, known=known, bad_share=0.5, say=quiet)
        latents = cache_latents(vae, pictures, tmp_path / "cache")
        masks = latents.masks([Pick(0, 0, random(0, 0, 0))])
        return None if masks is None else masks.mean().item()

    half(mask, light=False), half(pairs / "b.mask.png")
    assert light() == 0
    half(mask)
    assert light() == 0.5
    mask.unlink()
    assert light() == 1  # b's is there still
    Image.new("L", (16, 16), 0).save(mask)
    assert light() == 0
    half(mask, (8, 8))
    said = []
    assert len(read_pictures(pairs, 16, known=known, bad_share=0.5, say=said.append)) == 2
    assert "a.png: its mask is of another size than its 16x16 pixels" in said[0]
    mask.unlink(), (pairs / "b.mask.png").unlink()
    assert light() is None


def test_only_the_picture_whose_mask_changed_is_encoded_again(pairs, tmp_path, monkeypatch):
    vae, encode, seen = tiny_vae(), VAE.encode, []
    monkeypatch.setattr(VAE, "encode", lambda self, pixels: seen.append(len(pixels)) or encode(self, pixels))
    half(pairs / "a.mask.png", light=False)
    cache_latents(vae, read_pictures(pairs, 16), tmp_path / "cache")
    half(pairs / "a.mask.png")
    cache_latents(vae, read_pictures(pairs, 16), tmp_path / "cache")
    assert seen == [3, 1]


def test_masks_in_the_caches_of_older_runs_are_not_believed(pairs):
    """Their keys knew the picture and the view, and that some pictures of the set had masks."""
    half(pairs / "b.mask.png")
    vae, pictures = tiny_vae(), read_pictures(pairs, 16)
    base = hashlib.sha256(f"{vae.config} True".encode())
    _add_weights(base, vae)
    wanted = [WantedView(0, pictures.views(0)[0], 0, 0)]
    before = f"{base.hexdigest()} {pictures.items[0].mark()} {wanted[0].view}"
    assert hashlib.sha256(before.encode()).hexdigest()[:16] not in view_keys(vae, pictures, wanted, True)


def test_a_mask_that_the_metadata_names_must_be_there(pairs):
    (pairs / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "it", "mask": "no.png"}\n')
    with pytest.raises(UserError, match=r"a.png: No such file or directory \(.*no.png\)"):
        read_pictures(pairs, 16, say=quiet)


def tar_with_masks(file, count=3, light=True):
    import io
    import tarfile

    with tarfile.open(file, "w") as tar:
        for i in range(count):
            mask = io.BytesIO()
            half(mask_file := file.parent / "mask.png", light=light)
            mask.write(mask_file.read_bytes())
            mask_file.unlink()
            rows = (("mask.png", mask.getvalue()), ("PNG", png(i, (16, 16))), ("TXT", f"\ufeffpicture {i}".encode()))
            for ending, data in rows:
                info = tarfile.TarInfo(f"{i:03d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_masks_in_tar_files_are_no_pictures(tmp_path):
    file = tmp_path / "one.TAR"
    tar_with_masks(file)
    found = read_source(str(file), 16, tmp_path / "cache")
    assert all(item.masked for item in found.items)
    assert [item.texts for item in found.items] == [(f"picture {i}",) for i in range(3)]
    assert np.array_equal(np.asarray(found.items[1].open()), np.asarray(picture(1, (16, 16))))
    before = [item.mark() for item in found.items]
    assert cache_latents(tiny_vae(), found, tmp_path / "c").masks([Pick(0, 0, random(0, 0, 0))]).mean() == 0.5
    tar_with_masks(file, light=False)
    again = read_source(str(file), 16, tmp_path / "cache")
    assert not set(before) & {item.mark() for item in again.items}
    assert cache_latents(tiny_vae(), again, tmp_path / "c").masks([Pick(0, 0, random(0, 0, 0))]).mean() == 0


def test_a_row_without_a_mask_counts_as_a_whole(tmp_path):
    import pyarrow
    import pyarrow.parquet

    half(tmp_path / "mask.png")
    rows = [{"bytes": (tmp_path / "mask.png").read_bytes(), "path": None}, None]
    pictures = [{"bytes": png(i, (16, 16)), "path": None} for i in range(2)]
    table = pyarrow.table({"image": pictures, "text": ["one", "two"], "mask": rows})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = read_source(str(tmp_path / "a.parquet"), 16, tmp_path / "cache")
    assert [item.masked for item in found.items] == [True, False]
    masks = cache_latents(tiny_vae(), found, tmp_path / "c").masks([Pick(i, i, random(0, 0, i)) for i in range(2)])
    assert masks.mean(dim=(1, 2, 3)).tolist() == [0.5, 1.0]


# ---- held out


@pytest.fixture
def many(tmp_path):
    for i in range(40):
        pair(tmp_path / "many", f"{i:02d}", size=(12, 12), number=i)
    return tmp_path / "many"


def held_names(items, held):
    return {items[i].name for i in held}


def held(folder, run, begun, share=0.1):
    items, said = read_pictures(folder, 16, say=quiet).items, []
    return items, of_run(items, share, run, begun=begun, say=said.append), said


def test_pictures_are_held_out_for_what_they_are(many):
    """Not for their number, order, name or place."""
    before = read_pictures(many, 16)
    rest, out = before.split(0.1)
    assert len(out) == 4 and len(rest) == 36
    shutil.move(many / "00.png", many / "zz.png"), shutil.move(many / "00.txt", many / "zz.txt")
    again = read_pictures(many, 16)
    assert {i.content() for i in again.split(0.1)[1].items} == {i.content() for i in out.items}
    pair(many, "new", number=99)
    more = {i.content() for i in read_pictures(many, 16).split(0.1)[1].items}
    assert len(more & {i.content() for i in out.items}) >= 3  # a new one may take the place of one, and of no more


def test_copies_of_a_picture_are_on_one_side(many):
    _, out = read_pictures(many, 16).split(0.1)
    name = out.items[0].path
    shutil.copy(name, many / "copy.png"), shutil.copy(name.with_suffix(".txt"), many / "copy.txt")
    rest, out = read_pictures(many, 16).split(0.1)
    assert name.read_bytes() not in {item.content() for item in rest.items}
    assert chosen_pictures(["one"] * 5, 0.4) == {0, 1} and chosen_pictures(["b", "a", "a", "c"], 0.3) == {1, 2}


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_what_a_run_holds_out_stays_held_out(many, tmp_path, share):
    run = tmp_path / "run"
    items, first, _ = held(many, run, begun=False, share=share)
    assert len(first) == round(40 * share)
    out = held_names(items, first)
    for i in range(10):
        pair(many, f"new {i}", number=100 + i)
    items, then, said = held(many, run, begun=True, share=share)
    assert held_names(items, then) == out and not said
    edited, renamed = sorted(out)[:2]
    picture(500, (12, 12)).save(many / edited)
    for ending in (".png", ".txt"):
        (many / renamed).with_suffix(ending).rename(many / f"another{ending}")
    items, then, _ = held(many, run, begun=True, share=share)
    assert held_names(items, then) == out - {renamed} | {"another.png"}


def test_a_run_that_wrote_nothing_down_keeps_what_it_chose(many, tmp_path):
    items, first, said = held(many, tmp_path / "run", begun=True)
    old = torch.randperm(40, generator=random(0, 4, 40)).tolist()[:4]  # the rule of before
    assert first == chosen_before(40, 0.1) == set(old) and "did not write down" in said[0]
    pair(many, "new", number=100)
    more, then, said = held(many, tmp_path / "run", begun=True)
    assert held_names(more, then) == held_names(items, first) and not said


def test_a_run_without_a_state_chooses_anew(many, tmp_path):
    held(many, tmp_path / "run", begun=False, share=0.5)
    assert len(held(many, tmp_path / "run", begun=False, share=0.1)[1]) == 4


def test_where_none_is_left_it_is_said(many, tmp_path):
    items, first, _ = held(many, tmp_path / "run", begun=False)
    for i in first:
        items[i].path.unlink()
    with pytest.raises(UserError, match="none of the pictures are those that .*run holds out; put others there"):
        held(many, tmp_path / "run", begun=True)


def test_digests_are_remembered(many, tmp_path, monkeypatch):
    items = read_pictures(many, 16).items
    first = digests(items, tmp_path / "digests.json")
    monkeypatch.setattr(type(items[0]), "content", None)
    assert digests(items, tmp_path / "digests.json") == first and len(set(first)) == 40


def test_rows_are_held_out_too(tmp_path):
    found = read_source(written("parquet", tmp_path / "parquet"), 16, tmp_path / "cache")
    plain = written("csv", tmp_path / "csv")
    rest, out = found.split(0.4)
    assert len(out) == 2 and len(rest) == 3
    same = read_source(plain, 16, tmp_path / "cache").split(0.4)[1]
    assert [item.texts for item in same.items] == [item.texts for item in out.items]
    first = of_run(found.items, 0.4, tmp_path / "run", begun=False, say=quiet)
    assert of_run(found.items[::-1], 0.4, tmp_path / "run", begun=True, say=quiet) == {4 - i for i in first}


# ---- buckets


@pytest.mark.parametrize("size", [72, 96, 104, 200, 328, 520, 568, 576, 616, 760, 1000, 1032])
def test_a_box_of_exactly_the_wanted_shape_exists(size):
    assert (size, size) in boxes(size)
    assert nearest_box((700, 700), size) == (size, size)
    assert all(w % 8 == 0 == h % 8 and 0.6 * size**2 < w * h <= size**2 for w, h in boxes(size))


@pytest.mark.parametrize("size", [64, 96, 112, 128, 192, 320, 528])
def test_boxes_are_whole_latents_of_16_pixels_too(size):
    """An autoencoder of five levels has one latent for 16 x 16 pixels; half a latent's pixels would go unseen."""
    found = boxes(size, 16)
    assert (size, size) in found and len(found) >= 3
    assert all(w % 16 == 0 == h % 16 and 0.5 * size**2 < w * h <= size**2 for w, h in found)
    framing = Framing(buckets=True, multiple=16)
    assert framing.views("a.png", (300, 200), size)[0].size == nearest_box((300, 200), size, 16)


def test_nothing_is_cut_off_a_square(tmp_path):
    pair(tmp_path, "a", size=(568, 568))
    pictures = PictureSet(read_pictures(tmp_path, 568).items, 568, Framing(buckets=True))
    (view,) = pictures.views(0)
    assert view.scaled == view.size == (568, 568) and view.left == view.top == 0
