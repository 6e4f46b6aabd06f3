"""`plainsd explain`: maps beside diffusers' own, the same picture to the bit, and a page that asks nobody."""

import json
import math
import re
from base64 import b64decode
from dataclasses import replace
from io import BytesIO

import explain_shots
import numpy as np
import pytest
import torch
from browser import chromium, needed  # noqa: F401
from conftest import TINY, TINY_REFINER, TINY_XL, tiny_sd
from PIL import Image
from serving import until
from test_edm import TINY_PLAYGROUND

import plainsd
from plainsd.cli import main
from plainsd.commands.explain import read_beside
from plainsd.diffusion.samplers import SAMPLERS
from plainsd.errors import UserError
from plainsd.generate import text_to_image
from plainsd.models.unet import UNet
from plainsd.pictures.conditioning import encode_prompts
from plainsd.pictures.drawing import Pictures
from plainsd.reports import explain_page, watching
from plainsd.reports.explain import Token, read_prompt
from plainsd.speed import faster
from plainsd.text.tokenizer import Tokenizer, find_vocabulary

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def embedded():
    return plainsd.load(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def explained(embedded):
    return plainsd.explain(embedded, PROMPT, seed=7, steps=4)


# --- the data --------------------------------------------------------------------------------------------------------


class Scores:
    """An attention processor of diffusers that keeps its maps, mean over heads."""

    def __init__(self):
        self.maps: list[tuple[bool, torch.Tensor]] = []  # cross-attention or not, (1, N, M)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **other):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q, k, v = (attn.head_to_batch_dim(each) for each in (q, k, v))
        scores = attn.get_attention_scores(q, k)
        self.maps.append((encoder_hidden_states is not None, scores.mean(0, keepdim=True)))
        out = attn.batch_to_head_dim(torch.bmm(scores, v))
        return attn.to_out[1](attn.to_out[0](out))


@pytest.mark.parametrize("variant", [TINY, TINY_XL], ids=lambda variant: variant.name)
@torch.no_grad()
def test_maps_equal_diffusers(variant, tmp_path):
    """At the second of three steps, of a picture that is not square."""
    from diffusers import UNet2DConditionModel

    sd = tiny_sd(variant)
    plainsd.save(sd, tmp_path / "model")
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "model", subfolder="unet")
    scores = Scores()
    theirs.set_attn_processor(scores)
    seen = plainsd.explain(sd, PROMPT, seed=3, steps=3, size=(96, 64), guidance=3.0)
    told = encode_prompts(sd, [PROMPT], size=(96, 64))
    x = seen.noisy[1:2] / math.sqrt(1 + seen.sigmas[1] ** 2)
    more = {}
    if told.vector is not None:
        pooled = told.vector[:, : -6 * 256]
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.tensor([[64, 96, 0, 0, 64, 96]])}}
    theirs(x, seen.timesteps[1], told.context, **more)
    for cross, ours in ((True, seen.cross_attention), (False, seen.self_attention)):
        layers = [scores for is_cross, scores in scores.maps if is_cross == cross]
        assert len(layers) == sum(seen.layers.values())
        for size, maps in ours.items():
            same = [one[0] for one in layers if one.shape[1] == math.prod(size)]
            assert len(same) == seen.layers[size]
            wanted = torch.stack(same).mean(0)
            wanted = wanted.T.unflatten(1, size) if cross else wanted
            torch.testing.assert_close(maps[1], wanted, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("variant", [TINY, TINY_XL], ids=lambda variant: variant.name)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("form", [lambda sd: sd, faster], ids=["plain", "packed"])
def test_the_picture_is_the_same_to_the_bit(variant, guidance, form):
    """Tokens of two chunks beside an empty negative prompt go through the network in calls of their own."""
    sd, prompt = form(tiny_sd(variant)), "red " * 30
    choices = dict(seed=5, steps=3, guidance=guidance)
    *steps, last = text_to_image(sd, prompt, **choices)
    seen = plainsd.explain(sd, prompt, **choices)
    assert isinstance(last, Pictures) and seen.image.tobytes() == last.images[0].tobytes()
    assert torch.equal(seen.noisy[1:], torch.cat([step.x for step in steps]))
    assert torch.equal(seen.denoised, torch.cat([step.denoised for step in steps]))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in sd.unet.modules())
    assert len(seen.tokens) == 154 and seen.words == ["red"] * 30
    assert (seen.uncond is None) == (guidance == 1)


