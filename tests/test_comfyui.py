"""ComfyUI's workflows, in both of its forms: what is read out of them, and what is refused, in one line."""

import json
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plainsd.errors import UserError
from plainsd.pictures.texts.a1111 import format_settings, parse_settings
from plainsd.pictures.texts.comfyui import parse_workflow, share
from plainsd.pictures.texts.comfyui_graph import NODES


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def graph(**changes):
    """Text to picture; with further nodes, or in place of its own."""
    nodes = {
        "model": node("CheckpointLoaderSimple", ckpt_name="sd\\\\boats.safetensors"),
        "words": node("CLIPTextEncode", text="a boat", clip=["model", 1]),
        "against": node("CLIPTextEncode", text="rain", clip=["model", 1]),
        "empty": node("EmptyLatentImage", width=512, height=768, batch_size=1),
        "sampler": node(
            "KSampler", seed=5, steps=20, cfg=7, sampler_name="euler_ancestral", scheduler="normal", denoise=1.0,
            model=["model", 0], positive=["words", 0], negative=["against", 0], latent_image=["empty", 0],
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["model", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="x"),
    }  # fmt: skip
    return nodes | changes


def changed(nodes, name, **inputs):
    return nodes | {name: node(nodes[name]["class_type"], **(nodes[name]["inputs"] | inputs))}


def read(nodes):
    return parse_workflow(json.dumps(nodes))


def refused(nodes):
    with pytest.raises(UserError) as caught:
        parse_workflow(nodes if isinstance(nodes, str) else json.dumps(nodes))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


# --- one pass --------------------------------------------------------------------------------------------------------


def test_a_picture_from_text():
    one = read(graph())
    assert (one.prompt, one.negative, one.size, one.seed, one.steps) == ("a boat", "rain", (512, 768), 5, 20)
    assert (one.guidance, one.sampler, one.spacing, one.model) == (7.0, "euler_a", "uniform", "boats")
    assert (one.like, one.noise, one.strength, one.vae, one.other) == ("comfyui", "comfyui", None, None, ())


@pytest.mark.parametrize(
    ("scheduler", "spacing"),
    [("normal", "uniform"), ("karras", "karras"), ("exponential", "exponential"), ("sgm_uniform", "sgm_uniform"),
     ("simple", "simple"), ("ddim_uniform", "ddim_uniform"), ("beta", "beta"), ("kl_optimal", "kl_optimal"),
     ("linear_quadratic", "linear_quadratic")],
)  # fmt: skip
def test_its_own_schedules_have_their_own_levels(scheduler, spacing):
    """ComfyUI's beta and kl_optimal are not A1111's; a stranger stays, to be refused by name where it is drawn."""
    assert read(changed(graph(), "sampler", scheduler=scheduler)).spacing == spacing


@pytest.mark.parametrize(("sampling", "prediction"), [("eps", "epsilon"), ("x0", "sample"), ("lcm", None)])
def test_what_the_network_is_said_to_predict(sampling, prediction):
    nodes = graph(s=node("ModelSamplingDiscrete", sampling=sampling, zsnr=False, model=["model", 0]))
    one = read(changed(nodes, "sampler", model=["s", 0]))
    assert one.prediction == prediction
    assert one.other == (() if prediction else (("ComfyUI nodes", "ModelSamplingDiscrete"),))


def test_loras_words_layers_and_another_vae():
    nodes = graph(
        first=node("LoraLoader", lora_name="a/style.safetensors", strength_model=0.8, strength_clip=1.0,
                   model=["model", 0], clip=["model", 1]),
        second=node("LoraLoaderModelOnly", lora_name="ink.safetensors", strength_model=-1, model=["first", 0]),
        layer=node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["first", 1]),
        vae=node("VAELoader", vae_name="sharp.safetensors"),
        patch=node("FreeU_V2", b1=1.3, model=["second", 0]),
        rescale=node("RescaleCFG", multiplier=0.7, model=["patch", 0]),
        pag=node("PerturbedAttentionGuidance", scale=3.0, model=["rescale", 0]),
        v=node("ModelSamplingDiscrete", sampling="v_prediction", zsnr=True, model=["pag", 0]),
    )  # fmt: skip
    nodes = changed(nodes, "words", clip=["layer", 0], text="a (boat:1.2) of embedding:kitty.pt, yes")
    nodes = changed(nodes, "decode", vae=["vae", 0])
    one = read(changed(nodes, "sampler", model=["v", 0]))
    assert one.prompt == "a (boat:1.2) of embedding:kitty.pt, yes <lora:style:1:0.8> <lora:ink:0:-1>"
    assert (one.embeddings, one.clip_skip, one.vae) == (("kitty",), 2, "sharp.safetensors")
    assert (one.rescale, one.perturbed, one.prediction, one.zero_snr) == (0.7, 3.0, "v_prediction", True)
    idle = "FreeU_V2, LoRAs or layers of one text alone"  # the negative prompt is encoded without style and layer
    assert one.other == (("ComfyUI nodes", idle),)


def unused(nodes):
    """What is said to have no effect."""
    return dict(read(nodes).other).get("ComfyUI nodes", "")


def with_loras(*loaders, model=None, words=None, against=None):
    """The loaders one behind the other; which of them the sampler and the texts are plugged into."""
    nodes, before = graph(), "model"
    for number, (kind, name, *strengths) in enumerate(loaders):
        said = dict(zip(("strength_model", "strength_clip"), strengths, strict=False))
        nodes[f"lora{number}"] = node(kind, lora_name=name, **said, model=[before, 0], clip=[before, 1])
        before = f"lora{number}"
    nodes = changed(nodes, "sampler", model=[model or before, 0])
    nodes = changed(nodes, "words", clip=[words or before, 1])
    return changed(nodes, "against", clip=[against or words or before, 1])


