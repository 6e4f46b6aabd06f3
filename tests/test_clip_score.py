"""CLIPScore and CLIP embeddings: beside transformers' CLIPModel, and the commands eval --clip-score and embed."""

import json

import numpy as np
import pytest
import torch
from conftest import smooth_picture
from PIL import Image
from safetensors.torch import load_file, save_file
from serving import lora_file
from test_image_prompt import TOWER, picture_of

import plainsd
from plainsd.checkpoint import load_clip
from plainsd.cli import main
from plainsd.errors import UserError
from plainsd.files.clip import CLIP_TEXTS, open_clip
from plainsd.files.names import places
from plainsd.generate import final, text_to_image
from plainsd.models.clip import TextConfig, TextEncoder
from plainsd.models.vision import VISION_TOWERS
from plainsd.pictures.clip_score import clip_scores, plain_text
from plainsd.pictures.images import read_settings, write_png
from plainsd.pictures.settings import Settings
from plainsd.reports.embeddings import near_duplicates
from plainsd.text.tokenizer import CLIP, Tokenizer

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "eos_token_id": 49407,
}
TINY_TEXT = TextConfig(width=32, layers=2, heads=4, mlp=48, projection=24)
WORDS = ["a red apple", "A PHOTO of two dogs, 17 cats", "", "x " * 100]


def clip_of_transformers(act: str = "quick_gelu"):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    config = CLIPConfig(text_config=TEXT | {"hidden_act": act}, vision_config=TOWER | {"hidden_act": act},
                        projection_dim=24)  # fmt: skip
    model = CLIPModel(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # pictures and texts far apart
            read = "patch_embedding" in name or "token_embedding" in name
            torch.nn.init.normal_(parameter, std=2.0 if read else 0.3)
    return model


@pytest.fixture(scope="module")
def reference():
    return clip_of_transformers()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, reference):
    place = tmp_path_factory.mktemp("clip") / "tiny"
    reference.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def clip(folder):
    return load_clip(folder, "cpu")


@torch.no_grad()
def theirs(reference, images, texts) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of length 1, of pictures by transformers' preprocessing and of texts by its tokenizer."""
    from transformers import CLIPImageProcessor, CLIPTokenizer

    own = Tokenizer.from_vocabulary(CLIP)
    tokenizer = CLIPTokenizer(vocab=own.vocabulary, merges=[tuple(pair) for pair in own.merges])
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    pixels = CLIPImageProcessor(size=28, crop_size=28)(images, return_tensors="pt").pixel_values
    out = reference(input_ids=ids.input_ids, attention_mask=ids.attention_mask, pixel_values=pixels)
    return out.image_embeds, out.text_embeds


IMAGES = [picture_of(0), picture_of(1, (40, 90)), smooth_picture(64), picture_of(2)]


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_scores_are_those_of_transformers(tmp_path, act):
    """2.5 * max(cos, 0) of CLIPModel's embeddings; one of the cosines is below 0."""
    reference = clip_of_transformers(act)
    reference.save_pretrained(tmp_path)
    clip = load_clip(tmp_path, "cpu")
    pictures, texts = theirs(reference, IMAGES, WORDS)
    assert (clip.pictures(IMAGES) - pictures).abs().max() < 1e-5
    assert (clip.texts(WORDS) - texts).abs().max() < 1e-5
    pairs = [(i, t) for i in range(4) for t in range(4)]
    own = clip_scores(clip, [IMAGES[i] for i, _ in pairs], [WORDS[t] for _, t in pairs], "")
    cosines = torch.stack([(pictures[i] * texts[t]).sum() for i, t in pairs])
    assert cosines.min() < 0 < cosines.max()
    assert np.allclose(own, 2.5 * cosines.clamp(min=0), rtol=0, atol=2e-5) and min(own) == 0
    _, (photo,) = theirs(reference, IMAGES[:1], ["A photo depicts a red apple"])
    expected = 2.5 * float((pictures[0] * photo).sum().clamp(min=0))
    assert abs(clip_scores(clip, IMAGES[:1], ["a red apple"])[0] - expected) < 2e-5


