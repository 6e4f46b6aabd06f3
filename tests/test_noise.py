"""The noise: published vectors of Philox, numbers from A1111's own code, the tree of torchsde, ComfyUI's order."""

import math
import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchsde
from small_models import tiny_sd

from plainsd.cli import main
from plainsd.diffusion.noise import BrownianTree, Philox, philox, slerp_columns, stream
from plainsd.diffusion.samplers import SAMPLERS
from plainsd.diffusion.solvers.two_calls import halfway_in_float32
from plainsd.errors import UserError
from plainsd.generate import batch, final, text_to_image
from plainsd.pictures.images import read_settings
from plainsd.pictures.noise import NoiseOfEach
from plainsd.pictures.settings import LIKE, Resolved, Settings, noise_of, notes
from plainsd.pictures.texts.a1111 import format_settings, parse_settings

CPU = torch.device("cpu")
SHAPE = (4, 8, 8)
SIGMAS = [14.6146, 9.7, 5.1, 2.2, 0.8, 0.1, 0.0]


@pytest.fixture(scope="module")
def sd():
    return tiny_sd()


def settings(**more) -> Resolved:
    return Resolved(**{"size": (64, 64), "steps": 3, "guidance": 7.0, "sampler": "euler_a", "spacing": "karras"} | more)


def noise(*each: Resolved) -> NoiseOfEach:
    return NoiseOfEach(each, CPU, 8)


def near(tensor, *expected):
    return tensor.flatten().tolist() == pytest.approx(expected, abs=1e-6)


# --- NVIDIA's numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, expected):
    """The known answers that Salmon et al. publish with Random123 for philox4x32, ten rounds."""
    words = tuple(np.array([int(word, 16)], dtype=np.uint64) for word in counter.split())
    low, high = (int(word, 16) for word in key.split())
    assert [f"{int(word[0]):08x}" for word in philox(words, (low, high))] == expected.split()


def test_nv_is_what_a_gpu_draws():
    """Of seed 0 what `torch.randn(3, 4, device="cuda")` gives; the rest from A1111's code."""
    first = (-0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564, -0.62285122, -0.32838709)
    assert near(Philox(0)((3, 4)), *first, -1.07454231, -0.36314407, -1.67105067, 2.26550497)
    assert torch.equal(Philox(0)((3, 4)).flatten(), Philox(0)((2, 2, 3)).flatten())
    next = Philox(0)
    assert not torch.equal(next((5,)), next((5,)))
    assert not torch.equal(Philox(7)((5,)), Philox(2**32 + 7)((5,)))  # all 64 bits count
    drawn = Philox(2**40 + 3)((4, 128, 128))
    assert drawn.isfinite().all() and abs(drawn.mean()) < 0.02 and abs(drawn.std() - 1) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, 7, 2**63 + 5])
def test_nv_is_what_this_gpu_draws(seed):
    generator, ours = torch.Generator("cuda").manual_seed(seed), Philox(seed)
    for _ in range(3):
        theirs = torch.randn(4, 64, 64, device="cuda", generator=generator).cpu()
        assert (ours((4, 64, 64)) - theirs).abs().max() < 1e-5


# --- A1111 -----------------------------------------------------------------------------------------------------------

A1111 = {  # source -> from its modules/rng.py: seed 7, variation seed 5 by 0.3, ENSD 31337, latents of 8x8
    "nv": ((-0.125151128, 1.862275481, 0.100259915, -1.262873530, 0.346519321, -0.559593916),
           (0.240830854, -0.342510015, -0.195688218, 1.121826768, -0.947606385, -0.531531334)),
    "cpu": ((0.547862530, 0.537969947, 0.019976258, -0.597879469, -0.400784791, 0.156476796),
            (-1.782649636, 1.250456929, 0.553538024)),
}  # fmt: skip