@pytest.mark.parametrize(
    ("nodes", "tags"),
    [
        (with_loras(("LoraLoader", "s", 0.8, 0.8)), " <lora:s:0.8>"),
        (with_loras(("LoraLoader", "s", 0.8, 0.0)), " <lora:s:0:0.8>"),
        (with_loras(("LoraLoader", "s", 0.8, 0.5)), " <lora:s:0.5:0.8>"),
        (with_loras(("LoraLoaderModelOnly", "s", 0.8), words="model"), " <lora:s:0:0.8>"),
        (with_loras(("LoraLoader", "s", 0.8, 0.8), words="model"), " <lora:s:0:0.8>"),  # CLIP is wired past it
        (with_loras(("LoraLoader", "s", 0.8, 0.8), model="model"), " <lora:s:0.8:0>"),
        (with_loras(("LoraLoader", "s", 0.0, 0.0)), ""),
        (with_loras(("LoraLoader", "s", 0.5, 0.25), ("LoraLoader", "b/t.pt", -1, 1), ("LoraLoader", "s", 0.25, 0)),
         " <lora:s:0.25:0.75> <lora:t:1:-1>"),
        (with_loras(("LoraLoader", "s", 1, 1), ("LoraLoader", "t", 1, 1), model="lora0"), " <lora:s:1> <lora:t:1:0>"),
    ],
)  # fmt: skip
def test_strengths_of_loras_on_either_way(nodes, tags):
    """The one on the text encoders first, as A1111 writes it."""
    one = read(nodes)
    assert (one.prompt, one.other) == (f"a boat{tags}", ())


def test_texts_of_different_clips_are_told():
    assert unused(with_loras(("LoraLoader", "s", 1, 1), against="model")) == "LoRAs or layers of one text alone"
    assert unused(with_loras(("LoraLoader", "s", 1, 0), against="model")) == ""
    nodes = graph(patch=node("CLIPPatch", clip=["model", 1]), other=node("CheckpointLoaderSimple", ckpt_name="x.ckpt"))
    assert unused(changed(changed(nodes, "words", clip=["patch", 0]), "against", clip=["patch", 0])) == "CLIPPatch"
    nodes = changed(changed(nodes, "words", clip=["other", 1]), "against", clip=["other", 1])
    assert unused(nodes) == "the text encoder of another checkpoint"


def test_the_layer_that_is_read():
    def skipped(*layers):
        nodes, before = graph(), ["model", 1]
        for number, layer in enumerate(layers):
            nodes[f"layer{number}"] = node("CLIPSetLastLayer", stop_at_clip_layer=layer, clip=before)
            before = [f"layer{number}", 0]
        nodes = changed(changed(nodes, "words", clip=before), "against", clip=before)
        return read(nodes).clip_skip, unused(nodes)

    assert skipped(-2) == (2, "") and skipped(-2, -3) == (3, "") and skipped() == (1, "")
    assert skipped(-1) == (1, "CLIPSetLastLayer -1 of SD 2 and SDXL")  # of SD 1 it is read anyway


def xl_text(**more):
    """Sizes as those of the latents."""
    sizes = {"width": 512, "height": 768, "crop_w": 0, "crop_h": 0, "target_width": 512, "target_height": 768}
    return node("CLIPTextEncodeSDXL", **(sizes | {"text_g": "a boat", "text_l": "a boat", "clip": ["model", 1]} | more))


@pytest.mark.parametrize(
    ("large", "small", "prompt", "says"),
    [
        ("a boat", "a boat", "a boat", ""),
        ("a boat", "ink", "a boat", "CLIPTextEncodeSDXL's text_l"),
        ("a boat", "", "a boat", "CLIPTextEncodeSDXL's text_l"),
        ("", "ink", "ink", "CLIPTextEncodeSDXL's text_g"),
    ],
)
def test_sdxls_two_texts(large, small, prompt, says):
    nodes = graph(words=xl_text(text_g=large, text_l=small))
    assert (read(nodes).prompt, unused(nodes)) == (prompt, says)


def test_sdxls_sizes_and_scores_are_told_where_they_differ():
    kind = "CLIPTextEncodeSDXL"
    told = unused(graph(words=xl_text(width=4096, crop_h=512), against=xl_text(target_height=["x", 0])))
    assert told == f"{kind}'s width 4096, {kind}'s crop_h 512, {kind}'s target_height"
    for score, says in ((6.0, ""), (9, "CLIPTextEncodeSDXLRefiner's ascore 9")):
        sizes = {"width": 512, "height": 768, "clip": ["model", 1]}
        refined = node("CLIPTextEncodeSDXLRefiner", ascore=score, text="a boat", **sizes)
        unwanted = node("CLIPTextEncodeSDXLRefiner", ascore=2.5, text="rain", **sizes)
        assert unused(graph(words=refined, against=unwanted)) == says
    photo = {"photo": node("LoadImage", image="x.png"), "empty": node("VAEEncode", pixels=["photo", 0])}
    assert unused(graph(words=xl_text(), **photo)).count(kind) == 4  # the picture's size is not known
    large = node("LatentUpscaleBy", upscale_method="bilinear", scale_by=1.5, samples=["sampler", 0])
    sizes = {"width": 768, "height": 1152, "target_width": 768, "target_height": 1152}
    own = again(positive=["more", 0], negative=["more", 0])
    assert unused(graph(words=xl_text(), large=large, more=xl_text(**sizes), **own)) == ""
    assert unused(graph(words=xl_text(), large=large, more=xl_text(), **own)).count(kind) == 4


