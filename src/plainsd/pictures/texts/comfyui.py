"""ComfyUI's workflows as settings: the last picture that one saves, the sampler it comes from, and one pass before it.

A second sampler after an enlarging of the latents is the second pass of hires here; one that goes on where the first
ended, on another model, a refiner. What stands between and has no meaning here is told under "ComfyUI nodes".
"""

import math
import re
from typing import Any

from plainsd.errors import WITH_CHOICES, UserError
from plainsd.pictures.settings import Settings
from plainsd.pictures.texts.comfyui_forms import read_graph
from plainsd.pictures.texts.comfyui_graph import Node
from plainsd.pictures.texts.comfyui_nodes import SAMPLING, GraphReader, SamplerPass
from plainsd.pictures.texts.comfyui_prompts import note_sizes
from plainsd.pictures.texts.comfyui_walk import stem

SAVED = ("SaveImage", "SaveImageWebsocket", "SaveAnimatedWEBP", "SaveAnimatedPNG", "PreviewImage")  # this one last
IMAGE_INPUTS = (
    "samples",
    "latent",
    "latent_image",
    "images",
    "image",
    "pixels",
    "input",
    "any",
)  # inputs, followed back
SOURCES = ("EmptyLatentImage", "LoadImage", "LoadImageMask", "LoadImageOutput", "EmptyImage")
DECODING = ("VAEDecode", "VAEDecodeTiled")
SAID_ELSEWHERE = (*DECODING, "VAEEncode", "VAEEncodeTiled", "Reroute", *SAVED)
MASKING = ("VAEEncodeForInpaint", "SetLatentNoiseMask", "InpaintModelConditioning")
LATENT = {"bilinear": "latent", "bicubic": "latent-bicubic", "nearest-exact": "latent-nearest-exact"}
OTHER_FAMILIES = re.compile(
    "Video|Audio|SVD|SD3|Flux|Hunyuan|3D|Zero123|Wan|Mochi|Cosmos|LTX|HiDream|Lumina|AuraFlow|Qwen|DiT"
)
NETWORK = "ImageUpscaleWithModel"
FACTOR = re.compile(r"(?<!\d)([1-8])[xX](?!\d)|(?<![a-z\d])[xX]([1-8])(?!\d)")  # in a network's name
WITH_NOISE = re.compile(r"_a(_|$)|sde|ddpm|lcm|sa_solver")  # samplers that add noise
PASSED_BY = "ComfyUI nodes"  # the key of those that have no meaning here
MOST_ENDS = 20  # nodes that save, or samplers, from which the way back is followed
ENLARGING = ("LatentUpscale", "LatentUpscaleBy", "ImageScale", "ImageScaleBy")


def parse_workflow(text: str) -> Settings:
    """A workflow in JSON, as it stands in a picture or in a file of its own. UserError where no picture of Stable
    Diffusion comes out of it, in one line."""
    try:
        return Workflow(text).settings()
    except UserError as error:
        raise UserError(f"ComfyUI's workflow: {error}", most=WITH_CHOICES) from None


