"""What is faster gives the same pictures but for rounding."""

import copy
import json
import math
import pickle
from dataclasses import replace

import pytest
import torch
from conftest import TINY_XL, difference, tiny_sd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plainsd.adapters.kinds import Difference
from plainsd.adapters.layers import LowRank, attach
from plainsd.adapters.lora import add_lora, inject, save_lora
from plainsd.diffusion.samplers import SAMPLERS
from plainsd.errors import UserError
from plainsd.generate import final, text_to_image
from plainsd.models.forms import OtherForm
from plainsd.models.layers import Upsample
from plainsd.models.unet import FeedForward
from plainsd.pictures.noise import NoiseOfEach
from plainsd.pictures.sampling import decode, moments_of
from plainsd.speed import model
from plainsd.speed.packed import (
    PACKED,
    PackedConv,
    PackedCrossAttention,
    PackedFeedForward,
    PackedLinear,
    PackedUpsample,
)

PROMPT = {"prompt": "a red apple", "steps": 3, "seed": 7, "guidance": 4.0, "size": 64}


def latents(sd, **more):
    *_, last = text_to_image(sd, **PROMPT | more)
    return last.latents


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def needs_onednn_in(dtype):
    if not model.can_pack(dtype):
        pytest.skip(f"oneDNN has no {dtype} on this processor")


def assert_as_exact(fast, make, within=2, **more):
    """The fast model's latents are as far from float64's as sums in float32 make them, within a factor. `more`: of the
    task."""
    exact = latents(make().to(dtype=torch.float64), **more)
    allowed = within * relative(latents(with_errors_of_float32(make().to(dtype=torch.float64)), **more), exact)
    assert allowed < 1e-4 and relative(latents(fast, **more).double(), exact) < allowed


def with_errors_of_float32(sd):
    """The model with the errors that float32's sums have, in whatever order and on whatever processor: what comes out
    of each Linear and Conv2d is off by u sqrt(k), k the length of its sums, relative to the size of its numbers."""
    generator = torch.Generator().manual_seed(0)

    def off(layer, _, out):
        size = 2**-24 * layer.weight[0].numel() ** 0.5 * out.square().mean().sqrt()
        return out + size * torch.randn(out.shape, generator=generator, dtype=out.dtype)

    for network in model.networks_of(sd):
        for module in network.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                module.register_forward_hook(off)
    return sd


@pytest.mark.parametrize("variant", [{}, {"variant": TINY_XL}], ids=["sd1", "sdxl"])
def test_a_faster_model_draws_the_same(variant):
    plain, fast = tiny_sd(**variant), model.faster(tiny_sd(**variant))
    kinds = {type(module) for network in model.networks_of(fast) for module in network.modules()}
    assert {PackedLinear, PackedConv, PackedFeedForward, PackedUpsample, *PACKED.values()} <= kinds
    assert not kinds & {torch.nn.Linear, torch.nn.Conv2d, FeedForward, Upsample}
    assert_as_exact(fast, lambda: tiny_sd(**variant))
    assert difference(final(text_to_image(fast, **PROMPT))[0], final(text_to_image(plain, **PROMPT))[0]) <= 1


@pytest.mark.parametrize("banded", [False, True])
def test_the_maps_of_a_plain_vae_lie_channels_last(banded):
    """So diffusers has them; its weights stay as they are in the file."""
    sd, seen = tiny_sd(), []
    for conv in (sd.vae.encoder.levels[0].res[0].conv1, sd.vae.decoder.levels[0].res[0].conv1):
        conv.register_forward_pre_hook(lambda conv, args: seen.append(args[0]))
    sd.saving = replace(sd.saving, bands=banded)
    latents = moments_of(sd, torch.rand(1, 3, 64, 64) * 2 - 1)[0]
    decode(sd, latents)
    assert len(seen) >= 2 and all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    assert all(p.is_contiguous() for p in sd.vae.parameters())


def test_faster_in_bfloat16_is_no_less_exact():
    """The distance from float32 is that of the plain network in bfloat16, within a fifth."""
    exact = latents(tiny_sd())
    plain, fast = (
        relative(latents(sd), exact)
        for sd in (tiny_sd().to(dtype=torch.bfloat16), model.faster(tiny_sd().to(dtype=torch.bfloat16)))
    )
    assert 1e-4 < plain and fast < 1.2 * plain