def test_joined_prompts():
    more = {"more": node("CLIPTextEncode", text="at sea", clip=["model", 1])}
    concat = node("ConditioningConcat", conditioning_to=["words", 0], conditioning_from=["more", 0])
    one = read(changed(graph(**more, both=concat), "sampler", positive=["both", 0]))
    assert (one.prompt, one.other) == ("a boat <concat> at sea", ())
    assert parse_settings(format_settings(one)) == one
    three = node("ConditioningConcat", conditioning_to=["both", 0], conditioning_from=["words", 0])
    area = node("ConditioningSetArea", conditioning=["three", 0])
    nodes = changed(graph(**more, both=concat, three=three, area=area), "sampler", positive=["area", 0])
    one = read(changed(nodes, "sampler", negative=["both", 0]))
    assert (one.prompt, one.negative) == ("a boat <concat> at sea <concat> a boat", "a boat <concat> at sea")
    assert one.other == (("ComfyUI nodes", "ConditioningSetArea"),)
    lost = node("ConditioningConcat", conditioning_to=["words", 0], conditioning_from=["empty", 0])
    one = read(changed(graph(both=lost), "sampler", positive=["both", 0]))
    assert (one.prompt, one.other) == ("a boat", (("ComfyUI nodes", "EmptyLatentImage, ConditioningConcat"),))
    circle = node("ConditioningConcat", conditioning_to=["both", 0], conditioning_from=["words", 0])
    assert "more than 100 texts are joined" in refused(changed(graph(both=circle), "sampler", positive=["both", 0]))
    combine = node("ConditioningCombine", conditioning_1=["words", 0], conditioning_2=["more", 0])
    one = read(changed(graph(**more, both=combine), "sampler", positive=["both", 0]))
    assert (one.prompt, one.other) == ("a boat", (("ComfyUI nodes", "ConditioningCombine"),))


def test_words_that_would_be_read_as_signs_are_told():
    assert unused(changed(graph(), "words", text="a <lora:ink:1> <concat> b")) == (
        "<lora:ink:1> as a text, <concat> as a text"
    )
    assert read(changed(graph(), "words", text="a BREAK b")).prompt == "a BREAK b"


def test_values_may_come_from_nodes_that_hold_them():
    nodes = graph(seed=node("PrimitiveInt", value=9), text=node("PrimitiveStringMultiline", value="a ship"))
    nodes = changed(changed(nodes, "sampler", seed=["seed", 0]), "words", text=["text", 0])
    assert (read(nodes).seed, read(nodes).prompt) == (9, "a ship")


def test_a_picture_drawn_over():
    over = {"photo": node("LoadImage", image="my photo.png"), "empty": node("VAEEncode", pixels=["photo", 0])}
    one = read(changed(graph(**over), "sampler", denoise=0.6))
    assert (one.strength, one.size, one.masked, one.other) == (0.6, None, False, (("Image", "my photo.png"),))
    over["empty"] = node("VAEEncodeForInpaint", pixels=["photo", 0], mask=["photo", 1])
    assert read(graph(**over)).masked
    assert unused(graph(**over)) == "VAEEncodeForInpaint's grey under the mask and grow_mask_by"
    advanced = node("KSamplerAdvanced", add_noise="enable", noise_seed=4, steps=20, cfg=7, sampler_name="euler",
                    scheduler="karras", start_at_step=8, end_at_step=10000, return_with_leftover_noise="disable",
                    model=["model", 0], positive=["words", 0], negative=["against", 0],
                    latent_image=["empty", 0])  # fmt: skip
    one = read(graph(**over, sampler=advanced))
    assert (one.seed, one.steps) == (4, 12) and int(one.steps / one.strength) == 20


@pytest.mark.parametrize("steps", range(1, 60))
def test_the_strength_that_leaves_so_many_steps(steps):
    assert all(int(running / share(running, steps)) == steps for running in range(1, steps + 1))


@pytest.mark.parametrize("kind", ["SamplerCustom", "SamplerCustomAdvanced"])
def test_samplers_put_together(kind):
    nodes = graph(
        noise=node("RandomNoise", noise_seed=8), which=node("KSamplerSelect", sampler_name="dpmpp_2m_sde_gpu"),
        levels=node("BasicScheduler", scheduler="karras", steps=12, denoise=1.0, model=["model", 0]),
        guider=node("CFGGuider", cfg=4.5, model=["model", 0], positive=["words", 0], negative=["against", 0]),
    )  # fmt: skip
    shared = {"sampler": ["which", 0], "sigmas": ["levels", 0], "latent_image": ["empty", 0]}
    if kind == "SamplerCustom":
        nodes["sampler"] = node(kind, add_noise=True, noise_seed=8, cfg=4.5, model=["model", 0], positive=["words", 0],
                                negative=["against", 0], **shared)  # fmt: skip
    else:
        nodes["sampler"] = node(kind, noise=["noise", 0], guider=["guider", 0], **shared)
    one = read(nodes)
    assert (one.seed, one.guidance, one.sampler, one.spacing, one.steps) == (8, 4.5, "dpmpp_2m_sde", "karras", 12)
    assert (one.prompt, one.negative, one.model, one.other) == ("a boat", "rain", "boats", ())
    nodes["which"] = node("SamplerDPMPP_2M_SDE", solver_type="heun", eta=0.5, s_noise=1.0)
    nodes["levels"] = node("AlignYourStepsScheduler", model_type="SDXL", steps=10, denoise=1.0)
    one = read(nodes)
    assert (one.sampler, one.eta, one.spacing, one.steps) == ("dpmpp_2m_sde_heun", 0.5, "align_your_steps_xl", 10)
    assert one.other == ()
    nodes["which"] = node("SamplerDPMPP_SDE", eta=1.0, s_noise=["x", 0], r=0.4)
    assert unused(nodes) == "SamplerDPMPP_SDE's s_noise, SamplerDPMPP_SDE's r 0.4"
    nodes["which"] = node("SamplerEulerAncestral", eta=1.0, s_noise=1.1)
    assert unused(nodes) == "SamplerEulerAncestral's s_noise 1.1"
    nodes["levels"] = node("SDTurboScheduler", model=["model", 0], steps=1, denoise=1.0)
    assert read(nodes).spacing == "sgm_uniform"