def test_a_clip_in_any_file_is_the_same(folder, clip, tmp_path, monkeypatch):
    """A file of a known size in transformers' names, and in OpenCLIP's."""
    monkeypatch.setitem(VISION_TOWERS, "tiny", clip.tower.config)
    monkeypatch.setitem(CLIP_TEXTS, "tiny", TINY_TEXT)
    names: dict[str, torch.Tensor] = {}
    for network in (clip.text, clip.tower):
        own = network.state_dict()
        names |= {p.name: p.to_theirs([own[name] for name in p.ours]).contiguous() for p in places(network, "openclip")}
    save_file(names | {"logit_scale": torch.ones(())}, tmp_path / "open.safetensors")
    for path in (folder / "model.safetensors", tmp_path / "open.safetensors"):
        found = load_clip(path, "cpu")
        for mine, its in ((clip.text, found.text), (clip.tower, found.tower)):
            assert all(
                torch.equal(a, b) for a, b in zip(mine.state_dict().values(), its.state_dict().values(), strict=True)
            )


@pytest.mark.parametrize("name, parameters", [
    ("ViT-B/32", 63_428_096), ("ViT-L/14", 123_650_304), ("ViT-H/14", 354_032_640), ("ViT-bigG/14", 694_659_840),
])  # fmt: skip
def test_sizes_of_the_public_text_encoders(name, parameters):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    own = CLIP_TEXTS[name]
    with torch.device("meta"):
        encoder = TextEncoder(own)
        reference = CLIPTextModelWithProjection(CLIPTextConfig(
            hidden_size=own.width, intermediate_size=own.mlp, num_hidden_layers=own.layers,
            num_attention_heads=own.heads, projection_dim=own.projection,
        ))  # fmt: skip
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert sum(p.numel() for p in reference.parameters()) == parameters
    assert own.projection == VISION_TOWERS[name].projection and own.activation == VISION_TOWERS[name].activation


def test_half_a_clip_is_refused(tmp_path, folder, capsys):
    from test_image_prompt import tower_of_transformers

    tower_of_transformers().save_pretrained(tmp_path / "tower")
    for path, says in ((tmp_path / "tower", "the image encoder of a CLIP alone"), (folder.parent, "holds no weights")):
        with pytest.raises(UserError, match=says):
            open_clip(path)


@pytest.mark.parametrize("prompt, text", [
    ("a (red:1.3) [big] apple <lora:style:0.8>", "a red big apple"),
    ("a [cat:dog:0.5] BREAK outside", "a dog outside"),
    ("a boat AND a sunset:0.5", "a boat a sunset"),
    (r"a \(real\) thing", "a (real) thing"),
])  # fmt: skip
def test_prompts_without_their_syntax(prompt, text):
    assert plain_text(prompt) == text


# --- plainsd eval --clip-score ---------------------------------------------------------------------------------------


