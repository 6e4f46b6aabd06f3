"""What trades exactness for speed or memory: exact where it can be, near where it cannot, and never unasked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, TINY_XL, difference, tiny_sd

import plainsd
from plainsd.checkpoint import packed_network
from plainsd.errors import UserError
from plainsd.generate import final, text_to_image
from plainsd.models.deep_cache import DeepCache
from plainsd.models.unet import UNet, UNetConfig
from plainsd.pictures.model import Saving
from plainsd.pictures.settings import Settings
from plainsd.pictures.texts.a1111 import format_settings, parse_settings
from plainsd.speed.int8 import exact_products, int8
from plainsd.speed.model import faster

OPTIONS = {"size": 64, "steps": 6, "guidance": 4.0, "seed": 5}
CONFIG = UNetConfig(channels=(16, 32, 32), depth=(1, 1, 0), heads=(2, 2, 2), layers=2, context=8, groups=8)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet(CONFIG).eval()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def inputs(rows: int = 2, size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 4, size, size), torch.randn(rows, 5, 8)


# --- deep-block caching ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [12, 10])  # 10 is halved to 5 and 3
@pytest.mark.parametrize("shallow", range(9))
def test_with_nothing_to_take_again_it_is_the_unet(unet, shallow, size):
    x, context = inputs(size=size)
    cached = DeepCache(unet, every=1, shallow=shallow)
    for timestep in (900.0, 500.5):
        assert torch.equal(cached(x, timestep, context), unet(x, timestep, context))


@pytest.mark.parametrize("shallow", range(9))
def test_kept_features_that_are_right_give_the_right_answer(unet, shallow):
    """The same input again, at a timestep that differs in nothing the network can see."""
    x, context = inputs()
    cached, first = DeepCache(unet, every=2, shallow=shallow), torch.tensor(500.0)
    plain = cached(x, first, context)
    ran = []
    handle = unet.mid.register_forward_hook(lambda *_: ran.append(True))
    cached.timestep = None  # a new step
    assert torch.equal(cached(x, first, context), plain) and not ran
    handle.remove()


def test_deep_layers_run_at_every_nth_step_only(unet):
    x, context = inputs()
    cached, ran = DeepCache(unet, every=3), []
    handle = unet.mid.register_forward_hook(lambda *_: ran.append(timestep))
    for timestep in (900.0, 800.0, 700.0, 600.0, 500.0, 400.0, 300.0):
        cached(x, timestep, context)
    handle.remove()
    assert ran == [900.0, 600.0, 300.0]


def test_each_call_of_a_step_keeps_its_own(unet):
    """Guidance in two calls is guidance in one."""
    (x, context), (later, _) = inputs(), inputs()
    together, apart = DeepCache(unet, every=2), DeepCache(unet, every=2)
    for latents, timestep in ((x, 900.0), (later, 800.0)):
        whole = together(latents, timestep, context)
        rows = [apart(latents[i : i + 1], timestep, context[i : i + 1]) for i in range(2)]
        torch.testing.assert_close(torch.cat(rows), whole, rtol=1e-4, atol=1e-5)


def test_rows_that_were_not_there_before_run_through_all_layers(unet):
    """Guidance that begins or ends on the way."""
    (x, context), cached = inputs(), DeepCache(unet, every=5)
    cached(x[:1], 900.0, context[:1])
    assert torch.equal(cached(x, 800.0, context), unet(x, 800.0, context))
    assert torch.equal(cached(x[1:], 700.0, context[1:]), unet(x[1:], 700.0, context[1:]))


@pytest.mark.parametrize("variant", [TINY, TINY_XL], ids=lambda variant: variant.name)
def test_pictures_with_a_cache(variant):
    sd = tiny_sd(variant)
    plain = final(text_to_image(sd, "a", **OPTIONS))[0]
    assert difference(plain, final(text_to_image(sd, "a", cache=1, **OPTIONS))[0]) == 0
    other = final(text_to_image(sd, "a", cache=3, **OPTIONS))[0]
    assert difference(plain, other) > 0
    assert difference(other, final(text_to_image(sd, "a", cache=3, **OPTIONS))[0]) == 0  # nothing is left over


def test_a_cache_in_a_batch_and_in_two_calls_gives_the_same_picture():
    sd = tiny_sd()
    alone = final(text_to_image(sd, "a", cache=2, **OPTIONS))[0]
    assert difference(alone, final(text_to_image(sd, "a", cache=2, count=2, **OPTIONS))[0]) <= 1
    sd.saving = Saving(rows=1)
    assert difference(alone, final(text_to_image(sd, "a", cache=2, **OPTIONS))[0]) <= 1


def test_a_cache_of_named_rows_is_of_each_row_alone(unet):
    """Rows that come or are elsewhere in the batch change nothing for the others."""
    (x, context), (later, _) = inputs(), inputs()
    one, both = DeepCache(unet, every=3), DeepCache(unet, every=3)
    one(x[:1], 900.0, context[:1], rows="a")
    both(x[:1], 900.0, context[:1], rows="a")
    for timestep, order in ((800.0, [1, 0]), (700.0, [0, 1]), (600.0, [1, 0])):
        alone = one(later[:1], timestep, context[:1], rows="a")
        names = ["ab"[place] for place in order]
        together = both(later[order], timestep, context[order], rows=names)
        torch.testing.assert_close(together[[names.index("a")]], alone, rtol=1e-4, atol=1e-5)
        if timestep == 800.0:
            own = unet(later[1:], timestep, context[1:])
            torch.testing.assert_close(together[[names.index("b")]], own, rtol=1e-4, atol=1e-5)


def test_a_cached_picture_does_not_depend_on_its_neighbours():
    """Whose prompt becomes longer at a step that is not due, so that its rows go elsewhere. The embedded model's
    pictures show it; those of random weights hardly change from step to step."""
    sd, long = plainsd.load(device="cpu", dtype="float32"), "[a cat:" + "a cat on a red background and " * 4 + ":0.3]"
    options = {"steps": 8, "cache": 3, "sampler": "euler"}
    alone = final(text_to_image(sd, "an owl", **options))[0]
    assert difference(alone, final(text_to_image(sd, ["an owl", long], **options))[0]) <= 2


def test_the_picture_tells_of_its_cache():
    made = Settings("x", steps=5, sampler="euler", cache=3, noise="cpu")
    assert "Deep cache: 3" in format_settings(made) and parse_settings(format_settings(made)) == made
    with pytest.raises(UserError, match="cache 0 is out of range; choose 1 to 100"):
        text_to_image(tiny_sd(), "a", cache=0)


# --- 8-bit weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", [False, True])
def test_8_bits_are_near_and_take_less(activations):
    pytest.importorskip("torchao")
    if activations and not exact_products():
        with pytest.raises(UserError, match="8-bit products overflow on this processor"):
            int8(tiny_sd(), activations=True)
        return
    sd = tiny_sd()
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, TINY.unet.context)
    plain, size = sd.unet(x, 500.0, context), linear_bytes(sd.unet)
    assert int8(sd, activations=activations) is sd
    with pytest.raises(UserError, match="in 8 bits already"):
        int8(sd)
    with pytest.raises(UserError, match="cannot be cast to torch.bfloat16"):
        sd.to(dtype=torch.bfloat16)
    with pytest.raises(UserError, match="save it without int8"):
        packed_network(sd.unet)
    error = (sd.unet(x, 500.0, context) - plain).norm() / plain.norm()
    assert 0 < error < 0.05
    assert linear_bytes(sd.unet) < 0.35 * size  # a quarter, and a scale for each row


def test_a_packed_model_is_made_plain_for_8_bits():
    pytest.importorskip("torchao")
    packed, plain = faster(tiny_sd()), int8(tiny_sd())
    with pytest.warns(UserWarning, match="was packed, and 8 bits need plain layers: call faster again"):
        int8(packed)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, TINY.unet.context)
    assert (packed.unet(x, 500.0, context) - plain.unet(x, 500.0, context)).abs().max() < 1e-5
    assert linear_bytes(packed.unet) == linear_bytes(plain.unet)


def test_products_that_overflow_are_found_and_refused():
    """With oneDNN kept to AVX2, as on processors without VNNI; weights alone in 8 bits work there."""
    pytest.importorskip("torchao")
    script = """
import torch
from conftest import tiny_sd
from plainsd.errors import UserError
from plainsd.speed.int8 import exact_products, int8
sd = tiny_sd()
before = {name: type(weight) for name, weight in sd.unet.named_parameters()}
try:
    int8(sd, activations=True)
except UserError as error:
    print(exact_products(), "no VNNI" in str(error), before == {n: type(w) for n, w in sd.unet.named_parameters()})
int8(sd)
"""
    places = [Path(__file__).parent, Path(plainsd.__file__).parents[1]]
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": os.pathsep.join(map(str, places))}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False True True\n"


def linear_bytes(unet) -> int:
    """Of the Linear weights, as they lie in memory."""
    total = 0
    for module in unet.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight
            names = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else []
            parts = [getattr(weight, name) for name in names] or [weight]
            total += sum(part.numel() * part.itemsize for part in parts)
    return total


def test_8_bits_without_torchao_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"need torchao; install it with: pip install 'plainsd\[int8\]'"):
        int8(tiny_sd())