# --- two passes ------------------------------------------------------------------------------------------------------


def again(**changes):
    inputs = graph()["sampler"]["inputs"] | {"denoise": 0.5, "steps": 8, "latent_image": ["large", 0]} | changes
    return {"again": node("KSampler", **inputs), "decode": node("VAEDecode", samples=["again", 0])}


@pytest.mark.parametrize(("method", "upscaler"), [("nearest-exact", "latent-nearest-exact"), ("bilinear", "latent"),
                                                  ("bicubic", "latent-bicubic"), ("bislerp", "latent")])  # fmt: skip
def test_enlarged_latents_are_hires(method, upscaler):
    by = node("LatentUpscaleBy", upscale_method=method, scale_by=1.5, samples=["sampler", 0])
    to = node("LatentUpscale", upscale_method=method, width=768, height=1152, crop="disabled", samples=["sampler", 0])
    for large in (by, to):
        one = read(graph(large=large, **again()))
        assert (one.hires, one.upscaler, one.strength, one.hires_steps) == (1.5, upscaler, 0.5, 8)
        assert (one.steps, one.size, one.hires_sampler, one.hires_prompt) == (20, (512, 768), None, None)
        kind = large["class_type"]
        assert one.other == ((("ComfyUI nodes", f"{kind} by bislerp"),) if method == "bislerp" else ())


def test_a_network_between_two_passes_is_the_upscaler():
    one = read(graph(
        small=node("VAEDecode", samples=["sampler", 0]), net=node("UpscaleModelLoader", model_name="x/4x_ink.pth"),
        larger=node("ImageUpscaleWithModel", upscale_model=["net", 0], image=["small", 0]),
        sized=node("ImageScale", upscale_method="lanczos", width=1024, height=1536, crop="off", image=["larger", 0]),
        large=node("VAEEncode", pixels=["sized", 0]), **again(),
    ))  # fmt: skip
    assert (one.hires, one.upscaler, one.strength, one.other) == (2.0, "4x_ink", 0.5, ())


@pytest.mark.parametrize(
    ("name", "scale_by", "hires", "says"),
    [("4x-UltraSharp.pth", None, 4.0, ""), ("4x-UltraSharp.pth", 0.5, 2.0, ""),
     ("RealESRGAN_x2plus.pth", None, 2.0, ""), ("003_SwinIR_SRx4_GAN.pth", 0.25, 1.0, ""),
     ("Remacri.pth", 0.5, 1.0, "ImageUpscaleWithModel's factor"),
     ("ratio16x9.pth", None, 1.0, "ImageUpscaleWithModel's factor")],
)  # fmt: skip
def test_a_network_enlarges_as_its_name_says(name, scale_by, hires, says):
    nodes = graph(
        small=node("VAEDecode", samples=["sampler", 0]), net=node("UpscaleModelLoader", model_name=name),
        larger=node("ImageUpscaleWithModel", upscale_model=["net", 0], image=["small", 0]),
        large=node("VAEEncode", pixels=["larger", 0]), **again(),
    )  # fmt: skip
    if scale_by:
        nodes["sized"] = node("ImageScaleBy", upscale_method="lanczos", scale_by=scale_by, image=["larger", 0])
        nodes = changed(nodes, "large", pixels=["sized", 0])
    one = read(nodes)
    assert (one.hires, one.upscaler, unused(nodes)) == (hires, name.removesuffix(".pth"), says)


def test_a_network_without_a_loader_that_is_read_is_named():
    larger = node("ImageUpscaleWithModel", upscale_model=["x", 0], image=["small", 0])
    nodes = graph(small=node("VAEDecode", samples=["sampler", 0]), larger=larger,
                  large=node("VAEEncode", pixels=["larger", 0]), **again())  # fmt: skip
    assert (read(nodes).hires, read(nodes).upscaler) == (1.0, "latent")
    assert unused(nodes) == "ImageUpscaleWithModel, ImageUpscaleWithModel's factor"


def test_what_enlarges_twice():
    once = node("LatentUpscaleBy", upscale_method="bicubic", scale_by=1.5, samples=["sampler", 0])
    large = node("LatentUpscaleBy", upscale_method="bilinear", scale_by=2, samples=["once", 0])
    one = read(graph(once=once, large=large, **again()))
    assert (one.hires, one.upscaler) == (3.0, "latent")