@pytest.mark.parametrize("source", A1111)
def test_a1111s_noise_by_its_seeds(source):
    first, on_the_way = A1111[source]
    drawn = noise(settings(seed=7, variation_seed=5, variation_strength=0.3, ensd=31337, like="a1111", noise=source))
    begin = drawn.first(SHAPE)[0]
    assert near(torch.cat([begin[0, 0, :3], begin[3, 7, 5:]]), *first)
    later = drawn(SHAPE)[0]
    assert near(torch.cat([later[0, 0, :3], later[3, 7, 5:]])[: len(on_the_way)], *on_the_way)
    again = drawn.anew(drawn.each).first(SHAPE)[0]  # of the second pass
    assert torch.equal(again, begin)


@pytest.mark.parametrize("like", [None, "diffusers"])
def test_without_ensd_noise_goes_on(like):
    for source in ("cpu", "nv"):
        drawn, expected = noise(settings(seed=7, noise=source, like=like)), stream(source, 7)
        assert torch.equal(drawn.first(SHAPE)[0], expected(SHAPE)) and torch.equal(drawn(SHAPE)[0], expected(SHAPE))
        assert torch.equal(
            drawn.anew(drawn.each).first(SHAPE)[0], expected(SHAPE)
        )  # in diffusers' way a second pass too


def test_slerp_of_columns():
    """By hand: of two right angles the half way is (1, 1) / sqrt(2); what is nearly one is mixed by a line."""
    a, b = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[0.0, 2.0], [1.0, 0.0]]])
    assert torch.allclose(slerp_columns(a, b, 0.5), torch.tensor([[[0.5, 1.0], [0.5, 1.0]]]) * math.sqrt(2))
    assert torch.allclose(slerp_columns(a, b, 0.0), a, atol=1e-6) and torch.allclose(
        slerp_columns(a, b, 1.0), b, atol=1e-6
    )
    assert torch.allclose(slerp_columns(a, 1.1 * a, 0.25), 0.25 * a + 0.75 * 1.1 * a)
    assert slerp_columns(torch.randn(4, 1, 9), torch.randn(4, 1, 9), 0.3).isfinite().all()  # one row: all parallel