# ---- packed layers give back what they were made from


def weights_of(sd):
    return [
        {name: (tensor.dtype, tensor) for name, tensor in network.state_dict().items()}
        for network in model.networks_of(sd)
    ]


def assert_equal_weights(found, expected):
    for ours, theirs in zip(weights_of(found), weights_of(expected), strict=True):
        assert ours.keys() == theirs.keys()
        for name, (dtype, tensor) in theirs.items():
            assert ours[name][0] == dtype and torch.equal(ours[name][1], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", [{}, {"variant": TINY_XL}], ids=["sd1", "sdxl"])
def test_a_packed_model_is_unpacked_exactly(variant, dtype):
    """After it has drawn at two sizes; and what is drawn then has the same bits as before packing."""
    needs_onednn_in(dtype)
    plain, packed = (tiny_sd(**variant).to(dtype=dtype) for _ in range(2))
    model.faster(packed)
    for size in (64, 48):
        final(text_to_image(packed, **PROMPT | {"size": size, "tiling": size == 48}))
    assert_equal_weights(packed, plain)
    model.plain_again(packed)
    kinds = {type(module) for network in model.networks_of(packed) for module in network.modules()}
    assert kinds == {type(module) for network in model.networks_of(plain) for module in network.modules()}
    assert_equal_weights(packed, plain)
    plain.unet.to(memory_format=torch.channels_last)
    assert torch.equal(latents(packed), latents(plain))
    assert not any(isinstance(module, OtherForm) for module in packed.unet.modules())


@pytest.mark.parametrize("change", [copy.deepcopy, lambda sd: pickle.loads(pickle.dumps(sd))], ids=["copy", "pickle"])
def test_a_packed_model_is_copied(change):
    packed = model.faster(tiny_sd())
    twin = change(packed)
    assert_equal_weights(twin, packed)
    assert torch.equal(latents(twin), latents(packed))


def test_a_packed_model_changes_its_precision():
    """As the VAE does that overflows."""
    needs_onednn_in(torch.bfloat16)
    packed, plain = model.faster(tiny_sd().to(dtype=torch.bfloat16)), tiny_sd().to(dtype=torch.bfloat16)
    for sd in (packed, plain):
        sd.to(dtype=torch.float32)
    assert_equal_weights(packed, plain)
    assert relative(latents(packed), latents(plain)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_packed_model_is_plain_where_it_cannot_be_packed(dtype):
    packed, plain = model.faster(tiny_sd()), tiny_sd()
    for sd in (packed, plain):
        sd.to(dtype=dtype)
    assert_equal_weights(packed, plain)
    assert not any(isinstance(one, OtherForm) for network in model.networks_of(packed) for one in network.modules())
    if dtype == torch.float64:
        assert relative(latents(packed), latents(plain)) < 1e-12


def test_a_packed_model_goes_to_another_device():
    packed = model.faster(tiny_sd()).to("meta")
    assert {one.device.type for network in model.networks_of(packed) for one in network.parameters()} == {"meta"}
    net = model.faster(tiny_sd()).unet
    with pytest.raises(RuntimeError, match=r"weights in torch.float32 on meta cannot be packed; call .*plain_again"):
        net.to("meta")


@pytest.mark.parametrize("change", [lambda sd: sd, copy.deepcopy, lambda sd: sd.to(dtype=torch.float32)])
def test_plain_again_trains_what_was_trained(change):
    """A packed model is for drawing; what was frozen before must not learn afterwards."""
    sd = tiny_sd()
    for number, weight in enumerate(sd.unet.parameters()):
        weight.requires_grad_(number % 3 == 0)
    expected = [weight.requires_grad for weight in sd.unet.parameters()]
    with torch.inference_mode():
        model.faster(sd)
    again = change(sd)
    model.plain_again(again)
    assert [weight.requires_grad for weight in again.unet.parameters()] == expected


def test_a_packed_model_has_no_gradients():
    sd = model.faster(tiny_sd())
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradients; call plainsd.speed.plain_again first"):
        sd.unet(x, torch.tensor(1.0), torch.zeros(1, 77, sd.unet.config.context))
    wide = torch.randn(1, 600, requires_grad=True)  # of a weight that oneDNN has, not our kernel
    layers = ((torch.nn.Conv2d(4, 4, 3), x), (torch.nn.Linear(8, 5), x), (torch.nn.Linear(600, 512), wide))
    for plain, given in layers:
        layer = PackedConv(plain) if isinstance(plain, torch.nn.Conv2d) else PackedLinear(plain)
        with pytest.raises(RuntimeError, match="no gradients"):
            layer(given)
        with torch.no_grad():
            assert layer(given).isfinite().all()


def test_layers_with_hooks_stay_plain():
    sd, seen = tiny_sd(), []
    wanted = sd.unet.mid.attn.blocks[0].self_attn.q
    wanted.register_forward_hook(lambda *_: seen.append(True))
    model.faster(sd)
    assert sd.unet.mid.attn.blocks[0].self_attn.q is wanted
    assert isinstance(sd.unet.mid.attn.blocks[0].self_attn.k, OtherForm)
    fast = latents(sd)
    assert len(seen) == 3 and relative(fast, latents(tiny_sd())) < 1e-4


def test_a_lora_that_cannot_be_read_leaves_a_model_packed(tmp_path):
    import plainsd

    needs_onednn_in(torch.bfloat16)
    packed = model.faster(tiny_sd().to(dtype=torch.bfloat16))
    for strength, file in ((1.0, tmp_path / "none.safetensors"), (math.nan, tmp_path)):
        with pytest.raises(UserError):
            plainsd.add_lora(packed, file, strength)
    assert any(isinstance(module, OtherForm) for module in packed.unet.modules())


def test_a_packed_model_is_saved_as_the_plain_one(tmp_path):
    import plainsd

    for name, sd in (("plain", tiny_sd()), ("packed", model.faster(tiny_sd()))):
        plainsd.save(sd, tmp_path / name)
    for path in (tmp_path / "plain").rglob("*.*"):
        other = tmp_path / "packed" / path.relative_to(tmp_path / "plain")
        if path.name == "preview.json":  # fitted to what the decoder draws, which differs by rounding
            fits = [json.loads(file.read_text())["latent_rgb"] for file in (path, other)]
            for part in ("matrix", "bias"):
                assert torch.allclose(*(torch.tensor(fit[part]) for fit in fits), atol=1e-4)
        else:
            assert path.read_bytes() == other.read_bytes(), path


@pytest.mark.parametrize("strict", [True, False])
def test_weights_are_not_loaded_into_a_packed_model(strict):
    """Without strict, its biases alone would be replaced."""
    packed, other = model.faster(tiny_sd()), tiny_sd(seed=1)
    before = latents(packed)
    with pytest.raises(RuntimeError, match="plain_again"):
        packed.unet.load_state_dict(other.unet.state_dict(), strict=strict)
    assert torch.equal(latents(packed), before)
    model.plain_again(packed)
    packed.unet.load_state_dict(other.unet.state_dict())
    assert not torch.equal(latents(packed), before)


def test_the_refiner_is_made_faster_too():
    sd = tiny_sd()
    sd.refiner = tiny_sd(seed=1)
    model.faster(sd)
    assert isinstance(sd.refiner.unet.conv_in, PackedConv)


@pytest.mark.parametrize(
    "place",
    [
        "mid.attn.blocks.0.self_attn.q",
        "mid.attn.blocks.0.cross_attn.v",
        "mid.attn.blocks.0.ff.up",
        "mid.res1.conv1",
        "mid.res1.norm1",
        "mid.res1.emb",
        "up.1.resample.conv",
    ],
)
def test_layers_with_a_lora_stay_and_keep_it(place):
    def adapted():
        sd, generator = tiny_sd(), torch.Generator().manual_seed(0)
        layer = sd.unet.get_submodule(place)
        if layer.weight.ndim == 1:
            shape = layer.weight.shape
            attach(layer, "one", Difference({"diff": torch.randn(shape, generator=generator)}, 1.0, shape))
        else:
            (o, i), sides = layer.weight.shape[:2], layer.weight.shape[2:]
            down, up = torch.randn(2, i, *sides, generator=generator), torch.randn(o, 2, generator=generator) / 2
            attach(layer, "one", LowRank(down, up[(...,) + (None,) * len(sides)], 2.0))
        return sd

    assert_as_exact(model.faster(adapted()), adapted)
    assert relative(latents(adapted()), latents(tiny_sd())) > 1e-3


def test_a_lora_is_added_to_a_packed_model(tmp_path):
    """Whose layers are then plain again; packed anew it draws as one that had it before."""
    sd = tiny_sd()
    lora = inject(sd.unet, rank=2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight in lora.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) / 4)
    save_lora(sd, tmp_path / "one.safetensors")

    def adapted(sd):
        add_lora(sd, tmp_path / "one.safetensors", 0.7)
        return sd

    with pytest.warns(UserWarning, match="call faster again after them"):
        late = adapted(model.faster(tiny_sd()))
    assert_equal_weights(late, adapted(tiny_sd()))
    assert torch.equal(latents(model.faster(late)), latents(model.faster(adapted(tiny_sd()))))
    assert relative(latents(late), latents(tiny_sd())) > 1e-3


@pytest.mark.parametrize(
    "choices",
    [
        {"prompt": "a [red apple:blue bird:0.5]"},
        {"prompt": "a [red|blue] apple"},
        {"perturbed": 2.0},
        {"prompt": ["a red apple", "a blue bird " * 40]},
        {"prompt": "a cat AND a dog:0.5", "cache": 2},
    ],
    ids=str,
)
def test_a_text_that_changes_on_the_way(choices):
    """Keys and values are kept while the text is the same, and only then."""
    plain, fast = tiny_sd(), model.faster(tiny_sd())
    for seed in (7, 8):  # the second time with what the first has left
        *_, expected = text_to_image(plain, **PROMPT | choices | {"seed": seed})
        *_, found = text_to_image(fast, **PROMPT | choices | {"seed": seed})
        assert relative(found.latents, expected.latents) < 1e-4  # another text: above 1e-2


def test_keys_and_values_of_a_text_are_made_once(monkeypatch):
    sd, calls = model.faster(tiny_sd()), []
    layers = [module for module in sd.unet.modules() if isinstance(module, PackedCrossAttention)]
    for layer in layers:
        monkeypatch.setattr(layer.kv, "forward", lambda x, old=layer.kv.forward: (calls.append(1), old(x))[1])
    latents(sd)  # three steps
    assert len(calls) == len(layers)


@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_a_packed_convolution_at_one_size_after_another(dtype, allowed):
    """37 columns, two pictures, back again: the weight is laid out anew, and is still the weight."""
    needs_onednn_in(dtype)
    torch.manual_seed(0)
    for stride, padding, kernel in ((1, 1, 3), (2, 0, 3), (1, 0, 1)):
        conv = torch.nn.Conv2d(24, 40, kernel, stride=stride, padding=padding).to(dtype).requires_grad_(False)
        packed = PackedConv(conv)
        for shape in ((2, 24, 16, 16), (1, 24, 9, 37), (2, 24, 9, 37), (2, 24, 16, 16), (4, 24, 64, 64)):
            x = torch.randn(shape, dtype=dtype)
            assert relative(packed(x).float(), conv(x).float()) < allowed


@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_a_doubled_map_is_convolved_before_it_is_doubled(dtype, allowed):
    """Also to odd sizes, in batches, and at its edges, where the convolution reads zeros."""
    needs_onednn_in(dtype)
    torch.manual_seed(0)
    plain = Upsample(24).to(dtype).requires_grad_(False)
    packed, exact = PackedUpsample(plain), copy.deepcopy(plain).double()
    for shape, size in (
        ((2, 24, 8, 8), None),
        ((1, 24, 5, 7), (10, 14)),
        ((1, 24, 5, 7), (9, 14)),
        ((1, 24, 1, 3), None),
    ):
        x = torch.randn(shape, dtype=dtype)
        found, expected = packed(x, size), exact(x.double(), size)
        assert found.shape == expected.shape and relative(found.double(), expected) < allowed


@pytest.mark.parametrize("shape, keys", [((1, 2, 1100, 8), 1100), ((2, 1, 1024, 16), 1500), ((1, 2, 64, 8), 77)])
@pytest.mark.parametrize("strided", [False, True])
def test_blocked_attention_is_attention(shape, keys, strided):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn((shape[0], shape[1], n, shape[3]), generator=generator, dtype=torch.float64)
        for n in (shape[2], keys, keys)
    )
    if strided:
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert relative(model.blocked_attention(q, k, v), expected) < 1e-12