@pytest.mark.parametrize("variant", [TINY, TINY_XL], ids=lambda variant: variant.name)
def test_maps_of_packed_layers_are_those_of_the_plain_ones(variant):
    plain, packed = (plainsd.explain(sd, PROMPT, steps=2) for sd in (tiny_sd(variant), faster(tiny_sd(variant))))
    for kind in ("cross_attention", "self_attention"):
        ours, theirs = getattr(packed, kind), getattr(plain, kind)
        assert ours.keys() == theirs.keys()
        for size, maps in ours.items():
            torch.testing.assert_close(maps, theirs[size], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("variant", [TINY, TINY_XL], ids=lambda variant: variant.name)
def test_maps_add_up_to_one(variant):
    seen = plainsd.explain(tiny_sd(variant), PROMPT, steps=2)
    sizes = {(8, 8), (4, 4)} if variant is TINY else {(4, 4)}  # XL's first level has none
    assert seen.cross_attention.keys() == seen.self_attention.keys() == seen.layers.keys() == sizes
    for maps in seen.cross_attention.values():
        torch.testing.assert_close(maps.sum(1), torch.ones_like(maps[:, 0]), atol=1e-5, rtol=0)
    for maps in seen.self_attention.values():
        torch.testing.assert_close(maps.sum(2), torch.ones_like(maps[..., 0]), atol=1e-5, rtol=0)
    everything = seen.heat(range(len(seen.tokens)), size=(20, 30))
    torch.testing.assert_close(everything, torch.ones(20, 30), atol=1e-5, rtol=0)


def test_a_words_heat_is_that_of_its_tokens(explained):
    seen = explained
    assert seen.words == ["a", "red", "apple"]
    assert seen.positions("apple") == [3] and seen.tokens[3].text == "apple</w>"
    by_hand = sum(
        seen.layers[size] * torch.nn.functional.interpolate(maps[2, 3][None, None], (8, 8), mode="bilinear")
        for size, maps in seen.cross_attention.items()
    ) / sum(seen.layers.values())
    torch.testing.assert_close(seen.heat("apple", steps=2), by_hand[0, 0])
    assert torch.equal(seen.heat("apple", steps=-1), seen.heat("apple", steps=len(seen.timesteps) - 1))
    with pytest.raises(UserError, match="unknown word 'aple'; did you mean 'apple'"):
        seen.heat("aple")


def test_words_of_several_tokens_and_learned_ones():
    sd = tiny_sd()
    learned = sd.tokenizers[0].add("<cat>")
    tokens, words = read_prompt(sd, "ab <cat>c, (d:1.5)", 4)
    assert words == ["ab", "<cat>", "c", ",", "d"]
    assert [token.word for token in tokens[:8]] == [None, 0, 0, 1, 2, 3, 4, None]
    assert tokens[3].ids == tuple(learned) and tokens[6].weight == 1.5


def test_estimates_make_the_guided_one(explained):
    mixed = explained.uncond + explained.settings.guidance * (explained.cond - explained.uncond)
    torch.testing.assert_close(mixed, explained.denoised, atol=1e-5, rtol=1e-5)
    assert {name: len(pictures) for name, pictures in explained.decoded.items()} == {
        "denoised": 4,
        "cond": 4,
        "uncond": 4,
    }


def test_steps_are_decoded_only_if_asked_for(embedded, explained):
    seen = plainsd.explain(embedded, PROMPT, seed=7, steps=4, decoded=False)
    assert seen.decoded == {} and seen.image.tobytes() == explained.image.tobytes()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_is_watched_where_its_steps_begin(embedded, sampler):
    seen = plainsd.explain(embedded, PROMPT, steps=3, sampler=sampler, decoded=False)
    levels = [embedded.schedule.timestep(sigma) for sigma in seen.sigmas[:-1]]
    assert seen.timesteps == pytest.approx(levels, abs=0.51)
    assert seen.noisy.shape[0] == len(seen.timesteps) + 1 == len(seen.sigmas)


def test_a_restarted_step_is_read_at_the_level_that_noise_took_it_to(embedded):
    """Estimates with and without the prompt make the guided one at that level alone."""
    seen = plainsd.explain(embedded, PROMPT, steps=20, sampler="restart", decoded=False)
    ended = [embedded.schedule.timestep(max(sigma, 1e-9)) for sigma in seen.sigmas[:-1]]
    assert max(asked - end for asked, end in zip(seen.timesteps, ended, strict=True)) > 400
    mixed = seen.uncond + seen.settings.guidance * (seen.cond - seen.uncond)
    torch.testing.assert_close(mixed, seen.denoised, atol=1e-4, rtol=1e-4)


def test_steps_that_ask_nothing_are_as_the_one_before(embedded):
    seen = plainsd.explain(embedded, PROMPT, steps=40, sampler="dpm_adaptive", decoded=False)
    again = [at for at in range(1, 40) if seen.timesteps[at] == seen.timesteps[at - 1]]
    assert again and len(seen.timesteps) == len(seen.cond) == 40 == len(seen.sigmas) - 1
    for at in again:
        assert torch.equal(seen.cond[at], seen.cond[at - 1])


def test_large_self_attention_is_left_out(embedded, monkeypatch):
    monkeypatch.setattr(watching, "SELF_POSITIONS", 20)
    seen = plainsd.explain(embedded, PROMPT, steps=1)
    assert seen.self_attention.keys() == {(4, 4)} and seen.cross_attention.keys() == {(8, 8), (4, 4)}


def test_what_cannot_be_watched_is_said(embedded):
    for prompt in ("a [red|green] apple", "a cat AND a dog"):
        with pytest.raises(UserError, match="explain one of its texts"):
            plainsd.explain(embedded, prompt)
    sd = tiny_sd()
    sd.refiner = tiny_sd(TINY_REFINER)
    with pytest.raises(UserError, match="leave the refiner out"):
        plainsd.explain(sd, PROMPT)


def test_hooks_go_when_the_drawing_fails(monkeypatch):
    sd = tiny_sd()
    monkeypatch.setattr(UNet, "forward", lambda *args, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plainsd.explain(sd, PROMPT)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in sd.unet.modules())


# --- the page --------------------------------------------------------------------------------------------------------


def told(page: str) -> list[dict]:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def values(stored: dict) -> np.ndarray:
    bytes_ = np.frombuffer(b64decode(stored["data"]), np.uint8).reshape(stored["shape"]) / 255
    return bytes_ * np.frombuffer(b64decode(stored["peak"]), np.float32).reshape(*stored["shape"][:-2], 1, 1)


def test_the_page_holds_the_maps(explained):
    (one,) = told(explain_page.page([explained]))
    assert [group["text"] for group in one["groups"]] == ["start", "a", "red", "apple", "end and padding"]
    ids = [at for group in one["groups"] for at in group["ids"]]
    assert sorted(ids) == sorted(list(token.ids) for token in explained.tokens)
    for stored in one["cross"]:
        maps = explained.cross_attention[tuple(stored["size"])]
        found = values(stored)  # (S, G, height, width)
        np.testing.assert_allclose(found[:, 3], maps[:, 3], atol=1 / 255)
        np.testing.assert_allclose(found.sum(1), 1, atol=5 / 255)
    np.testing.assert_allclose(
        values(one["self"][0]), explained.self_attention[8, 8].unflatten(2, (8, 8)), atol=1 / 255
    )
    np.testing.assert_allclose(values(one["self"][0]).sum((2, 3)), 1, atol=0.05)
    difference = (explained.cond - explained.uncond).square().mean(1).sqrt()
    np.testing.assert_allclose(values(one["difference"]), difference, atol=0.01 * difference.max())
    assert {name: len(each) for name, each in one["pictures"].items()} == dict.fromkeys(
        ("noisy", "estimate", "denoised", "cond", "uncond"), 4
    )
    assert np.sum(one["histograms"]["noisy"][0]) * 0.2 == pytest.approx(1, abs=1e-2)
    picture = Image.open(BytesIO(b64decode(one["picture"].partition(",")[2])))
    drawn = np.asarray(explained.image).astype(int)  # WebP keeps it nearly
    assert picture.size == explained.image.size and np.abs(np.asarray(picture) - drawn).mean() < 8


def test_the_page_asks_nobody(explained):
    page = explain_page.page([explained])
    assert "default-src 'none'; img-src data:;" in page
    outside = re.sub(r"http://www\.w3\.org/2000/svg", "", page)  # a name, not an address
    assert not re.search(
        r"https?:|//[a-z]+\.|@import|url\((?!data:)|\bfetch\(|XMLHttp|<link(?! rel=\"icon\" href=\"data:)", outside
    )
    assert not re.search(r"(?:src|href)=\"(?!data:)", outside)


def test_a_prompt_does_not_end_the_script(explained):
    other = replace(explained, settings=replace(explained.settings, prompt="</script><script>alert(1)</script>"))
    page = explain_page.page([other])
    assert page.count("</script>") == 2 and told(page)[0]["prompt"] == other.settings.prompt


def test_a_page_of_a_large_model_stays_below_5_mb(explained):
    """As of Stable Diffusion 1.5 with a full prompt: with smaller pictures and coarser maps."""
    steps, tokens, words, channels = 24, 77, 60, explained.noisy.shape[1]
    noise = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=noise)

    pictures = [Image.fromarray((random(256, 256, 3) * 255).byte().numpy())] * steps
    large = replace(
        explained,
        tokens=[
            explained.tokens[0],
            *(Token("x</w>", (5,), 1.0, i) for i in range(words)),
            *[explained.tokens[-1]] * 16,
        ],
        words=["x"] * words,
        sigmas=[float(steps - i) for i in range(steps + 1)],
        timesteps=[float(steps - i) for i in range(steps)],
        noisy=torch.randn(steps + 1, channels, 64, 64, generator=noise),
        denoised=random(steps, channels, 64, 64),
        cond=random(steps, channels, 64, 64),
        uncond=random(steps, channels, 64, 64),
        cross_attention={(side, side): random(steps, 1, side, side).expand(-1, tokens, -1, -1) for side in (64, 8)},
        self_attention={(32, 32): random(steps, 1, 1024).expand(-1, 1024, -1)},
        layers={(64, 64): 5, (8, 8): 1},
        decoded=dict.fromkeys(("denoised", "cond", "uncond"), pictures),
    )
    page = explain_page.page([large])
    assert 1_000_000 < len(page.encode()) < 5_000_000
    (one,) = told(page)
    assert one["steps"][0] == 0 and one["steps"][-1] == steps - 1
    assert one["cross"][0]["shape"][2:] < [32, 32]