def test_what_is_dropped_on_the_way_to_the_latents_is_named():
    """A mask of the second pass or of a picture from nothing, and what enlarges before the first pass."""
    masked = node("SetLatentNoiseMask", samples=["sampler", 0], mask=["photo", 1])
    photo = {"photo": node("LoadImage", image="x.png")}
    assert unused(graph(large=masked, **photo, **again())) == "SetLatentNoiseMask"
    empty = node("LatentUpscale", upscale_method="bilinear", width=768, height=1152, crop="off", samples=["masked", 0])
    masked = node("SetLatentNoiseMask", samples=["small", 0], mask=["photo", 1])
    nodes = graph(small=graph()["empty"], masked=masked, empty=empty, **photo)
    assert unused(nodes) == "LatentUpscale, SetLatentNoiseMask" and not read(nodes).masked
    larger = node("ImageUpscaleWithModel", upscale_model=["net", 0], image=["photo", 0])
    nodes = graph(**photo, larger=larger, empty=node("VAEEncode", pixels=["larger", 0]))
    assert unused(nodes) == "ImageUpscaleWithModel"


def test_what_the_second_pass_has_of_its_own():
    large = node("LatentUpscaleBy", upscale_method="bilinear", scale_by=2, samples=["sampler", 0])
    more = node("CLIPTextEncode", text="a large embedding:boat", clip=["model", 1])
    other = again(positive=["more", 0], cfg=5, sampler_name="dpmpp_2m", scheduler="karras", seed=6)
    one = read(graph(large=large, more=more, **other))
    assert (one.hires_prompt, one.hires_negative, one.hires_guidance) == ("a large embedding:boat", None, 5.0)
    assert one.embeddings == ("boat",)
    assert (one.hires_sampler, one.hires_spacing, one.seed) == ("dpmpp_2m", "karras", 5)
    assert one.other == (("Hires seed", "6"),)


@pytest.mark.parametrize(
    ("sampler", "says"), [("euler", ""), ("euler_ancestral", "seed 0 of the second sampler"),
                          ("dpmpp_2m_sde_gpu", "seed 0 of the second sampler"), ("gradient_estimation", "")],
)  # fmt: skip
@pytest.mark.parametrize(("start", "steps", "handover"), [(0, 25, 0.8), (5, 20, 0.75)])
def test_a_refiner_goes_on_where_the_model_ended(sampler, says, start, steps, handover):
    """Its noise goes on here, and begins anew there."""
    shared = {"steps": 25, "cfg": 8, "sampler_name": sampler, "scheduler": "normal", "positive": ["words", 0],
              "negative": ["against", 0]}  # fmt: skip
    one = read(graph(
        refiner=node("CheckpointLoaderSimple", ckpt_name="refiner.safetensors"),
        empty=node("VAEEncode", pixels=["photo", 0]) if start else graph()["empty"],
        sampler=node("KSamplerAdvanced", add_noise="enable", noise_seed=3, start_at_step=start, end_at_step=20,
                     return_with_leftover_noise="enable", model=["model", 0], latent_image=["empty", 0], **shared),
        again=node("KSamplerAdvanced", add_noise="disable", noise_seed=0, start_at_step=20, end_at_step=10000,
                   return_with_leftover_noise="disable", model=["refiner", 0], latent_image=["sampler", 0], **shared),
        decode=node("VAEDecode", samples=["again", 0]),
    ))  # fmt: skip
    assert (one.model, one.refiner, one.handover, one.seed, one.steps) == ("boats", "refiner", handover, 3, steps)
    said = ["the text encoder of another checkpoint", *filter(None, [says])]
    assert dict(one.other)["ComfyUI nodes"] == ", ".join(said)


def test_what_a_pass_that_goes_on_has_of_its_own_is_named():
    shared = {"positive": ["words", 0], "negative": ["against", 0], "model": ["model", 0], "scheduler": "normal"}
    first = node("KSamplerAdvanced", add_noise="enable", noise_seed=3, steps=20, cfg=8, sampler_name="euler",
                 start_at_step=0, end_at_step=12, return_with_leftover_noise="enable", latent_image=["empty", 0],
                 **shared)  # fmt: skip
    assert unused(graph(sampler=first)) == "the end at step 12 of 20"
    again = node("KSamplerAdvanced", add_noise="disable", noise_seed=0, steps=20, cfg=2, sampler_name="dpmpp_2m",
                 start_at_step=15, end_at_step=18, return_with_leftover_noise="disable", latent_image=["sampler", 0],
                 **shared | {"scheduler": "karras", "positive": ["dog", 0]})  # fmt: skip
    nodes = graph(sampler=first, again=again, dog=node("CLIPTextEncode", text="a dog", clip=["model", 1]),
                  decode=node("VAEDecode", samples=["again", 0]))  # fmt: skip
    said = unused(nodes)
    for what in ("sampler", "scheduler", "cfg", "prompt"):
        assert f"another {what} of the second sampler" in said
    assert "steps from 12 to 15 that no sampler runs" in said and "the end at step 18 of 20" in said
    assert "negative" not in said and "LoRAs" not in said
    large = node("LatentUpscaleBy", upscale_method="bilinear", scale_by=1.5, samples=["sampler", 0])
    assert "LatentUpscaleBy" in unused(changed(nodes | {"large": large}, "again", latent_image=["large", 0]))
    nodes = changed(nodes | {"large": large}, "again", latent_image=["large", 0], add_noise="enable")
    assert "the end at step 12 of 20" in unused(nodes) and read(nodes).hires == 1.5


# --- the editor's form -----------------------------------------------------------------------------------------------