@pytest.mark.parametrize("resize, height, width", [((40, 88), 8, 9), ((88, 40), 8, 9), ((72, 72), 16, 16)])
def test_seed_resize_by_hand(resize, height, width):
    """As A1111 counts: half the spare side rounded down, also where it is less than nothing."""
    small, whole = stream("nv", 3)((4, resize[1] // 8, resize[0] // 8)), stream("nv", 3)((4, height, width))
    for y in range(height):
        for x in range(width):
            top, left = (height - small.shape[1]) // 2, (width - small.shape[2]) // 2
            rows, columns = (
                range(side + 2 * min(0, edge)) for side, edge in zip(small.shape[1:], (top, left), strict=True)
            )
            if y - max(0, top) in rows and x - max(0, left) in columns:
                whole[:, y, x] = small[:, y - top, x - left]
    drawn = noise(settings(seed=3, seed_resize=resize, like="a1111"))
    assert torch.equal(drawn.first((4, height, width))[0], whole)
    rest = stream("nv", 3)
    rest((4, height, width))
    assert torch.equal(drawn((4, height, width))[0], rest((4, height, width)))


def test_seed_resize_counts_in_latents_of_the_vae(sd):
    """Of 16 pixels here; the picture's own size changes nothing, even where it is padded to whole latents."""
    wide = tiny_sd(replace(sd.variant, vae=replace(sd.variant.vae, channels=(8, 8, 16, 16, 16))))
    choices = {"size": (64, 48), "steps": 1, "seed": 3, "sampler": "euler"}
    plain = final(text_to_image(wide, "x", **choices))[0]
    same = final(text_to_image(wide, "x", **choices, seed_resize=(64, 48)))[0]
    assert same.tobytes() == plain.tobytes()
    drawn = NoiseOfEach([settings(seed=3, seed_resize=(32, 48))], CPU, 16).first((4, 4, 4))[0]
    assert torch.equal(drawn[:, :3, 1:3], stream("cpu", 3)((4, 3, 2)))
    padded = settings(size=(40, 24), seed=3, seed_resize=(40, 24))
    assert torch.equal(NoiseOfEach([padded], CPU, 16).first((4, 2, 3))[0], stream("cpu", 3)((4, 2, 3)))
    with pytest.raises(UserError, match="seed resize 64x8 holds no latent of this model; both sides must be 16"):
        text_to_image(wide, "x", **choices, seed_resize=(64, 8))


# --- one path over the levels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("low, high, count", [(0.0292, 14.6146, 11), (0.1, 10.0, 6), (0.002, 700.0, 40)])
def test_the_tree_is_that_of_torchsde(low, high, count):
    """Bit for bit, and in any order of questions."""
    theirs = torchsde.BrownianTree(low, torch.zeros(2, 3), high, entropy=2**40 + 3)
    ours = BrownianTree(low, high, 2**40 + 3, lambda seed: stream("cpu", seed)((2, 3)))
    levels = torch.linspace(low, high, count, dtype=torch.float64).tolist()
    spans = [*pairwise(levels), (levels[1], levels[4]), (levels[0], levels[-1]), (levels[2], levels[-1])]
    for i in torch.randperm(len(spans), generator=torch.Generator().manual_seed(1)).tolist():
        assert torch.equal(ours.increment(*spans[i]), theirs(*spans[i]))


def test_the_path_is_unit_noise_and_adds_up():
    tree = BrownianTree(0.03, 14.6, 5, lambda seed: stream("nv", seed)((40000,)))
    whole, first, rest = tree.step(9.0, 2.0), tree.step(9.0, 5.0), tree.step(5.0, 2.0)
    assert abs(whole.std() - 1) < 0.02 and abs(first.std() - 1) < 0.02
    assert abs((first * rest).mean()) < 0.02
    assert torch.allclose(whole, math.sqrt(4 / 7) * first + math.sqrt(3 / 7) * rest, atol=1e-5)


def test_a1111s_paths_by_their_seeds():
    """A tree for each picture, from the noise that is chosen; numbers from k-diffusion with A1111's own draws."""
    expected = {
        "nv": (-0.467307985, -0.975817978, 0.219571248, 0.025490936, 1.119745970, -0.253215253),
        "cpu": (-0.140426889, 0.301415890, 1.221744537, -0.226362526, -0.126580864, 1.183182597),
    }
    for source, numbers in expected.items():
        drawn = noise(*(settings(seed=seed, like="a1111", noise=source) for seed in (7, 2**40 + 9)))
        path = drawn.path(SHAPE, SIGMAS, SIGMAS[2:])
        first, later = path(SIGMAS[0], SIGMAS[1]), path(SIGMAS[3], SIGMAS[4])
        assert near(torch.cat([first[0, 0, 0, :3], later[1, 3, 7, 5:]]), *numbers)


def test_the_path_is_over_the_levels_of_either_program():
    """A1111's over the whole schedule, ComfyUI's over what is visited; diffusers gives each step noise of its own."""
    assert all(noise(settings(seed=7, like=like)).path(SHAPE, SIGMAS, SIGMAS) is None for like in (None, "diffusers"))
    visited = SIGMAS[2:]
    for like, high in (("a1111", SIGMAS[0]), ("comfyui", visited[0])):
        one = settings(seed=7, like=like if like == "a1111" else None, noise="cpu" if like == "a1111" else like)
        tree = BrownianTree(0.1, high, 7, lambda seed: stream("cpu", seed)(SHAPE))
        assert torch.equal(noise(one).path(SHAPE, SIGMAS, visited)(5.1, 2.2)[0], tree.step(5.1, 2.2))


def k_diffusion_sde(name, denoise, x, sigmas, path):
    """The published updates, with W of the whole step and of its first half."""
    old = h_last = None
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            return denoised
        h = math.log(sigma / sigma_next)
        if name == "dpmpp_2m_sde":
            x = sigma_next / sigma * math.exp(-h) * x - math.expm1(-2 * h) * denoised
            if old is not None:
                x = x - 0.5 * math.expm1(-2 * h) * (h / h_last) * (denoised - old)
            x = x + path(sigma, sigma_next) * sigma_next * math.sqrt(-math.expm1(-2 * h))
        else:
            middle = halfway_in_float32(sigma, sigma_next)
            up = math.sqrt(middle**2 * (sigma**2 - middle**2) / sigma**2)
            down = math.sqrt(middle**2 - up**2)
            half = denoise(down / sigma * x + (1 - down / sigma) * denoised + path(sigma, middle) * up, middle)
            up = math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)
            down = math.sqrt(sigma_next**2 - up**2)
            x = down / sigma * x + (1 - down / sigma) * half + path(sigma, sigma_next) * up
        old, h_last = denoised, h
    return x


@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde"])
def test_sde_samplers_walk_along_the_path(name):
    sigmas = [float(sigma) for sigma in torch.tensor(SIGMAS)]  # as k-diffusion has them, in float32
    each = [settings(seed=seed, like="a1111") for seed in (7, 9)]
    path = noise(*each).path(SHAPE, sigmas, sigmas)
    x = noise(*each).first(SHAPE).double() * sigmas[0]
    denoise = lambda x, sigma: x / (1 + sigma**2) + 0.1 * torch.tanh(x)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = [torchsde.BrownianTree(sigmas[-2], torch.zeros(SHAPE), sigmas[0], entropy=one.seed) for one in each]
    cpu = noise(*(settings(seed=one.seed, like="a1111", noise="cpu") for one in each)).path(SHAPE, sigmas, sigmas)
    assert torch.equal(cpu(5.0, 2.0)[1], -tree[1](2.0, 5.0) / math.sqrt(3))
    *_, step = SAMPLERS[name].run(denoise, x, sigmas, None, path=path)
    assert torch.allclose(step.x, k_diffusion_sde(name, denoise, x, sigmas, path), atol=2e-5)


def test_halfway_in_float32():
    assert halfway_in_float32(9.0, 4.0) == pytest.approx(6.0, rel=1e-6)


# --- ComfyUI ---------------------------------------------------------------------------------------------------------


def test_comfyui_draws_for_the_whole_batch():
    """One draw of the seed for all first latents, of the seed + 1 for what comes on the way, one tree for all."""
    first = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(7))
    ahead = torch.Generator().manual_seed(8)
    steps = [torch.randn(3, *SHAPE, generator=ahead) for _ in range(2)]
    tree = BrownianTree(0.1, SIGMAS[0], 7, lambda seed: stream("cpu", seed)((3, *SHAPE)))
    for places in ((0, 1, 2), (1,), (2, 0)):  # all at once, one alone, in another order
        drawn = noise(*(settings(seed=7, noise="comfyui", batch_index=i, batch_size=3) for i in places))
        rows = list(places)
        assert torch.equal(drawn.first(SHAPE), first[rows])
        assert all(torch.equal(drawn(SHAPE), step[rows]) for step in steps)
        assert torch.equal(drawn.path(SHAPE, SIGMAS, SIGMAS)(5.1, 2.2), tree.step(5.1, 2.2)[rows])
        assert torch.equal(drawn.anew(drawn.each).first(SHAPE), first[rows])
        assert not drawn.encoder(SHAPE).any()
    assert near(tree.step(SIGMAS[3], SIGMAS[4])[2, 3, 7, 5:], 1.086348057, 0.493725121, -0.772091746)