def test_a_folder_is_scored_by_captions_and_by_settings(folder, clip, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    (pictures / "more").mkdir(parents=True)
    IMAGES[0].save(pictures / "a.png")
    (pictures / "a.txt").write_text("a red apple\nan apple\n")
    write_png(IMAGES[1], pictures / "more" / "b.png", Settings(prompt="a (boat:1.2) <lora:x:1>", steps=3))
    IMAGES[2].save(pictures / "c.png")
    assert main(["eval", "--clip-score", str(folder), "--pictures", str(pictures), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "1 without caption or settings, not scored: c.png" in said.err
    result = json.loads((tmp_path / "out" / "scores.json").read_text())
    scores = clip_scores(clip, [IMAGES[0], IMAGES[0], IMAGES[1]], ["a red apple", "an apple", "a boat"])
    expected = {"a.png": (scores[0] + scores[1]) / 2, "more/b.png": scores[2]}
    assert {one["name"]: pytest.approx(one["score"], abs=1e-6) for one in result["scores"]} == expected
    mean = sum(expected.values()) / 2
    assert result["clip_score"] == pytest.approx(mean, abs=1e-6) and result["prefix"] == "A photo depicts "
    assert result["standard_error"] == pytest.approx(abs(expected["a.png"] - expected["more/b.png"]) / 2, abs=1e-6)
    assert said.out == (tmp_path / "out" / "scores.txt").read_text() and f"CLIPScore {mean:.4f}" in said.out


def test_a_picture_of_another_folder_is_scored_under_its_path(folder, clip, tmp_path):
    """metadata.jsonl may name any file."""
    place, other = tmp_path / "pictures", tmp_path / "other.png"
    place.mkdir()
    IMAGES[0].save(other)
    (place / "metadata.jsonl").write_text(json.dumps({"file_name": str(other), "text": "a red apple"}) + "\n")
    assert main(["eval", "--clip-score", str(folder), "--pictures", str(place), "--out", str(tmp_path / "out")]) == 0
    assert [one["name"] for one in json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]] == [str(other)]


def test_drawn_prompts_are_scored(folder, clip, tmp_path, capsys):
    """Picture k has seed + k whatever the batch, and the written ones score the same as a folder."""
    (tmp_path / "prompts.txt").write_text("a red apple\na boat\nan owl\n")
    flags = ["--clip-score", str(folder), "--prompt-file", str(tmp_path / "prompts.txt"), "--steps", "2", "--seed", "5",
             "--batch", "2", "--clip-prefix", "", "--dtype", "float32", "--device", "cpu"]  # fmt: skip
    lora_file(plainsd.load(device="cpu").path, tmp_path / "ink.safetensors", 1)
    flags += ["--lora", f"{tmp_path / 'ink.safetensors'}:0.01"]
    assert main(["eval", *flags, "--out", str(tmp_path / "out")]) == 0
    first = json.loads((tmp_path / "out" / "scores.json").read_text())
    sd = plainsd.load(device="cpu", dtype="float32", loras=[(tmp_path / "ink.safetensors", 0.01)])
    pictures = [final(text_to_image(sd, text, steps=2, seed=5 + k))[0]
                for k, text in enumerate(("a red apple", "a boat", "an owl"))]  # fmt: skip
    expected = clip_scores(clip, pictures, ["a red apple", "a boat", "an owl"], "")
    assert [one["score"] for one in first["scores"]] == pytest.approx(expected, abs=5e-3)  # one grey level in a batch
    noted = read_settings(tmp_path / "out" / "00002.png")
    assert noted.seed == 7 and noted.prompt == "an owl <lora:ink:0.01>" and "lora:ink" in dict(noted.hashes)
    again = ["--clip-score", str(folder), "--pictures", str(tmp_path / "out"), "--clip-prefix", ""]
    assert main(["eval", *again, "--out", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "scores.json").read_text()) == first


def test_prompts_of_concepts_are_scored(folder, tmp_path, capsys):
    flags = ["--clip-score", str(folder), "--prompts", "2", "--steps", "1", "--out", str(tmp_path)]
    assert main(["eval", *flags]) == 0
    assert len(json.loads((tmp_path / "scores.json").read_text())["scores"]) == 2
    assert "on a" in capsys.readouterr().out


@pytest.mark.parametrize("flags, says", [
    (["--pictures", "."], "--pictures needs --clip-score"),
    (["--prompt-file", "x"], "--prompt-file needs --clip-score"),
    (["--clip-score", "CLIP", "--pictures", "none"], "no folder 'none'"),
    (["--clip-score", "CLIP", "--pictures", "."], "no pictures with captions or settings"),
    (["emoji", "--clip-score", "CLIP", "--pictures", "."], "leave MODEL, --prompt-file and --lora out"),
    (["--clip-score", "CLIP", "--pictures", ".", "--prompts", "3", "--steps", "9", "--plain", "--zero-snr", "on"],
     "--pictures scores pictures that are there; leave out --prompts, --steps, --zero-snr, --plain\n"),
    (["--clip-score", "CLIP", "--pictures", ".", "--seed", "random", "--cluster", "--workers", "2"],
     "leave out --seed, --cluster\n"),
    (["--clip-score", "CLIP", "--prompt-file", "x", "--prompts", "3"], "leave it or --prompt-file out"),
    (["--clip-score", "none", "--pictures", "."], "there is no model at 'none'"),
    (["--clip-score", "CLIP", "--prompt-file", "none.txt"], "cannot read the prompts in 'none.txt'"),
    (["--clip-score", "CLIP", "--batch", "0"], "batch 0 is out of range"),
], ids=str)  # fmt: skip
def test_wrong_flags_of_eval_are_one_line(folder, tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *(str(folder) if one == "CLIP" else one for one in flags)]) == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1 and not said.out, said.err


# --- plainsd embed ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """Four pictures, of which one is another one saved as JPEG, and one that is broken; a mask is none of them."""
    place = tmp_path / "pictures"
    (place / "sub").mkdir(parents=True)
    for name, image in (("a", IMAGES[0]), ("b", IMAGES[1]), ("c.mask", IMAGES[2]), ("sub/d", IMAGES[3])):
        image.save(place / f"{name}.png")
    IMAGES[0].save(place / "sub" / "a-again.jpg", quality=95)
    (place / "e.png").write_bytes(b"broken")
    return place


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_embeddings_are_written_and_duplicates_listed(folder, clip, pictures, tmp_path, capsys, suffix):
    out = tmp_path / f"found{suffix}"
    flags = ["--clip", str(folder), "--out", str(out), "--duplicates", "0.99", "--device", "cpu"]
    assert main(["embed", str(pictures), *flags]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert len(lines) == 1 and lines[0].endswith("sub/a-again.jpg  is like  a.png") and 0.99 <= float(lines[0][:6]) <= 1
    assert "e.png" in said.err and "1 of 4 pictures are near-duplicates" in said.err
    if suffix == ".npz":
        held = np.load(out)
        names, embeddings = held["files"].tolist(), held["embeddings"]
    else:
        from safetensors import safe_open

        with safe_open(out, "np") as file:
            names, embeddings = json.loads(file.metadata()["files"]), file.get_tensor("embeddings")
        assert list(load_file(out)) == ["embeddings"]
    assert names == ["a.png", "b.png", "sub/a-again.jpg", "sub/d.png"]
    expected = clip.pictures([Image.open(pictures / name).convert("RGB") for name in names]).numpy()
    assert embeddings.dtype == np.float32 and np.abs(embeddings - expected).max() < 1e-5


def test_the_same_vector_twice_is_a_duplicate_at_any_threshold():
    vectors = np.random.default_rng(0).normal(size=(200, 512)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = near_duplicates(np.repeat(vectors, 2, axis=0), 1.0)
    assert [(one.picture, one.like) for one in found] == [(2 * i + 1, 2 * i) for i in range(200)]


def test_near_duplicates_by_hand(monkeypatch):
    """Of a set the first is kept; a chain is not one set: what is near to a duplicate alone is kept."""
    monkeypatch.setattr("plainsd.reports.embeddings.ROWS", 2)
    angles = np.radians([0, 90, 10, 20, 91, 21])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    found = near_duplicates(vectors, float(np.cos(np.radians(12))))
    assert [(one.picture, one.like) for one in found] == [(2, 0), (4, 1), (5, 3)]
    assert found[0].cosine == pytest.approx(np.cos(np.radians(10)), abs=1e-6)


@pytest.mark.parametrize("flags, says", [
    (["none", "--clip", "CLIP"], "no folder 'none'"),
    ([".", "--clip", "CLIP"], ". has no pictures"),
    ([".", "--clip", "none"], "has no pictures"),
    (["."], "embed needs a CLIP; give one with --clip"),
    ([".", "--clip", "CLIP", "--out", "x.csv"], "are written as .npz or .safetensors"),
    ([".", "--clip", "CLIP", "--duplicates", "1.5"], "duplicates 1.5 is out of range"),
], ids=str)  # fmt: skip
def test_wrong_flags_of_embed_are_one_line(folder, tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    assert main(["embed", *(str(folder) if one == "CLIP" else one for one in flags)]) == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1 and not said.out