def edited(**more):
    """The same picture as the editor writes it, its values in lists, its links apart."""

    def box(number, kind, values=(), inputs=(), outputs=(), mode=0):
        return {"id": number, "type": kind, "mode": mode, "widgets_values": list(values),
                "inputs": [{"name": name, "type": type_, "link": link} for name, type_, link in inputs],
                "outputs": [{"name": type_, "type": type_} for type_ in outputs]}  # fmt: skip

    return {
        "nodes": [
            box(1, "CheckpointLoaderSimple", ["boats.safetensors"], outputs=["MODEL", "CLIP", "VAE"]),
            box(2, "CLIPTextEncode", ["a boat"], [("clip", "CLIP", 11)]),
            box(3, "CLIPTextEncode", ["rain"], [("clip", "CLIP", 12)]),
            box(4, "EmptyLatentImage", [512, 768, 1]),
            box(9, "LoraLoader", ["style.safetensors", 0.5, 1], [("model", "MODEL", 10), ("clip", "CLIP", 18)],
                ["MODEL", "CLIP"], mode=more.get("mode", 0)),
            box(5, "KSampler", [5, "randomize", 20, 7, "euler", "karras", 1], [
                ("model", "MODEL", 19), ("positive", "C", 13), ("negative", "C", 14), ("latent_image", "LATENT", 15)]),
            box(6, "VAEDecode", [], [("samples", "LATENT", 16), ("vae", "VAE", 20)]),
            box(7, "SaveImage", ["x"], [("images", "IMAGE", 17)]),
            {"id": 8, "type": "Note", "widgets_values": ["hello"]},
        ],
        "links": [[10, 1, 0, 9, 0, "MODEL"], [11, 1, 1, 2, 0, "CLIP"], [12, 1, 1, 3, 0, "CLIP"], [13, 2, 0, 5, 1, "C"],
                  [14, 3, 0, 5, 2, "C"], [15, 4, 0, 5, 3, "LATENT"], [16, 5, 0, 6, 0, "LATENT"],
                  [17, 6, 0, 7, 0, "IMAGE"], [18, 1, 1, 9, 1, "CLIP"], [19, 9, 0, 5, 0, "MODEL"],
                  [20, 1, 2, 6, 1, "VAE"]],
        "version": 0.4,
    }  # fmt: skip


def test_the_editors_form():
    one = read(edited())
    assert (one.prompt, one.negative, one.size) == ("a boat <lora:style:0:0.5>", "rain", (512, 768))
    assert (one.seed, one.steps, one.guidance, one.sampler, one.spacing) == (5, 20, 7.0, "euler", "karras")
    assert (one.model, one.other) == ("boats", ())


def test_what_is_bypassed_did_not_run():
    assert read(edited(mode=4)).prompt == "a boat" and read(edited(mode=4)).model == "boats"


def test_subgraphs_are_unfolded():
    """The sampler and its text in a box of their own: model and latents go in, latents come out."""
    whole = edited()
    inside = [one for one in whole["nodes"] if one["id"] in (2, 3, 5)]
    links = [one for one in whole["links"] if one[0] in (13, 14)]
    for number, slot, target, place in ((19, 0, 5, 0), (15, 1, 5, 3), (11, 2, 2, 0), (12, 2, 3, 0)):
        links.append({"id": number, "origin_id": -10, "origin_slot": slot, "target_id": target, "target_slot": place})
    links.append({"id": 16, "origin_id": 5, "origin_slot": 0, "target_id": -20, "target_slot": 0})
    ins = [{"name": str(link), "link": link} for link in (19, 15, 11)]
    box = {"id": 30, "type": "some-uuid", "inputs": ins, "outputs": [{"type": "LATENT"}]}
    whole["nodes"] = [one for one in whole["nodes"] if one not in inside] + [box]
    whole["links"] = [one for one in whole["links"] if one[0] in (10, 17, 18, 20)] + [
        [19, 9, 0, 30, 0, "MODEL"], [15, 4, 0, 30, 1, "LATENT"], [11, 1, 1, 30, 2, "CLIP"], [16, 30, 0, 6, 0, "LATENT"]
    ]  # fmt: skip
    whole["definitions"] = {"subgraphs": [{"id": "some-uuid", "nodes": inside, "links": links}]}
    assert read(whole) == read(edited())
    whole["definitions"]["subgraphs"][0]["nodes"].append(box)  # in itself, for ever
    refused(json.dumps(whole).replace('"KSampler"', '"Other"'))


def framed(frame, ins=(), **inside_values):
    """The sampler and its text in a subgraph, whose frame shows seed, text and, of a subgraph in it, the steps: inputs
    are listed there only as far as they are linked, by name, and `frame` are its values."""
    whole = edited()
    sampler, words = (next(one for one in whole["nodes"] if one["id"] == number) for number in (5, 2))
    against = next(one for one in whole["nodes"] if one["id"] == 3)
    widget = [("seed", 40), ("steps", 42)]
    sampler["inputs"] += [{"name": name, "link": link, "widget": {"name": name}} for name, link in widget]
    words["inputs"].append({"name": "text", "link": 41, "widget": {"name": "text"}})
    steps = {"id": 8, "type": "PrimitiveInt", "widgets_values": [20, "fixed"], "outputs": [{"type": "INT"}],
             "inputs": [{"name": "value", "link": 50, "widget": {"name": "value"}}]}  # fmt: skip
    nested = {
        "id": "nested", "nodes": [steps], "inputs": [{"name": "value"}],
        "links": [[50, -10, 0, 8, 0, "INT"], [51, 8, 0, -20, 0, "INT"]],
    }  # fmt: skip
    ring = {"id": 9, "type": "nested", "outputs": [{"type": "INT"}], "widgets_values": [20],
            "inputs": [{"name": "value", "link": 43, "widget": {"name": "value"}}]}  # fmt: skip
    ends = ((40, 0, 5, 4), (41, 1, 2, 1), (19, 2, 5, 0), (15, 3, 5, 3), (11, 4, 2, 0), (12, 4, 3, 0), (43, 5, 9, 0))
    links = [one for one in whole["links"] if one[0] in (13, 14)] + [
        [42, 9, 0, 5, 5, "INT"],
        [16, 5, 0, -20, 0, "LATENT"],
    ]
    links += [[number, -10, slot, target, place, "*"] for number, slot, target, place in ends]
    names = ("seed", "text", "model", "latents", "clip", "value")
    inside = {"id": "box", "nodes": [sampler, words, against, ring], "links": links,
              "inputs": [{"name": name} for name in names]}  # fmt: skip
    shown = [{"name": "latents", "link": 15}, {"name": "clip", "link": 11}, {"name": "model", "link": 19}, *ins]
    box = {"id": 30, "type": "box", "inputs": shown, "outputs": [{"type": "LATENT"}], "widgets_values": frame}
    whole["nodes"] = [one for one in whole["nodes"] if one["id"] not in (2, 3, 5)] + [box]
    whole["links"] = [one for one in whole["links"] if one[0] in (10, 17, 18, 20)] + [
        [19, 9, 0, 30, 2, "MODEL"], [15, 4, 0, 30, 0, "LATENT"], [11, 1, 1, 30, 1, "CLIP"], [16, 30, 0, 6, 0, "LATENT"]
    ]  # fmt: skip
    whole["definitions"] = {"subgraphs": [inside, nested]}
    return whole