# --- pictures --------------------------------------------------------------------------------------------------------

ALIKE = [{"noise": "cpu"}, {"noise": "nv"}, {"noise": "nv", "ensd": 31337},
         {"like": "a1111", "sampler": "dpmpp_2m_sde"},
         {"noise": "comfyui"}, {"noise": "comfyui", "sampler": "dpmpp_sde"},
         {"like": "a1111", "variation_seed": 5, "variation_strength": 0.3, "hires": 2.0}]  # fmt: skip


@pytest.mark.parametrize("choices", ALIKE, ids=str)
def test_a_picture_is_the_same_alone_and_in_a_batch(sd, choices):
    choices = {"size": 32, "steps": 2, "sampler": "euler_a", "seed": 7, "count": 3} | choices
    *_, together = text_to_image(sd, "a red apple", **choices)
    assert len({image.tobytes() for image in together.images}) == 3
    for i in (0, 2):
        one = together.settings[i]
        *_, alone = batch(sd, [one])
        assert torch.allclose(alone.latents[0], together.latents[i], rtol=1e-4, atol=1e-3)
        again = replace(parse_settings(format_settings(one)), like=one.like)
        assert again == one  # all of it is in the picture's text
        (made,) = text_to_image(sd, again.prompt, **{
            name: value for name, value in vars(again).items() if name not in ("prompt", "model")
        }).settings  # fmt: skip
        assert made == one