def test_a_page_that_stays_too_large_is_refused(explained, monkeypatch):
    monkeypatch.setattr(explain_page, "LARGEST_PAGE", 50_000)
    with pytest.raises(UserError, match="larger than 5 MB"):
        explain_page.page([explained])


def test_shrunk_self_attention_still_adds_up_to_one(explained):
    stored = explain_page.shrunk_self(explained, [0, 3], 4)
    assert stored["shape"] == [2, 16, 4, 4]
    maps = explained.self_attention[8, 8][3].view(4, 2, 4, 2, 4, 2, 4, 2)  # readers, then what is read
    np.testing.assert_allclose(
        values(stored)[1], maps.sum((5, 7)).mean((1, 3)).view(16, 4, 4), atol=float(maps.max()) * 4 / 255
    )
    np.testing.assert_allclose(values(stored).sum((2, 3)), 1, atol=0.02)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two drawings beside each other, as the command writes them."""
    out = tmp_path_factory.mktemp("page") / "explain.html"
    arguments = [PROMPT, "--seed", "7", "--steps", "4", "--beside", "steps=2, guidance=1", "--out", str(out)]
    assert main(["explain", *arguments, "--device", "cpu", "--dtype", "float32"]) == 0
    return out


def test_the_command_writes_the_page(written, explained, tmp_path):
    """Of the packed model; with --plain, of the plain one."""
    first, second = told(written.read_text("utf-8"))
    packed = faster(plainsd.load(device="cpu", dtype="float32"))
    assert first == told(explain_page.page([plainsd.explain(packed, PROMPT, seed=7, steps=4)]))[0]
    arguments = [PROMPT, "--seed", "7", "--steps", "4", "--device", "cpu", "--dtype", "float32", "--plain"]
    assert main(["explain", *arguments, "--out", str(tmp_path / "plain.html")]) == 0
    (plain,) = told((tmp_path / "plain.html").read_text("utf-8"))
    assert plain == told(explain_page.page([explained]))[0]
    assert second["settings"] == "seed 7, 2 steps of dpmpp_2m (trailing spacing), guidance 1, 128x128"
    assert second["difference"] is None and len(second["timesteps"]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "x.png"], "the page is an HTML file; name it x.html"),
        (["--beside", "stepz=3"], "unknown setting 'stepz'; did you mean 'steps'?"),
        (["--beside", "steps=many"], "--beside: steps 'many' is not a whole number"),
        (["--steps", "0"], "steps"),
    ],
)
def test_wrong_requests_are_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["explain", PROMPT, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("plainsd: ") == 1 and not list(tmp_path.iterdir())


def test_words_are_whole_characters(embedded):
    """Bytes of one character are spread over tokens, which one by one say nothing."""
    for text in ("🍎", "größe", "кот", "猫", "🫠"):
        for model in (embedded, tiny_clip()):
            tokens, words = read_prompt(model, f"a {text}", 4)
            assert words == ["a", text] and {token.word for token in tokens} == {None, 0, 1}
    seen = plainsd.explain(embedded, "a 🍎", steps=1, decoded=False)
    assert seen.heat("🍎").shape == (8, 8)


def tiny_clip():
    """Any model whose tokenizer is CLIP's."""
    sd = tiny_sd()
    sd.tokenizers = [Tokenizer.from_vocabulary(find_vocabulary())]
    return sd