def test_what_stands_on_the_frame_of_a_subgraph_counts():
    """The nodes inside keep the values that they had before."""
    one = read(framed([77, "a ship", 31]))
    assert (one.seed, one.prompt, one.steps) == (77, "a ship <lora:style:0:0.5>", 31)
    assert (one.negative, one.guidance, one.size, one.model) == ("rain", 7.0, (512, 768), "boats")
    one = read(framed([None, "a ship", None]))
    assert (one.seed, one.prompt, one.steps) == (5, "a ship <lora:style:0:0.5>", 20)
    for old in ([], None, [77, "a ship"], {"seed": 3}):  # that shows nothing, or what is not known
        assert read(framed(old)).seed == 5 and read(framed(old)).prompt == "a boat <lora:style:0:0.5>"


def test_a_link_to_the_frame_counts_more_than_its_value():
    whole = framed([77, "a ship", 31], [{"name": "seed", "link": 60, "widget": {"name": "seed"}}])
    whole["nodes"].append({"id": 10, "type": "SeedNode", "widgets_values": [99, "randomize"]})
    whole["links"].append([60, 10, 0, 30, 3, "INT"])
    assert read(whole).seed == 99


# --- nodes that choose or compute ------------------------------------------------------------------------------------


def test_a_switch_hands_on_one_side():
    for switch, steps, model in ((False, 20, "boats"), (True, 4, "fast")):
        nodes = graph(
            fast=node("CheckpointLoaderSimple", ckpt_name="fast.safetensors"),
            quick=node("PrimitiveBoolean", value=switch),
            many=node("PrimitiveInt", value=20),
            steps=node("ComfySwitchNode", switch=["quick", 0], on_false=["many", 0], on_true=4),
            which=node("ComfySwitchNode", switch=["quick", 0], on_false=["model", 0], on_true=["fast", 0]),
        )  # fmt: skip
        one = read(changed(nodes, "sampler", steps=["steps", 0], model=["which", 0]))
        assert (one.steps, one.model) == (steps, model)


def test_of_a_switch_with_one_side_the_one():
    nodes = graph(steps=node("ComfySoftSwitchNode", switch=True, on_false=33))
    assert read(changed(nodes, "sampler", steps=["steps", 0])).steps == 33


def test_texts_are_joined_and_shown():
    nodes = graph(
        style=node("PrimitiveString", value="in ink"),
        both=node("StringConcatenate", string_a="a ship", string_b=["style", 0], delimiter=", "),
        shown=node("PreviewAny", source=["both", 0]),
    )
    assert read(changed(nodes, "words", text=["shown", 0])).prompt == "a ship, in ink"


@pytest.mark.parametrize(
    ("said", "size"),
    [({"aspect_ratio": "16:9 (Widescreen)", "megapixels": 1.0}, (1368, 768)),
     ({"aspect_ratio": "1:1 (Square)", "megapixels": 1}, (1024, 1024)),
     ({"aspect_ratio": "2:3 (Portrait Photo)", "megapixels": 0.5, "multiple": 64}, (576, 896))],
)  # fmt: skip
def test_a_size_by_its_ratio(said, size):
    """1 MP is 1024 * 1024; each side is rounded by itself: sqrt(2**20 * 16 / 9) = 1365.3, and 768."""
    nodes = graph(size=node("ResolutionSelector", **said))
    assert read(changed(nodes, "empty", width=["size", 0], height=["size", 1])).size == size


@pytest.mark.parametrize(
    "said",
    [node("ResolutionSelector", aspect_ratio="5:4", megapixels=1.0),
     node("ResolutionSelector", aspect_ratio="1:1 (Square)", megapixels="1"),
     node("ResolutionSelector", aspect_ratio="1:1 (Square)", megapixels=0.01, minimum=256),
     node("ComfySwitchNode", switch="yes", on_false=1, on_true=2), node("ComfySwitchNode", switch=True),
     node("ComfySwitchNode", switch=True, on_true=["value", 0]), node("PreviewAny", source=5)],
)  # fmt: skip
def test_what_such_a_node_says_is_not_guessed(said):
    assert "comes from a node that is not read" in refused(changed(graph(value=said), "sampler", steps=["value", 0]))