def test_packing_what_cannot_be_packed():
    with pytest.raises(UserError, match="float64"):
        model.pack(tiny_sd().to(dtype=torch.float64))


# ---- nothing in the loop waits for a GPU, which then always has work


class Crossings(TorchDispatchMode):
    """Notes what reads or writes on two devices, and tensors made of Python's numbers elsewhere than on the CPU."""

    def __init__(self):
        super().__init__()
        self.noted = []
        self.made = Made(self.noted)

    def __enter__(self):
        self.made.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.made.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if len({part.device for part in tree_leaves((args, kwargs, out)) if isinstance(part, torch.Tensor)}) > 1:
            self.noted.append(str(func))
        return out


class Made(TorchFunctionMode):
    def __init__(self, noted):
        super().__init__()
        self.noted = noted

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (
            func in (torch.tensor, torch.as_tensor)
            and out.device.type != "cpu"
            and not isinstance(args[0], torch.Tensor)
        ):
            self.noted.append(func.__name__)
        return out


CHOICES = [{"sampler": name} for name in SAMPLERS if name != "dpm_adaptive"] + [  # which looks at its errors
    {"guidance": 1.0},
    {"rescale": 0.7},
    {"threshold": 0.995},
    {"apg": 2.5},
    {"perturbed": 3.0},
    {"cache": 2},
    {"prompt": "a red apple AND a table"},
]