def test_each_noise_makes_another_picture(sd):
    choices = {"size": 32, "steps": 2, "sampler": "euler_a", "seed": 7}
    kinds = (
        {},
        {"noise": "nv"},
        {"noise": "nv", "ensd": 31337},
        {"noise": "comfyui"},
        {"noise": "nv", "seed_resize": (64, 64)},
    )
    made = [final(text_to_image(sd, "an apple", **choices | kind))[0].tobytes() for kind in kinds]
    assert len(set(made)) == len(kinds)
    assert made[0] == final(text_to_image(sd, "an apple", **choices, noise="cpu"))[0].tobytes()


def test_what_a_program_takes_where_nothing_is_said(sd):
    assert [noise_of(Settings(like=like)) for like in (None, *LIKE)] == ["cpu", "cpu", "nv", "comfyui"]
    assert noise_of(Settings(like="a1111", noise="cpu")) == "cpu"
    assert text_to_image(sd, "x", like="a1111").settings[0].noise == "nv"
    (first, second) = text_to_image(sd, "x", noise="comfyui", seed=5, count=2).settings
    assert [first.seed, first.batch_index, first.batch_size] == [5, 0, 2]
    assert [second.seed, second.batch_index, second.batch_size] == [5, 1, 2]


def test_texts_name_the_noise():
    for text, kind in (("CPU", "cpu"), ("NV", "nv"), ("GPU", "nv")):
        read = parse_settings(f"x\nSteps: 4, Sampler: Euler a, CFG scale: 7, RNG: {text}, ENSD: 31337")
        assert (read.noise, read.ensd) == (kind, 31337)
    assert "RNG: NV, ENSD: 31337" in format_settings(Settings(noise="nv", ensd=31337))
    assert "low 32 bits" in notes(Settings(seed=2**40))[0] and notes(Settings(seed=2**40, noise="nv")) == []


@pytest.mark.parametrize(
    "choices, says",
    [
        ({"noise": "gpu"}, "unknown noise 'gpu'"),
        ({"ensd": -1}, "ensd -1 is out of range"),
        ({"seed_resize": (4, 64)}, "seed resize 4 is out of range"),
        ({"noise": "comfyui", "batch_index": 4, "batch_size": 4}, "batch index 4 is not in a batch of 4; the first"),
        ({"noise": "comfyui", "batch_index": 4096}, "batch index 4096 is out of range"),
    ],
)
def test_wrong_requests_are_named(sd, choices, says):
    with pytest.raises(UserError, match=says):
        text_to_image(sd, "x", **choices)


def test_the_flags(tmp_path):
    """ComfyUI's batch is that of the whole command, however many pictures are drawn at once."""
    flags = ["--steps", "1", "--device", "cpu", "--dtype", "float32", "--seed", "5", "--noise", "comfyui"]
    main(["generate", "x", *flags, "--count", "3", "--batch", "2", "--out", str(tmp_path / "out")])
    read = [read_settings(file) for file in sorted((tmp_path / "out").glob("*.png"))]
    assert [(one.seed, one.batch_index, one.batch_size, one.noise) for one in read] == [
        (5, i, 3, "comfyui") for i in range(3)
    ]
    main(
        [
            "generate",
            "x",
            *flags,
            "--noise",
            "nv",
            "--ensd",
            "9",
            "--seed-resize",
            "64",
            "32",
            "--out",
            str(tmp_path / "a.png"),
        ]
    )
    one = read_settings(tmp_path / "a.png")
    assert (one.noise, one.ensd, one.seed_resize, one.batch_size) == ("nv", 9, (64, 32), None)