def test_such_nodes_in_endless_rows_and_circles():
    """Each text twice as long as the one before, and each of them twice."""
    nodes = graph(t0=node("PrimitiveString", value="boats"))
    for number in range(1, 3000):
        nodes[f"t{number}"] = node("StringConcatenate", string_a=[f"t{number - 1}", 0], string_b=[f"t{number - 1}", 0])
    refused(changed(nodes, "words", text=["t2999", 0]))
    assert read(changed(nodes, "words", text=["t3", 0])).prompt == "boats" * 8
    nodes = graph(a=node("StringConcatenate", string_a=["b", 0], string_b=["b", 0]),
                  b=node("StringConcatenate", string_a=["a", 0], string_b=["a", 0]))  # fmt: skip
    refused(changed(nodes, "words", text=["a", 0]))


def test_zeros_in_place_of_a_text_are_not_that_text():
    """Two samplers' negative prompts are often the prompt's encoding, with zeros."""
    nodes = changed(graph(zero=node("ConditioningZeroOut", conditioning=["words", 0])), "sampler", negative=["zero", 0])
    assert (read(nodes).prompt, read(nodes).negative, unused(nodes)) == ("a boat", "", "ConditioningZeroOut")


# --- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "broken"), ("{", "broken"), ("[1]", "not a workflow"), ("{}", "no nodes"), ("5", "not a workflow"),
        ("[" * 100_000, "broken"), ('{"a": ' * 100_000, "broken"), ('{"nodes": [], "links": 3}', "no nodes"),
        ('{"nodes": [{"id": 1, "type": "Note"}], "links": [[1, 2], "x", {"id": []}]}', "none of its nodes is a"),
    ],
)  # fmt: skip
def test_what_is_no_workflow(text, says):
    assert says in refused(text)


def test_nodes_of_wrong_kinds_are_named():
    assert "node sampler (KSampler): 'steps' is 'many'" in refused(changed(graph(), "sampler", steps="many"))
    assert "'seed' comes from a node that is not read here" in refused(changed(graph(), "sampler", seed=["x", 0]))
    assert "'text' is '5'" in refused(changed(graph(), "words", text=5))
    assert "its prompt is none of CLIPTextEncode's" in refused(graph(words=node("TextEncodeOther", text="x")))
    video = graph(empty=node("EmptyHunyuanLatentVideo", width=512, height=512))
    assert "belongs to models of another kind" in refused(video)
    other = graph(clip=node("CLIPLoader", clip_name="t5", type="wan"))
    assert "its text encoder is not that of" in refused(changed(other, "words", clip=["clip", 0]))
    two = graph(large=node("LatentUpscaleBy", scale_by=2, upscale_method="bilinear", samples=["sampler", 0]), **again())
    first = node("KSampler", **two["sampler"]["inputs"])
    assert "two passes are the most" in refused(changed(two, "sampler", latent_image=["first", 0]) | {"first": first})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["steps", "seed", "cfg", "denoise"])
def test_numbers_without_end_are_named(name, number):
    """Python's JSON has NaN and Infinity."""
    assert f"{name!r} is '{number}'; give it as a number" in refused(changed(graph(), "sampler", **{name: number}))


def test_circles_end():
    refused(changed(graph(), "decode", samples=["save", 0]) | {"sampler": node("Other", x=["sampler", 0])})
    circle = graph(a=node("Patch", model=["b", 0]), b=node("Patch", model=["a", 0]))
    assert read(changed(circle, "sampler", model=["a", 0])).model is None
    assert "comes from" in refused(changed(graph(a=node("V", value=["a", 0])), "sampler", seed=["a", 0]))
    refused(changed(graph(c=node("Text", conditioning=["c", 0])), "sampler", positive=["c", 0]))
    refused(changed(graph(), "sampler", latent_image=["sampler", 0], steps="x"))


def test_what_is_done_to_the_picture_afterwards_is_told():
    larger = node("ImageUpscaleWithModel", upscale_model=["net", 0], image=["decode", 0])
    one = read(changed(graph(larger=larger), "save", images=["larger", 0]))
    assert one.other == (("ComfyUI nodes", "ImageUpscaleWithModel"),)


def test_large_graphs_take_no_time():
    """A chain as long as is read, and every sampler the end of one; more nodes are refused."""
    began = time.process_time()
    chain = {f"n{i}": node("Patch", model=[f"n{i + 1}", 0], samples=[f"n{i + 1}", 0]) for i in range(NODES // 2)}
    samplers = {f"s{i}": node("KSampler", latent_image=["n0", 0]) for i in range(NODES // 3)}
    refused(chain | samplers)
    assert time.process_time() - began < 5
    assert "is too large" in refused({f"n{i}": node("A") for i in range(NODES + 1)})


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["sampler", "words"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(list(graph())), st.dictionaries(st.sampled_from(
    ["seed", "steps", "cfg", "model", "positive", "latent_image", "text", "clip", "samples", "images", "width",
     "sampler_name", "scheduler", "denoise", "ckpt_name"]), junk, max_size=4), max_size=3))  # fmt: skip
def test_any_values_are_read_or_refused(changes):
    nodes = graph()
    for name, inputs in changes.items():
        nodes = changed(nodes, name, **inputs)
    try:
        read(nodes)
    except UserError as error:
        assert "\n" not in str(error)


@given(junk, junk, junk)
def test_any_editors_form_is_read_or_refused(nodes, links, more):
    whole = edited()
    whole["nodes"] += nodes if isinstance(nodes, list) else [nodes]
    whole["links"] = links if not isinstance(links, list) else whole["links"] + links
    whole["definitions"] = more
    whole["nodes"][3]["widgets_values"] = more
    try:
        read(whole)
    except UserError as error:
        assert "\n" not in str(error)
