"""A compiled UNet draws the same, with what joins it too: ControlNets, T2I-Adapters, image prompts. Most tests trace it
and run the trace plainly, which takes seconds; those marked `full` and `gpu` compile."""

import copy
import os
import pickle
import shutil

import pytest
import torch
from conftest import tiny_sd
from PIL import Image
from test_control_pictures import picture_of, tiny_net
from test_image_prompt import TOWER, tiny_adapter
from test_speed import assert_as_exact, latents, relative
from torch._inductor.utils import run_and_get_code

import plainsd
from plainsd import Control, ImagePrompt
from plainsd.adapters.lora import inject
from plainsd.cli import main
from plainsd.device import check_can_compile
from plainsd.errors import UserError
from plainsd.models.forms import OtherForm
from plainsd.models.t2i_adapter import AdapterConfig, T2IAdapter
from plainsd.models.vision import VisionConfig, VisionTower
from plainsd.pictures.image_prompt import ImageReader
from plainsd.speed import model
from plainsd.train.optimizer import make_optimizer
from plainsd.train.options import FitOptions


def small_sd():
    return tiny_sd(channels=(32,), depth=(1,), heads=(2,))  # of one level: it is traced in less time


def net(**choices):
    return {"control": [Control(tiny_net(small_sd()), picture_of(0), **choices)]}


def t2i_adapter():
    torch.manual_seed(0)
    adapter = T2IAdapter(AdapterConfig(channels=small_sd().unet.config.channels, factor=8)).eval()
    for parameter in adapter.parameters():
        parameter.data *= 2
    return {"control": [Control(adapter, picture_of(0))]}


def image_prompt(**choices):
    torch.manual_seed(0)
    tower = VisionTower(VisionConfig(width=32, layers=2, heads=2, mlp=64, size=28, projection=TOWER["projection_dim"]))
    reader = ImageReader(tiny_adapter(small_sd().unet), tower.eval())
    return {"image_prompt": [ImagePrompt(reader, picture_of(1), **choices)]}


def half() -> Image.Image:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    return mask


CASES = {  # what joins, and what the lines say: one for each set of shapes
    "its first two steps of three": (lambda: net(end=0.7), ["with ControlNets", "latents"]),
    "T2I-Adapter": (t2i_adapter, ["with T2I-Adapters"]),
    "image prompt with a mask": (lambda: image_prompt(mask=half()), ["with image prompts"]),
    "ControlNet": (net, ["with ControlNets"]),
    "guess mode": (lambda: net(guess=True), ["with ControlNets"]),
    "image prompt": (image_prompt, ["with image prompts"]),
    "both": (lambda: net() | image_prompt(), ["with ControlNets and image prompts"]),
}
EACH = pytest.mark.parametrize("make, words", CASES.values(), ids=CASES)
QUICK = tuple(CASES)[:3]


@pytest.fixture
def traces(monkeypatch):
    """The UNet is traced, into one graph, and run as it was traced; its traces."""
    found, compile = [], torch.compile

    def kept(graph, example):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(model, "check_can_compile", lambda device, what: None)  # none is needed
    monkeypatch.setattr(
        torch, "compile", lambda run, *, dynamic, options: compile(run, dynamic=dynamic, fullgraph=True, backend=kept)
    )
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def untraced(make, *each):
    """Latents of the same model, without a trace, with each of these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda run, **_: run)
        patch.setattr(model, "check_can_compile", lambda device, what: None)
        sd = model.faster(make(), compiled=True)
    return [latents(sd, **more) for more in each]


def compiled_for(said):
    """What the lines "compiling ..." and "compiled ..." name, in order."""
    said = [line for line in said if "kernels" not in line]
    assert [line.split()[0] for line in said] == ["compiling", "compiled"] * (len(said) // 2)
    return [line.split(";")[0].split("8x8 ")[1].removeprefix("latents ") for line in said[::2]]


@pytest.mark.parametrize(
    "make, words",
    [pytest.param(*case, id=name, marks=() if name in QUICK else pytest.mark.full) for name, case in CASES.items()],
)
def test_what_joins_a_compiled_unet_is_one_of_its_inputs(traces, make, words):
    """It acts as in the plain UNet, to the bit, and is traced once for each set of shapes; so say the lines."""
    said, joins = [], make()
    fast = model.faster(small_sd(), compiled=True, tell=said.append)
    alone, expected, another = untraced(small_sd, {}, joins, joins | {"seed": 8})
    assert torch.equal(latents(fast, **joins), expected) and relative(alone, expected) > 0.01
    assert torch.equal(latents(fast, **joins, seed=8), another)
    assert compiled_for(said) == words and len(traces) == len(words)


def test_a_model_is_traced_anew_with_another_control_and_without(traces):
    said, each = [], [{}, net(), image_prompt(), {}]
    fast = model.faster(small_sd(), compiled=True, tell=said.append)
    for joins, expected in zip(each, untraced(small_sd, *each), strict=True):
        assert torch.equal(latents(fast, **joins), expected)
    assert compiled_for(said) == ["latents", "with ControlNets", "with image prompts"] and len(traces) == 3


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a machine without one; PyTorch reads $CXX when it is imported."""
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "no-compiler"))


