"""What training is fed: sources of every kind, checks, views, buckets, captions, the latent cache."""

import io
import json
import os
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from plainsd.errors import UserError
from plainsd.models.vae import VAE, VAEConfig
from plainsd.train.data.crops import Framing, boxes, cut_out, nearest_box, view_of
from plainsd.train.data.examples import Examples
from plainsd.train.data.folders import Reading
from plainsd.train.data.latents import cache_latents
from plainsd.train.data.live import LiveLatents
from plainsd.train.data.pictures import Item, PictureSet, described, read_pictures, shuffled
from plainsd.train.data.sources import read_source
from plainsd.train.order import Bucketed, Pick, Repeated, random

SIZES = [(24, 16), (16, 24), (16, 16), (40, 20), (17, 16)]


def picture(number, size):
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def png(number, size):
    file = io.BytesIO()
    picture(number, size).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Five pictures of different shapes."""
    place = tmp_path / "pictures"
    place.mkdir()
    lines = []
    for i, size in enumerate(SIZES):
        picture(i, size).save(place / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}, tag a, tag b"}) + "\n")
    (place / "metadata.jsonl").write_text("".join(lines))
    return place


def tiny_vae(seed=0):
    torch.manual_seed(seed)
    return VAE(VAEConfig(channels=(8, 8), layers=1, latent_channels=4, groups=2))


def quiet(*_):
    pass


# ---- sources


def written(kind, place):
    """The five pictures as that kind of source; its name."""
    place.mkdir()
    rows = [(png(i, size), f"picture {i}, tag a, tag b") for i, size in enumerate(SIZES)]
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        table = {"image": [{"bytes": content, "path": None} for content, _ in rows], "text": [text for _, text in rows]}
        pyarrow.parquet.write_table(pyarrow.table(table), place / "train.parquet")
    elif kind == "tar":
        for shard, part in enumerate((rows[:3], rows[3:])):
            with tarfile.open(place / f"{shard}.tar", "w") as tar:
                for i, (content, text) in enumerate(part):
                    for ending, data in (("png", content), ("txt", text.encode())):
                        info = tarfile.TarInfo(f"{shard}{i:03d}.{ending}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    else:
        for i, (content, _) in enumerate(rows):
            (place / f"{i}.png").write_bytes(content)
        lines = "".join(f'{i}.png,"{text}"\n' for i, (_, text) in enumerate(rows))
        (place / "metadata.csv").write_text("file_name,text\n" + lines)
    return str(place)


@pytest.mark.parametrize("kind", ["parquet", "tar", "csv"])
def test_every_source_gives_the_same_pictures(folder, tmp_path, kind):
    plain = read_source(str(folder), 16, tmp_path / "cache")
    other = read_source(written(kind, tmp_path / kind) + ":3", 16, tmp_path / "cache")
    assert [item.texts for item in other.items] == [item.texts for item in plain.items]
    assert [item.size for item in other.items] == SIZES
    assert [item.repeats for item in other.items] == [3] * 5
    assert torch.equal(other.pixels(range(5)), plain.pixels(range(5)))
    assert len({item.mark() for item in other.items}) == 5
    again = read_source(str(tmp_path / kind), 16, tmp_path / "cache")
    assert [item.mark() for item in again.items] == [item.mark() for item in other.items]


def test_a_stream_keeps_the_first_rows_and_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    source, cache = written("tar", tmp_path / "tar"), tmp_path / "cache"
    reading = Reading(stream=True, limit=4)
    first = read_source(source, 16, cache, reading)
    assert torch.equal(first.pixels(range(4)), read_pictures(folder, 16).pixels(range(4)))
    kept = next(cache.glob("stream-*"))
    lines = (kept / "metadata.jsonl").read_text().splitlines(keepends=True)
    (kept / "whole").unlink()
    (kept / "metadata.jsonl").write_text("".join(lines[:2]) + lines[2][:9])  # as a kill would leave it
    (kept / "00000003.png").unlink()
    assert torch.equal(read_source(source, 16, cache, reading).pixels(range(4)), first.pixels(range(4)))
    monkeypatch.setattr("plainsd.train.data.tables._opened", None)  # whole: nothing is opened any more
    assert len(read_source(source, 16, cache, reading)) == 4
    with pytest.raises(UserError, match="streaming needs --limit"):
        read_source(source, 16, tmp_path / "other", Reading(stream=True))


def test_columns_by_name_and_captions_for_all(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = {"photo": [png(i, (16, 16)) for i in range(3)], "words": [["one", "two"], ["three"], ["four"]]}
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(table), file)
    with pytest.raises(UserError, match="no picture column; it has photo, words; name one with --picture-column"):
        read_source(str(file), 16, tmp_path / "cache")
    with pytest.raises(UserError, match="no text column 'wrods'"):
        read_source(str(file), 16, tmp_path / "cache", Reading(picture_column="photo", text_column="wrods"))
    found = read_source(str(file), 16, tmp_path / "cache", Reading(picture_column="photo", text_column="words"))
    assert [item.texts for item in found.items] == [("one", "two"), ("three",), ("four",)]
    found = read_source(str(file), 16, tmp_path / "cache", Reading("a cat", picture_column="photo", limit=2))
    assert [item.texts for item in found.items] == [("a cat",)] * 2


def test_a_stream_of_other_columns_is_another(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = {"image": [png(0, (16, 16))] * 2, "photo": [png(1, (16, 16))] * 2, "text": ["a", "b"], "words": ["c", "d"]}
    file, cache = tmp_path / "a.parquet", tmp_path / "cache"
    pyarrow.parquet.write_table(pyarrow.table(table), file)
    reading = Reading(stream=True, limit=2)
    found = read_source(str(file), 16, cache, reading)
    words = read_source(str(file), 16, cache, replace(reading, text_column="words"))
    assert [item.texts for item in (*found.items, *words.items)] == [("a",), ("b",), ("c",), ("d",)]
    photos = read_source(str(file), 16, cache, replace(reading, picture_column="photo"))
    assert not torch.equal(photos.pixels([0]), found.pixels([0])) and photos.items[0].texts == ("a",)


def test_a_stream_of_files_that_changed_is_another(tmp_path):
    source, reading = written("tar", tmp_path / "tar"), Reading(stream=True, limit=2)
    first = read_source(source, 16, tmp_path / "cache", reading)
    (tmp_path / "tar" / "1.tar").replace(tmp_path / "tar" / "0.tar")
    second = read_source(source, 16, tmp_path / "cache", reading)
    assert [item.texts[0][:9] for item in (*first.items, *second.items)] == [f"picture {i}" for i in (0, 1, 3, 4)]


class Gone(Exception):
    """An answer of a server, as aiohttp tells it."""

    def __init__(self, status):
        super().__init__(f"{status}, message='no'")
        self.status = status


def addressed(tmp_path, ends):
    """A table whose pictures lie elsewhere."""
    import pyarrow
    import pyarrow.parquet

    table = {
        "image": [f"memory://there/{i}{end}" for i, end in enumerate(ends)],
        "text": [f"{i}" for i in range(len(ends))],
    }
    file = tmp_path / "links.parquet"
    pyarrow.parquet.write_table(pyarrow.table(table), file)
    return str(file)


@pytest.mark.parametrize("error", [FileNotFoundError("no"), Gone(404), Gone(403)], ids=repr)
def test_a_dead_link_of_a_stream_is_one_bad_picture(tmp_path, monkeypatch, error):
    import fsspec

    def fetch(path, mode):
        if "/1" in path:
            raise error
        return io.BytesIO(png(0, (16, 16)))

    monkeypatch.setattr(fsspec, "open", fetch)
    source, told = addressed(tmp_path, (".PNG?sign=" + 300 * "x", ".png", ".php?id=3")), []
    found = read_source(source, 16, tmp_path / "cache", Reading(stream=True, limit=3, bad_share=0.5), told.append)
    assert [item.path.name for item in found.items] == ["00000000.png", "00000002.png"]
    assert "left out 1 of 3 pictures: 00000001.png: " in told[0]


def test_a_stream_that_broke_off_goes_on(tmp_path, monkeypatch):
    import fsspec

    broken = [True]

    def fetch(path, mode):
        if "/1" in path and broken:
            raise Gone(503)
        return io.BytesIO(png(0, (16, 16)))

    monkeypatch.setattr(fsspec, "open", fetch)
    source, reading = addressed(tmp_path, (".png", ".png")), Reading(stream=True, limit=2)
    with pytest.raises(UserError, match=r"row 2, memory://there/1.png: 503, .*; run the same command again"):
        read_source(source, 16, tmp_path / "cache", reading)
    broken.clear()
    assert len(read_source(source, 16, tmp_path / "cache", reading)) == 2


@pytest.mark.parametrize("there", [1024, 100, 0], ids="{} of the end".format)
def test_a_tar_that_is_cut_short_is_refused(tmp_path, there):
    written("tar", tmp_path / "tar")
    shard = tmp_path / "tar" / "1.tar"
    with tarfile.open(shard) as tar:
        records = max(member.offset_data + (member.size + 511) // 512 * 512 for member in tar)
    content = shard.read_bytes()
    assert content[records:].strip(b"\0") == b"" and len(content) > records + 1024
    shard.write_bytes(content[: records + there])
    if there == 1024:  # the least that a whole one ends with
        assert len(read_source(str(tmp_path / "tar"), 16, tmp_path / "cache")) == 5
    else:
        with pytest.raises(UserError, match="1.tar is cut short: .* download it again"):
            read_source(str(tmp_path / "tar"), 16, tmp_path / "cache")


@pytest.mark.parametrize("names", [("train-00000-of-00001", "test-00000-of-00001"), ("train/0", "eval/0")], ids=str)
def test_other_splits_in_a_folder_are_left_out(tmp_path, names):
    import pyarrow
    import pyarrow.parquet

    place = tmp_path / "data"
    for number, name in enumerate(names):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        table = {"image": [png(number, (16, 16))] * (number + 1), "text": [name] * (number + 1)}
        pyarrow.parquet.write_table(pyarrow.table(table), place / f"{name}.parquet")

    def texts(split="train", place=place):
        told = []
        found = read_source(str(place), 16, tmp_path / "cache", Reading(split=split), told.append)
        return [item.texts[0] for item in found.items], told

    assert texts() == ([names[0]], [f"{place}: 1 of 2 files are of other splits than train, and are left out"])
    assert texts("test")[0] == [names[1]] * 2
    assert texts("test[:1]")[0] == [names[1]]
    assert texts("train+test") == ([names[0], *[names[1]] * 2], [])
    with pytest.raises(UserError, match="has no files of split validation, but of test, train; give --split one"):
        texts("validation")
    assert texts(place=(place / f"{names[1]}.parquet"))[0] == [names[1]] * 2  # a file is what was asked for
    (place / f"{names[0]}.parquet").unlink()
    assert texts()[0] == [names[1]] * 2  # with one split alone, names may be mere names


def test_a_caption_that_is_no_utf8_is_none(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = {"image": [png(i, (16, 16)) for i in range(2)], "text": [b"\xc3\xa4", b"\xff"]}
    file, told = tmp_path / "a.parquet", []
    pyarrow.parquet.write_table(pyarrow.table(table), file)
    with pytest.raises(UserError, match=r"1 of 2 pictures cannot be used, .*row 2: no caption"):
        read_source(str(file), 16, tmp_path / "cache")
    found = read_source(str(file), 16, tmp_path / "cache", Reading("a cat", bad_share=0.5), told.append)
    assert [item.texts for item in found.items] == [("ä",)] and "left out 1 of 2" in told[0]


def test_latents_with_means_are_not_trained_on_live_either(folder):
    vae, pictures = tiny_vae(), read_pictures(folder, 16)
    vae.config = replace(vae.config, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
    with pytest.raises(UserError, match="normalised channel by channel"):
        LiveLatents(vae, pictures, lambda picks: torch.zeros(1, 3, 16, 16), torch.float32)


def test_a_hub_name_is_fetched_by_the_library(folder, tmp_path, monkeypatch):
    import datasets

    table, asked = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=tmp_path), []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **more: asked.append((name, more)) or table)
    found = read_source("someone/drawings@v2:4", 16, tmp_path / "cache", Reading(split="test"))
    assert len(found) == 5 and found.items[0].repeats == 4
    ((name, more),) = asked
    assert (name, more["revision"], more["split"], more["streaming"]) == ("someone/drawings", "v2", "test", False)


@pytest.mark.parametrize(
    "source, message",
    [
        ("nowhere/at/all", "there is no folder or file 'nowhere/at/all'"),
        ("{tmp}/empty", "no pictures; put metadata.jsonl there, or pairs"),
        ("{tmp}/notes.txt", "is not a source of pictures"),
        ("{tmp}/broken.parquet", "cannot read"),
    ],
)
def test_sources_that_are_none(tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=message) as caught:
        read_source(source.format(tmp=tmp_path), 16, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_without_the_library_only_folders_are_read(folder, tmp_path, monkeypatch):
    source = written("tar", tmp_path / "tar")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert len(read_source(str(folder), 16, tmp_path / "cache")) == 5
    with pytest.raises(UserError, match=r"pip install 'plainsd\[train\]'"):
        read_source(source, 16, tmp_path / "cache")


# ---- checks


def test_a_name_of_any_bytes_is_a_fault(tmp_path):
    odd = os.fsdecode(b"caf\xe9")
    try:
        picture(0, (20, 20)).save(tmp_path / f"{odd}.png")
    except OSError:
        pytest.skip("this file system takes text alone for names")
    (tmp_path / f"{odd}.txt").write_text("a caption")
    for name in ("a", "b"):
        picture(1, (20, 20)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a caption")
    said, known = [], tmp_path / "known.json"
    found = read_pictures(tmp_path, 16, bad_share=0.9, known=known, say=said.append)
    assert [item.name for item in found.items] == ["a.png", "b.png"] and len(json.loads(known.read_text())) == 2
    assert r"caf\udce9.png: its name, or that of its mask or map, is not text in UTF-8" in said[0]
    said[0].encode()  # can be printed


def test_a_name_that_cannot_be_one_is_a_fault(tmp_path):
    picture(0, (20, 20)).save(tmp_path / "a.png")
    lines = [{"file_name": "a.png"}, {"file_name": "b\0.png"}, {"file_name": "a.png", "mask": "b\0.png"}]
    text = "".join(json.dumps(line | {"text": "a caption"}) + "\n" for line in lines)
    (tmp_path / "metadata.jsonl").write_text(text)
    said = []
    assert len(read_pictures(tmp_path, 16, bad_share=0.9, say=said.append)) == 1
    assert "metadata.jsonl line 2: not {" in said[0] and "metadata.jsonl line 3: not {" in said[0]


def test_faults_are_told_one_by_one(tmp_path):
    sizes = {"small": (20, 7), "good": (20, 20), "latin": (20, 20), "bare": (20, 20), "off": (20, 20)}
    for name, size in sizes.items():
        picture(0, size).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a caption")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "bare.txt").unlink()
    Image.new("L", (10, 10)).save(tmp_path / "off.mask.png")
    said = []
    assert len(read_pictures(tmp_path, 16, bad_share=0.9, say=said.append)) == 1
    for fault in (
        "left out 4 of 5",
        "small.png: only 20x7 pixels",
        "latin.png: its caption is not text in UTF-8",
        "bare.png: no caption",
        "off.png: its mask is of another size",
    ):
        assert fault in said[0]
    assert {item.texts for item in read_pictures(tmp_path, 16, caption="it", bad_share=0.9, say=quiet).items} == {
        ("a caption",),
        ("it",),
    }


def test_pictures_that_were_whole_are_not_opened_again(folder, tmp_path, monkeypatch):
    known = tmp_path / "scanned.json"
    first = read_pictures(folder, 16, known=known)
    monkeypatch.setattr(Item, "open", None)
    assert read_pictures(folder, 16, known=known).items == first.items
    monkeypatch.undo()
    (folder / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")  # changed since
    with pytest.raises(UserError, match="1 of 5 pictures cannot be used"):
        read_pictures(folder, 16, known=known, say=quiet)


def test_a_picture_that_changed_and_kept_its_size_is_opened_again(folder, tmp_path):
    known, path = tmp_path / "scanned.json", folder / "3.png"
    read_pictures(folder, 16, known=known)
    path.write_bytes(b"\0" * path.stat().st_size)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
    with pytest.raises(UserError, match="1 of 5 pictures cannot be used"):
        read_pictures(folder, 16, known=known, say=quiet)


def test_the_report(folder):
    pictures = PictureSet(read_pictures(folder, 24, repeats=2).items, 24, Framing(buckets=True))
    lines = described(pictures).splitlines()
    assert lines[0] == "5 pictures, 10 an epoch, 5 captions; shorter sides 16 to 20 px, median 16; 5 are enlarged to 24"
    assert lines[1].startswith("sizes: ") and "24x24 2" in lines[1]


def test_a_share_is_held_out(folder):
    pictures = read_pictures(folder, 16)
    rest, held = pictures.split(0.4)
    assert len(held) == 2 and len(rest) == 3
    assert {i.name for i in rest.items} | {i.name for i in held.items} == {i.name for i in pictures.items}
    assert pictures.split(0.4)[1].items == held.items
    with pytest.raises(UserError, match="cannot hold out"):
        pictures.split(1.5)


# ---- views


def test_a_view_covers_its_box():
    view = view_of((100, 50), (32, 32))
    assert view.scaled == (64, 32) and (view.left, view.top) == (16, 0)
    assert view_of((100, 50), (32, 32), across=1.0).left == 32 and view_of((100, 50), (32, 32), across=0.0).left == 0
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    plain = cut_out(image, view_of((4, 2), (2, 2), across=0.0))
    mirrored = cut_out(image, view_of((4, 2), (2, 2), across=1.0, mirrored=True))
    assert plain.getpixel((0, 0)) == mirrored.getpixel((1, 0)) == (255, 255, 255)


def test_random_places_are_the_pictures_own():
    framing = Framing(crop="random", places=3, flip=True)
    views = framing.views("a.png", (100, 50), 32)
    assert len(views) == framing.count == 6 and len({view.left for view in views}) == 3
    assert framing.views("a.png", (100, 50), 32) == views
    lefts = torch.tensor([framing.views(f"{i}.png", (100, 50), 32)[0].left for i in range(300)], dtype=torch.float)
    assert lefts.min() == 0 and lefts.max() == 31  # of 32 numbers of pixels to spare
    assert abs(lefts.mean() - 15.5) < 2 and abs(lefts.std() - 32 / 12**0.5) < 1  # evenly, over pictures


@pytest.mark.parametrize("size", [16, 64, 96, 128, 512, 1024])
def test_boxes_are_of_about_one_area(size):
    found = boxes(size)
    assert (size, size) in found and all((h, w) in found for w, h in found)
    assert all(w * h <= size * size and w * h > 0.6 * size * size and w % 8 == 0 == h % 8 for w, h in found)
    assert nearest_box((3000, 1500), size)[0] > size > nearest_box((3000, 1500), size)[1]
    assert nearest_box((700, 700), size) == (size, size)
    assert nearest_box((1, 9), size)[1] == max(h for _, h in found)


# ---- order


def test_repeats_come_as_often_as_told():
    order = Repeated([1, 3, 0, 2], seed=1)
    assert order.count == 6
    assert sorted(order(p) for p in range(6)) == sorted(order(p) for p in range(6, 12)) == [0, 1, 1, 1, 3, 3]


@pytest.mark.parametrize("make", [
    lambda seed: Repeated([1] * 24, seed), lambda seed: Bucketed(["wide", "tall"] * 12, [1] * 24, 4, seed)
])  # fmt: skip
def test_orders_have_their_seed(make):
    epochs = [[order(p) for p in range(24)] for order in (make(1), make(1), make(2))]
    assert epochs[0] == epochs[1] and sorted(epochs[0]) == sorted(epochs[2]) == list(range(24))
    assert sum(a == b for a, b in zip(epochs[0], epochs[2], strict=True)) < 8  # 1 or 2 of 24 on average


def test_buckets_give_micro_batches_of_one_shape():
    shapes = ["wide"] * 5 + ["tall"] * 3 + ["square"]
    order = Bucketed(shapes, [1] * 9, batch=2, seed=4)
    assert order.count == 6 + 4 + 2 and order.surplus == 3
    epochs = [[order(e * order.count + p) for p in range(order.count)] for e in range(3)]
    for epoch in epochs:
        batches = [epoch[i : i + 2] for i in range(0, len(epoch), 2)]
        assert all(len({shapes[i] for i in batch}) == 1 for batch in batches)
        assert set(epoch) == set(range(9))
    assert all(sum(a == b for a, b in zip(epochs[i], epochs[i + 1], strict=True)) < 8 for i in (0, 1))  # of 12
    assert Bucketed(shapes, [1] * 9, batch=2, seed=4)(30) == epochs[2][6]  # a function of the position alone


# ---- captions


def test_tags_are_shuffled_behind_the_first(folder):
    seen = {shuffled("a, b , c,d", 1, random(0, 0, i)) for i in range(60)}
    assert len(seen) == 6 and all(text.startswith("a, ") for text in seen)
    assert all(sorted(text.split(", ")) == ["a", "b", "c", "d"] for text in seen)
    pictures = PictureSet(read_pictures(folder, 16).items, 16, tags=1)
    assert {pictures.caption(2, random(0, 0, i)) for i in range(20)} == {
        "picture 2, tag a, tag b",
        "picture 2, tag b, tag a",
    }


# ---- the latent cache


def framed(folder, **framing):
    return PictureSet(read_pictures(folder, 16).items, 16, Framing(**framing))


def test_every_view_of_every_picture_is_cached(folder, tmp_path):
    pictures, vae = framed(folder, buckets=True, crop="random", places=2, flip=True), tiny_vae()
    latents = cache_latents(vae, pictures, tmp_path, batch=2)
    assert latents.views == 4 and len({*latents.shapes}) > 1
    for index in range(5):
        for number, view in enumerate(pictures.views(index)):
            pixels = np.asarray(cut_out(pictures.items[index].open(), view), dtype=np.float32)
            q = vae.encode(torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1)
            mean, std = latents.moments(index, number).float().chunk(2)
            torch.testing.assert_close(mean, q.mean[0], rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(std, (0.5 * q.logvar[0]).exp(), rtol=2e-3, atol=2e-3)


def test_workers_change_nothing(folder, tmp_path):
    pictures = framed(folder, buckets=True, flip=True)
    alone = cache_latents(tiny_vae(), pictures, tmp_path / "a", batch=2, workers=0)
    helped = cache_latents(tiny_vae(), pictures, tmp_path / "b", batch=2, workers=3)
    assert torch.equal(alone.data, helped.data)


def test_a_new_picture_costs_one_encoding(folder, tmp_path, monkeypatch):
    vae, encode, seen = tiny_vae(), VAE.encode, []
    monkeypatch.setattr(VAE, "encode", lambda self, pixels: seen.append(len(pixels)) or encode(self, pixels))
    first = cache_latents(vae, framed(folder), tmp_path)
    picture(9, (16, 16)).save(folder / "9.png")
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "9.png", "text": "new"}\n')
    second = cache_latents(vae, framed(folder), tmp_path)
    assert seen == [5, 1]
    assert torch.equal(first.data, second.data[: len(first.data)])
    cache_latents(vae, framed(folder, flip=True), tmp_path)
    assert sum(seen) == 12  # the mirrored ones alone
    cache_latents(tiny_vae(1), framed(folder), tmp_path)
    assert sum(seen) == 18  # another autoencoder: all


@pytest.fixture
def cached(folder, tmp_path, monkeypatch):
    """Latents of five pictures in a file; and the same again, with what it says and how many pictures it encodes."""
    place, encode, seen, said = tmp_path / "cache", VAE.encode, [], []
    monkeypatch.setattr(VAE, "encode", lambda self, pixels: seen.append(len(pixels)) or encode(self, pixels))

    def again(**options):
        seen.clear()
        said.clear()
        return (
            cache_latents(tiny_vae(), framed(folder, **options), place, say=said.append).data.clone(),
            said,
            sum(seen),
        )

    first, *_ = again()
    (file,) = place.glob("*.f16")
    return SimpleNamespace(first=first, file=file, keys=file.with_suffix(".keys"), again=again, place=place)


def same(latents: torch.Tensor, first: torch.Tensor) -> bool:
    """All of five bit for bit but one, which was encoded again, by itself and not with the others: its rounding."""
    apart = sum(not torch.equal(a, b) for a, b in zip(latents.view(5, -1), first.view(5, -1), strict=True))
    return apart <= 1 and torch.allclose(latents.float(), first.float(), rtol=2e-3, atol=1e-3)


def flip(path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_latents_that_are_as_they_were_written_are_not_made_again(cached):
    data, said, encoded = cached.again()
    assert torch.equal(data, cached.first) and (said, encoded) == ([], 0)


def test_a_flipped_byte_of_cached_latents_is_noticed_and_mended(cached):
    size = cached.file.stat().st_size
    for at in (0, size // 2, size - 1):
        flip(cached.file, at)
        data, said, encoded = cached.again()
        assert same(data, cached.first) and encoded == 1
        assert said == [f"{cached.file} is damaged: 1 of 5 latents are not as they were written; they are made again"]
    assert cached.again()[1] == []


def test_damaged_latents_are_not_copied_into_another_file(cached):
    flip(cached.file, cached.file.stat().st_size // 2)
    data, said, encoded = cached.again(flip=True)  # each picture as it is, and mirrored
    assert encoded == 6 and said == []
    assert same(data.view(5, 2, -1)[:, 0].flatten(), cached.first)


def test_latents_of_older_versions_get_checksums(cached):
    cached.keys.write_text("".join(line[: line.rindex(" ")] + "\n" for line in cached.keys.read_text().splitlines()))
    data, said, encoded = cached.again()
    assert torch.equal(data, cached.first) and encoded == 0
    assert said == [
        f"{cached.file} has no checksums, as older versions wrote it; it is taken as it is, and gets them now"
    ]
    assert cached.again()[1] == []
    flip(cached.file, 7)
    assert cached.again()[2] == 1


@pytest.mark.parametrize("at", [3, -3])  # in the first picture's key, and in the last one's sum
def test_a_flipped_byte_among_the_checksums(cached, at):
    flip(cached.keys, at)
    data, said, encoded = cached.again()
    assert same(data, cached.first) and encoded == 1 and "is damaged: 1 of 5" in said[0]
    assert cached.again()[1:] == ([], 0)


def test_another_crop_of_the_same_size_is_another_cache(folder, tmp_path):
    vae, random_crop, said = tiny_vae(), framed(folder, crop="random", places=1), []
    centre = cache_latents(vae, framed(folder), tmp_path / "cache")
    after_it = cache_latents(vae, random_crop, tmp_path / "cache", say=said.append)
    alone = cache_latents(vae, random_crop, tmp_path / "other")
    assert torch.equal(after_it.data, alone.data) and not said  # the other is not taken for a damaged one
    assert centre.data.shape == alone.data.shape and not torch.equal(centre.data, alone.data)


def test_masks_lie_beside_the_latents(folder, tmp_path):
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    mask.save(folder / "half.mask.png")
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines[2]["mask"] = "half.mask.png"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    latents = cache_latents(tiny_vae(), framed(folder), tmp_path / "cache")
    picks = [Pick(i, i, random(0, 0, i)) for i in (2, 3)]
    masks = latents.masks(picks)
    assert masks.shape == (2, 1, 8, 8) and masks[1].min() == 1
    assert masks[0, 0, :, :4].min() == 1 and masks[0, 0, :, 4:].max() == 0
    assert latents.draw(picks).shape == (2, 4, 8, 8)


def test_sizes_are_told_as_sdxl_wants_them(folder, tmp_path):
    pictures = framed(folder, crop="random", places=3)
    examples = Examples(pictures, cache_latents(tiny_vae(), pictures, tmp_path), dropout=0.0)
    seen = set()
    for position in range(30):
        batch = examples.draw([Pick(3, position, random(0, 2, position))], 1000)
        height, width, top, left, *target = batch.sizes[0].tolist()
        assert (height, width, top, target) == (20, 40, 0, [16, 16])
        seen.add(left)
    assert seen == {float(view.left) for view in pictures.views(3)} and len(seen) == 3