class Workflow:
    def __init__(self, text: str):
        self.reader = GraphReader(read_graph(text))
        self.other: list[tuple[str, str]] = []
        self.decoders: dict[str, Node] = {}  # by the sampler whose latents they decode

    def settings(self) -> Settings:
        last = self.stage(self.last())
        between = self.between(last)
        before = between[-1] if between and between[-1].kind in SAMPLING else None
        if before is None:
            said = self.base(last) | self.source(last, between)
        else:
            first = self.stage(before)
            way = self.between(first)
            if way and way[-1].kind in SAMPLING:
                raise UserError(f"{way[-1]} draws before {before} and {last.node}; two passes are the most here")
            said = self.base(first) | self.source(first, way) | self.second(first, last, between)
            said["embeddings"] = tuple(dict.fromkeys([*first.texts.words, *last.texts.words]))
            note_sizes(self.reader, first.texts, said.get("size"))
        note_sizes(self.reader, last.texts, drawn_size(said))
        if last.last is not None:
            self.reader.idle[f"the end at step {last.last} of {last.steps}"] = None
        said["vae"] = self.vae(last)
        if self.reader.idle:
            self.other.append((PASSED_BY, ", ".join(self.reader.idle)))
        known = {name: value for name, value in said.items() if value is not None}
        return Settings(**known, like="comfyui", noise="comfyui", other=tuple(self.other))

    def stage(self, node: Node) -> SamplerPass:
        """One pass. UserError where its nodes are of models of other kinds."""
        stage = self.reader.stage(node)
        for kind in (*self.reader.idle, *(one.kind for one in self.way(stage.latent))):
            if OTHER_FAMILIES.search(kind):
                raise UserError(f"its {kind} belongs to models of another kind; Stable Diffusion 1, 2 and XL are read")
        return stage

    def last(self) -> Node:
        """The sampler whose picture is saved: of several, the one that others go before."""
        graph = self.reader.graph
        ends = sorted((node for node in graph.values() if node.kind in SAVED), key=lambda node: SAVED.index(node.kind))
        ways = [way for node in ends[:MOST_ENDS] if (way := self.way(node)) and way[-1].kind in SAMPLING]
        self.decoders = {way[-1].name: one for way in reversed(ways) for one in way if one.kind in DECODING}
        found = [way[-1] for way in ways]
        found = found or [node for node in graph.values() if node.kind in SAMPLING]
        if not found:
            kinds = ", ".join(SAMPLING)
            raise UserError(f"none of its nodes is a sampler that is read here ({kinds})")
        earlier = {
            way[-1].name for node in found[:MOST_ENDS] if (way := self.way(self.reader.next(node, *IMAGE_INPUTS)))
        }
        last = next((node for node in found if node.name not in earlier), found[0])
        for one in next((way for way in ways if way[-1] is last), []):  # what is done with the picture afterwards
            if one is not last and one.kind not in SAID_ELSEWHERE:
                self.reader.idle[one.kind[:60]] = None
        return last

    def way(self, node: Node | None) -> list[Node]:
        """Back from latents or a picture to what they come from: a sampler, or a node that makes them."""
        return self.reader.back(node, *IMAGE_INPUTS, until=lambda one: one.kind in SAMPLING or one.kind in SOURCES)

    def between(self, stage: SamplerPass) -> list[Node]:
        way = self.way(stage.latent)
        for one in way:
            if one.kind not in (*SAMPLING, *SOURCES, *SAID_ELSEWHERE, *MASKING, *ENLARGING, NETWORK):
                self.reader.idle[one.kind[:60]] = None
        return way

    def vae(self, stage: SamplerPass) -> str | None:
        """Its name, where it is not the model's own."""
        decoder = self.decoders.get(stage.node.name)
        loader = self.reader.next(decoder, "vae") if decoder else None
        return self.reader.value(loader, "vae_name", str) if loader and loader.kind == "VAELoader" else None

    def base(self, stage: SamplerPass) -> dict[str, Any]:
        return stage.model | {
            "prompt": stage.texts.prompt + "".join(f" {lora}" for lora in stage.loras),
            "negative": stage.texts.negative, "seed": stage.seed, "steps": stage.steps, "guidance": stage.guidance,
            "sampler": stage.sampler, "spacing": stage.spacing, "eta": stage.eta,
            "embeddings": tuple(dict.fromkeys(stage.texts.words)),
        }  # fmt: skip

    def source(self, stage: SamplerPass, way: list[Node]) -> dict[str, Any]:
        """The size of a picture from nothing; how far one goes from another picture."""
        origin = way[-1] if way else None
        self.drop(way, *ENLARGING, NETWORK)
        if origin is not None and origin.kind == "EmptyLatentImage":
            self.drop(way, *MASKING)
            width, height, batch = (
                self.reader.value(origin, name, int, 1) for name in ("width", "height", "batch_size")
            )
            if stage.denoise < 1 or stage.first:
                self.reader.idle["EmptyLatentImage at less than full noise"] = None
            return {"size": (width, height), "batch_size": max(1, batch)}
        if origin is not None and origin.kind in SOURCES and isinstance(origin.inputs.get("image"), str):
            self.other.append(("Image", stem(origin.inputs["image"])[:200]))
        said: dict[str, Any] = {"masked": True} if any(one.kind in MASKING for one in way) else {}
        if any(one.kind == "VAEEncodeForInpaint" for one in way):
            self.reader.idle["VAEEncodeForInpaint's grey under the mask and grow_mask_by"] = None
        if stage.first and stage.steps:
            running = max(1, stage.steps - stage.first)
            return said | {"steps": running, "strength": share(running, stage.steps)}
        return said | {"strength": stage.denoise}

    def second(self, first: SamplerPass, last: SamplerPass, between: list[Node]) -> dict[str, Any]:
        """A second pass: it goes on where the first ended, or draws over what was enlarged."""
        self.drop(between, *MASKING)
        if last.first and not last.noisy:
            self.drop(between, *ENLARGING, NETWORK)
            self.continued(first, last)
            if not first.steps or last.model.get("model") == first.model.get("model"):
                return {}
            refiner = last.model.get("model")
            handover = (last.first - first.first) / max(1, first.steps - first.first)
            return {"refiner": refiner, "handover": handover if refiner else None}
        if first.last is not None:
            self.reader.idle[f"the end at step {first.last} of {first.steps}"] = None
        changes = {
            "strength": last.denoise, "hires_steps": last.steps,
            "hires_sampler": last.sampler if last.sampler != first.sampler else None,
            "hires_spacing": last.spacing if last.spacing != first.spacing else None,
            "hires_prompt": last.texts.prompt if last.texts.prompt != first.texts.prompt else None,
            "hires_negative": last.texts.negative if last.texts.negative != first.texts.negative else None,
            "hires_guidance": last.guidance if last.guidance != first.guidance else None,
        }  # fmt: skip
        if last.first and last.steps:
            running = max(1, last.steps - last.first)
            changes |= {"hires_steps": running, "strength": share(running, last.steps)}
        if last.seed != first.seed:
            self.other.append(("Hires seed", str(last.seed)))
        for key, ours, theirs in (("model", last.model.get("model"), first.model.get("model")),
                                  ("LoRAs", last.loras, first.loras),
                                  ("clip skip", last.texts.clip.skip, first.texts.clip.skip)):  # fmt: skip
            if ours != theirs:
                self.reader.idle[f"another {key} of the second sampler"] = None
        return changes | self.enlarged(first, between)

    def drop(self, nodes: list[Node], *kinds: str) -> None:
        for one in nodes:
            if one.kind in kinds:
                self.reader.pass_by(one)

    def continued(self, first: SamplerPass, last: SamplerPass) -> None:
        """Names what a pass that goes on where the first ended has of its own, which has no place here."""
        for key, ours, theirs in (("sampler", last.sampler, first.sampler), ("scheduler", last.spacing, first.spacing),
                                  ("cfg", last.guidance, first.guidance), ("steps", last.steps, first.steps),
                                  ("prompt", last.texts.prompt, first.texts.prompt),
                                  ("negative prompt", last.texts.negative, first.texts.negative),
                                  ("LoRAs", last.loras, first.loras)):  # fmt: skip
            if ours != theirs:
                self.reader.idle[f"another {key} of the second sampler"] = None
        if WITH_NOISE.search(last.sampler or ""):
            self.reader.idle[f"seed {last.seed} of the second sampler"] = None
        if first.last != last.first:
            self.reader.idle[f"steps from {first.last or first.steps} to {last.first} that no sampler runs"] = None

    def enlarged(self, first: SamplerPass, between: list[Node]) -> dict[str, Any]:
        """How, and how many times. Of a picture that a network enlarged, other nodes only set the size."""
        times, method, network = 1.0, None, None
        for one in reversed(between):
            if one.kind == NETWORK:
                network = self.network(one)
                factor = FACTOR.search(network or "")
                times *= int(factor[1] or factor[2]) if factor else math.nan
            elif one.kind in ENLARGING:
                method = self.method(one)
                times = self.times(one, times, first)
        if math.isnan(times):
            self.reader.idle[f"{NETWORK}'s factor"] = None
            times = 1.0
        upscaler = network or method
        return {"hires": times} | ({"upscaler": upscaler} if upscaler else {})

    def network(self, node: Node) -> str | None:
        loader = self.reader.next(node, "upscale_model")
        if loader is None or loader.kind != "UpscaleModelLoader":
            self.reader.pass_by(node)
            return None
        return stem(self.reader.value(loader, "model_name", str))

    def method(self, node: Node) -> str:
        method, latent = str(node.inputs.get("upscale_method")), node.kind.startswith("Latent")
        upscaler = LATENT.get(method) if latent else {"lanczos": "lanczos"}.get(method)
        if upscaler is None:
            self.reader.idle[f"{node.kind} by {method[:30]}"] = None
        return upscaler or ("latent" if latent else "lanczos")

    def times(self, node: Node, before: float, first: SamplerPass) -> float:
        """How many times as large as the first pass, after this node."""
        if node.kind.endswith("By"):
            return before * self.reader.value(node, "scale_by", float)
        width, height = (self.reader.value(node, name, int) for name in ("width", "height"))
        way = self.way(first.latent)
        if way and way[-1].kind == "EmptyLatentImage":
            sides = [self.reader.value(way[-1], name, int) for name in ("width", "height")]
            ratios = {to / side for to, side in zip((width, height), sides, strict=True) if to and side > 0}
            if len(ratios) == 1:
                return ratios.pop()
        self.other.append(("Hires resize", f"{width}x{height}"))
        return 1.0


def drawn_size(said: dict[str, Any]) -> tuple[int, int] | None:
    """Of the last pass, where it is known."""
    size, times = said.get("size"), said.get("hires", 1.0)
    return size if size is None or times == 1 else (round(size[0] * times / 8) * 8, round(size[1] * times / 8) * 8)


def share(running: int, steps: int) -> float:
    """The strength at which, of `steps`, the last `running` run: ComfyUI's int(running / strength) is `steps`."""
    strength = running / steps
    while int(running / strength) < steps:
        strength = math.nextafter(strength, 0)
    return strength