def test_without_a_compiler_one_line_says_so(no_compiler, tmp_path, capsys, monkeypatch):
    with pytest.raises(UserError, match=r"^--compile needs a C\+\+ compiler \(\$CXX, or g\+\+\), and none works here"):
        model.faster(sd := small_sd(), compiled=True)
    assert not any(isinstance(one, OtherForm) for network in model.networks_of(sd) for one in network.modules())
    asked = FitOptions(steps=1, batch=1, adam8bit=True)
    with pytest.raises(UserError, match=r"^--adam8bit needs a C\+\+ compiler"):
        make_optimizer(torch.nn.Linear(4, 4), asked)
    monkeypatch.setattr("plainsd.device.has_triton", lambda: False)
    with pytest.raises(UserError, match=r"^--compile needs Triton, which is not installed; pip install triton"):
        check_can_compile(torch.device("cuda"), "--compile")
    plainsd.save(tiny_sd(), tmp_path / "model")
    assert main(["generate", "a", "--model", str(tmp_path / "model"), "--compile", "--out", str(tmp_path)]) == 2
    assert [line for line in capsys.readouterr().err.splitlines() if "needs a C++" in line]
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.full
def test_tiling_and_the_strength_of_a_lora_are_seen(traces):
    """What changes the UNet between two pictures is not lost in a trace of the first."""

    def with_lora():
        sd = small_sd()
        lora = inject(sd.unet, rank=2, generator=torch.Generator().manual_seed(0))
        for adapter in lora.adapters.values():
            torch.nn.init.normal_(adapter.up, generator=torch.Generator().manual_seed(1))
        return sd, lora

    (fast, lora), seen = with_lora(), []
    model.faster(fast, compiled=True)
    for strength, tiling in ((1.0, False), (0.3, False), (0.3, True), (1.0, False)):
        plain, its = with_lora()
        for one in (lora, its):
            one.set_strength(strength)
        seen.append(latents(fast, tiling=tiling))
        assert torch.equal(seen[-1], untraced(lambda sd=plain: sd, {"tiling": tiling})[0])
    assert relative(seen[1], seen[0]) > 0.01 and relative(seen[2], seen[1]) > 0.01


@pytest.mark.parametrize("flags", [["--cache", "2"], ["--perturbed", "3"], ["--grid", "cache=1,2"]], ids=" ".join)
def test_settings_that_a_compiled_unet_cannot_follow(flags, capsys, tmp_path):
    assert main(["generate", "a", *flags, "--compile", "--out", str(tmp_path / "x.png")]) == 2
    name = flags[0] if flags[0] != "--grid" else "--cache"
    assert f"{name} cannot be combined with --compile; leave one of them out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_copy_and_a_plain_model_are_not_compiled(traces):
    sd = model.faster(small_sd(), compiled=True)
    expected = latents(sd)
    count = len(traces)
    twin = copy.deepcopy(sd)
    assert "forward" not in vars(twin.unet) and "forward" not in vars(pickle.loads(pickle.dumps(sd.unet)))
    with torch.no_grad():
        twin.unet.conv_out.weight.zero_()
    assert not torch.equal(latents(twin), expected)
    model.plain_again(sd)
    assert "forward" not in vars(sd.unet)
    assert len(traces) == count and relative(latents(sd), expected) < 1e-4


def test_what_is_traced_anew_is_said(traces):
    said = []
    sd = model.faster(small_sd(), compiled=True, tell=said.append)
    for tiling in (False, True, False, True):
        latents(sd, tiling=tiling)
    assert len(traces) == 2 and compiled_for(said) == ["latents"] * 2
    model.faster(sd, compiled=True, tell=said.append)
    latents(sd)
    assert compiled_for(said) == ["latents"] * 3  # not one inside the other


# ---- compiled; with what joins the sums of its own networks and sharper attention err too, hence the factor


WITH_COMPILER = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="torch.compile needs a C++ compiler"
)
ERRORS = 5


@pytest.mark.full
@WITH_COMPILER
def test_a_compiled_model_draws_the_same():
    said = []
    assert_as_exact(model.faster(tiny_sd(), compiled=True, tell=said.append), tiny_sd)
    assert compiled_for(said) == ["latents"]  # one set of shapes, once


@pytest.mark.full
@WITH_COMPILER
def test_weights_are_compiled_in():
    """Laid out once, not at each call."""
    sd = small_sd()
    with torch.inference_mode():
        model.compile_unet(sd, lambda line: None)
        inputs = torch.randn(1, 4, 8, 8), 1.0, torch.zeros(1, 77, sd.unet.config.context)
        _, (code, *_) = run_and_get_code(sd.unet, *inputs)
    assert "_frozen_param" in code and "mkldnn" in code


@pytest.mark.full
@WITH_COMPILER
def test_models_of_one_shape_keep_their_own_weights():
    """Weights are frozen into what is compiled, and that is kept in caches, in memory and on the disk."""
    makers = [lambda seed=seed: tiny_sd(channels=(32,), depth=(1,), heads=(2,), seed=seed) for seed in (0, 1)]
    fast = [model.faster(make(), compiled=True) for make in makers]
    for number in (0, 1, 0):
        assert_as_exact(fast[number], makers[number])
    assert_as_exact(model.faster(makers[1](), compiled=True), makers[1])


@pytest.mark.full
@WITH_COMPILER
@EACH
def test_a_compiled_model_with_control_draws_the_same(make, words):
    said = []
    assert_as_exact(model.faster(small_sd(), compiled=True, tell=said.append), small_sd, ERRORS, **make())
    assert compiled_for(said) == words


@pytest.mark.gpu
@pytest.mark.parametrize("make", [dict, *(make for make, _ in CASES.values())], ids=["alone", *CASES])
def test_a_compiled_model_draws_the_same_on_a_gpu(monkeypatch, make):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions in float32 itself
    fast = model.faster(small_sd().to("cuda"), compiled=True)
    assert_as_exact(fast, lambda: small_sd().to("cuda"), ERRORS, **make())