def test_the_latents_of_models_of_another_spread_are_shown_as_the_network_sees_them():
    """EDM models divide by sqrt(sigma_data^2 + sigma^2)."""
    sd, shown = tiny_sd(TINY_PLAYGROUND), []
    handle = sd.unet.register_forward_pre_hook(lambda module, args: shown.append(args[0][:1].clone()))
    seen = plainsd.explain(sd, "a", steps=4, size=32, decoded=False)
    handle.remove()
    assert seen.spread == 0.5 and len(shown) == 4
    torch.testing.assert_close(explain_page.on_unit_scale(seen), torch.cat(shown), atol=1e-4, rtol=1e-4)


def test_maps_of_layers_are_added_up_and_not_kept(monkeypatch):
    """Of SDXL at 1024 pixels those of one step would be 250 MB."""
    sd, kept = tiny_sd(TINY_XL), []
    take = watching.Watcher.take
    monkeypatch.setattr(watching.Watcher, "take", lambda watch: kept.append(take(watch)) or kept[-1])
    seen = plainsd.explain(sd, "a", steps=2, size=64, decoded=False)
    for one in kept:
        assert {size: maps.ndim for size, maps in one.self.items()} == dict.fromkeys(one.self, 2)
        assert {size: maps.ndim for size, maps in one.cross.items()} == dict.fromkeys(one.cross, 3)
    assert max(seen.layers.values()) > 1
    for maps, axis in ((seen.self_attention, 2), (seen.cross_attention, 1)):
        assert all((each.sum(axis) - 1).abs().max() < 1e-4 for each in maps.values())