@pytest.mark.parametrize("distilled", [None, 32])
@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_no_step_waits(choices, distilled, monkeypatch):
    """The UNet on a device that has no numbers: reading one would be an error. The first step may fetch the text."""
    sd = tiny_sd(guidance_dim=distilled)
    sd.unet.to("meta")
    monkeypatch.setattr(NoiseOfEach, "_there", lambda self, noise: torch.empty(noise.shape, device="meta"))
    events = text_to_image(sd, **PROMPT | choices)
    next(events)
    with Crossings() as crossings:
        for _ in range(events.steps - 1):
            assert next(events).x.device.type == "meta"
    assert crossings.noted == []


def test_waiting_would_be_seen():
    with Crossings() as crossings:
        torch.full((), 5.0).to("meta")
        torch.as_tensor(5.0, device="meta")
        torch.full((), 5.0, device="meta") + 5.0
    assert crossings.noted == ["aten._to_copy.default", "as_tensor"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "choices", [*CHOICES, {"interval": (0.3, 5.0)}, {"prompt": "[a red apple:a green pear:0.5]"}], ids=str
)
def test_no_step_waits_for_a_gpu(choices):
    events = text_to_image(tiny_sd().to("cuda"), **PROMPT | choices)
    next(events)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(events.steps - 1):
            next(events)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_plain_draws_the_same_picture(tmp_path, monkeypatch, capsys):
    import plainsd
    from plainsd.cli import main
    from plainsd.pictures.images import open_picture, read_settings

    plainsd.save(tiny_sd(), tmp_path / "model")
    packed, faster = [], model.faster
    monkeypatch.setattr(model, "faster", lambda sd, **more: packed.append(1) or faster(sd, **more))
    command = [
        "generate",
        "a red apple",
        "--model",
        str(tmp_path / "model"),
        "--steps",
        "3",
        "--size",
        "64",
        "64",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--out",
    ]
    for name, flags, times in (("plain", ["--plain"], 0), ("fast", [], 1), ("again", ["--fast"], 2)):
        assert main([*command, str(tmp_path / f"{name}.png"), *flags]) == 0
        said = capsys.readouterr().err
        assert len(packed) == times and said.count("--fast is the default now") == (name == "again")
    plain, fast, again = (tmp_path / f"{name}.png" for name in ("plain", "fast", "again"))
    assert difference(open_picture(plain), open_picture(fast)) <= 1
    assert fast.read_bytes() == again.read_bytes()
    assert read_settings(plain) == read_settings(fast)
    if model.can_pack(torch.float32):
        assert plain.read_bytes() != fast.read_bytes()  # or the flag would do nothing