def test_beside_is_a_prompt_or_settings():
    assert read_beside("negative=blurry, ugly") == {"negative": "blurry, ugly"}
    assert read_beside("negative=blurry, ugly,steps=3") == {"negative": "blurry, ugly", "steps": 3}
    for wrong in ("steps=10,", "steps=10, red"):
        with pytest.raises(UserError, match="is not NAME=VALUE, as what precedes it is"):
            read_beside(wrong)
    assert read_beside("a green apple, shiny") == {"prompt": "a green apple, shiny"}
    assert read_beside("guidance=1, sampler=euler") == {"guidance": 1.0, "sampler": "euler"}


@needed
def test_the_page_works_by_keyboard_at_three_widths(chromium, written):  # noqa: F811
    from selenium.webdriver import ActionChains, Keys

    chromium.get(written.as_uri())
    until(lambda: chromium.execute_script("return document.documentElement.dataset.ready === 'yes'"), 60)

    def js(code):
        return chromium.execute_script(f"return {code}")

    try:
        for width in (390, 820, 1400):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            assert js("document.documentElement.scrollWidth <= innerWidth")
        for scheme, ground in (("light", "rgb(246, 245, 242)"), ("dark", "rgb(20, 19, 24)")):
            chosen = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", chosen)
            assert js("getComputedStyle(document.body).backgroundColor") == ground
    finally:
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert js("document.getElementById('at').textContent").startswith("4 of 4 (")
    before = js("document.querySelector('img[data-of=denoised]').src")
    chromium.find_element("id", "step").send_keys(Keys.ARROW_LEFT)
    assert js("document.getElementById('at').textContent").startswith("3 of 4 (")
    assert js("document.querySelector('img[data-of=denoised]').src") != before
    words = chromium.find_elements("css selector", ".words button")
    words[2].click()
    ActionChains(chromium).send_keys(Keys.TAB).perform()
    chosen = "[...document.querySelectorAll('.words [aria-pressed=true]')]"
    pressed = f"{chosen}.map((button) => button.lastChild.previousSibling.data)"
    assert js(pressed) == ["apple", "apple"]  # in both drawings
    place = chromium.find_element("css selector", "canvas.places")
    place.send_keys(Keys.ARROW_RIGHT)
    assert js("document.querySelector('.where').textContent").startswith("column 6 of 8, row 5 of 8")
    messages = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert written.as_uri() in urls  # and nothing but what is inside it, and the browser's own first page
    assert all(url == written.as_uri() or url.startswith(("data:", "chrome")) for url in urls)
    assert [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_screenshots_are_shown_and_small():
    shown = (explain_shots.DOCS / "explain.md").read_text("utf-8")
    for step in explain_shots.SHOWN:
        path = explain_shots.DOCS / f"explain-step-{step}.png"
        assert f"({path.name})" in shown and path.stat().st_size < explain_shots.LARGEST


@pytest.mark.full
@needed
def test_the_script_takes_the_screenshots_again(tmp_path):
    first, *others = explain_shots.shots(tmp_path)
    others, large = others[:2], others[2:]
    assert [path.stem for path in large] == list(explain_shots.WHOLE)
    sizes = {Image.open(path).size for path in (first, *others)}
    assert sizes == {Image.open(explain_shots.DOCS / first.name).size}
    assert len({path.read_bytes() for path in (first, *others)}) == len(explain_shots.SHOWN)


def test_every_setting_of_the_command_line_arrives(model, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("plainsd.reports.explain.explain", lambda sd, **choices: asked.append(choices))
    monkeypatch.setattr(explain_page, "page", lambda seen: "")
    settings = ["--negative", "blurry, dark", "--size", "96", "64", "--steps", "3", "--guidance", "2.5"]
    settings += ["--sampler", "euler", "--spacing", "karras", "--seed", "9", "--beside", "a pear"]
    arguments = [PROMPT, *settings, "--model", model, "--device", "cpu", "--dtype", "float32", "--plain"]
    assert main(["explain", *arguments, "--out", str(tmp_path / "x.html")]) == 0
    given = dict(negative="blurry, dark", size=(96, 64), steps=3, guidance=2.5, sampler="euler", spacing="karras")
    for prompt, choices in zip((PROMPT, "a pear"), asked, strict=True):
        assert choices.pop("show") and choices == {"prompt": prompt, "seed": 9, **given}
