"""What ComfyUI's nodes say of one pass: from a sampler's node back to its numbers, prompts, model and latents."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from plainsd.errors import UserError
from plainsd.pictures.settings import plain_number
from plainsd.pictures.texts.comfyui_graph import Graph, Node
from plainsd.pictures.texts.labels import sampler_named, spacing_named

SAMPLING = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
LONGEST_WAY = 1000  # nodes, one behind the other
VALUE = ("value", "seed", "text", "string", "int", "float", "Value", "Text", "String")  # of nodes that only hold one
MODELS = {"CheckpointLoaderSimple": "ckpt_name", "CheckpointLoader": "ckpt_name",
          "unCLIPCheckpointLoader": "ckpt_name", "UNETLoader": "unet_name"}  # fmt: skip
SAMPLER_NODES = {"SamplerEulerAncestral": "euler_a", "SamplerDPMPP_SDE": "dpmpp_sde",
                 "SamplerDPMPP_2S_Ancestral": "dpmpp_2s_a", "SamplerDPMPP_2M_SDE": "dpmpp_2m_sde",
                 "SamplerDPMPP_3M_SDE": "dpmpp_3m_sde"}  # fmt: skip
SCHEDULER_NODES = {"KarrasScheduler": "karras", "ExponentialScheduler": "exponential",
                   "PolyexponentialScheduler": "polyexponential", "BetaSamplingScheduler": "beta"}  # fmt: skip
OWN_SCHEDULES = {
    "beta": "beta",
    "kl_optimal": "kl_optimal",
    "ddim_uniform": "ddim_uniform",
}  # not A1111's of these names
CLIP_TYPES = (None, "stable_diffusion", "sdxl")  # types of text encoders that are loaded apart
LEARNED_WORD = re.compile(r"embedding:([^\s,:()\[\]]+)")
Type = TypeVar("Type", int, float, str)


@dataclass
class SamplerPass:
    """One pass of a sampler."""

    node: Node
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    spacing: str | None = None
    eta: float | None = None
    denoise: float = 1.0
    first: int = 0  # of the steps, which one begins
    last: int | None = None  # before which one it ends; None: after all
    noisy: bool = True  # whether noise is added
    prompt: str = ""
    negative: str = ""
    model: dict[str, Any] = field(default_factory=dict)  # fields of Settings that its loaders and patches say
    loras: list[tuple[str, float]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)  # learned ones, in the prompts
    latent: Node | None = None  # where its latents come from


class GraphReader:
    """A walk through a graph, which remembers the nodes that have no meaning here."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.idle: dict[str, None] = {}  # their kinds, in order

    def next(self, node: Node, *names: str) -> Node | None:
        """The node that the first of these inputs comes from."""
        links = (node.inputs.get(name) for name in names)
        return next((self.graph[link[0]] for link in links if isinstance(link, tuple) and link[0] in self.graph), None)

    def back(self, node: Node | None, *names: str, until: Callable[[Node], bool]) -> list[Node]:
        """The way back through such inputs, up to the first node where it ends. A circle ends it, too."""
        way: list[Node] = []
        seen = set()
        while node is not None and node.name not in seen and len(way) < LONGEST_WAY:
            way.append(node)
            if until(node):
                break
            seen.add(node.name)
            node = self.next(node, *names)
        return way

    def value(self, node: Node, name: str, kind: type[Type], default: Type | None = None) -> Type:
        """An input's value, of the node itself or of those that only hold one. UserError where it is another kind."""
        value, holder, seen = node.inputs.get(name), node, set()
        while isinstance(value, tuple):
            if holder.name in seen or value[0] not in self.graph:
                value = None
                break
            seen.add(holder.name)
            holder = self.graph[value[0]]
            value = next((holder.inputs[key] for key in VALUE if key in holder.inputs), None)
        if value is None and default is not None:
            return default
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        wanted = (int, float) if kind is float else kind
        endless = isinstance(value, float) and not math.isfinite(value)  # JSON of Python has NaN and Infinity
        if not isinstance(value, wanted) or isinstance(value, bool) or endless:
            what = "comes from a node that is not read here" if value is None else f"is {str(value)[:40]!r}"
            raise UserError(f"{node}: {name!r} {what}; give it as a {'text' if kind is str else 'number'}")
        return kind(value)

    # --- a sampler ------------------------------------------------------------------------------------------------

    def stage(self, node: Node) -> SamplerPass:
        stage = SamplerPass(node)
        SAMPLING_NODES[node.kind](self, stage)
        guider = self.next(node, "guider") or node
        self._model(stage, self.next(guider, "model"))
        stage.prompt = self._text(stage, self.next(guider, "positive", "conditioning"), "positive")
        stage.negative = self._text(stage, self.next(guider, "negative"), "negative")
        stage.latent = self.next(node, "latent_image")
        return stage

    def ksampler(self, stage: SamplerPass) -> None:
        node = stage.node
        stage.seed = self.value(node, "seed", int)
        stage.steps = self.value(node, "steps", int)
        stage.guidance = self.value(node, "cfg", float)
        stage.denoise = self.value(node, "denoise", float, 1.0)
        self._names(stage, self.value(node, "sampler_name", str), self.value(node, "scheduler", str))

    def ksampler_advanced(self, stage: SamplerPass) -> None:
        node = stage.node
        stage.seed = self.value(node, "noise_seed", int)
        stage.steps = self.value(node, "steps", int)
        stage.guidance = self.value(node, "cfg", float)
        stage.first = self.value(node, "start_at_step", int, 0)
        last = self.value(node, "end_at_step", int, 10_000)
        stage.last = last if last < stage.steps else None
        stage.noisy = self.value(node, "add_noise", str, "enable") != "disable"
        self._names(stage, self.value(node, "sampler_name", str), self.value(node, "scheduler", str))

    def sampler_custom(self, stage: SamplerPass) -> None:
        node = stage.node
        noise, guider = self.next(node, "noise"), self.next(node, "guider")
        if node.kind == "SamplerCustom":
            stage.seed = self.value(node, "noise_seed", int)
            stage.guidance = self.value(node, "cfg", float)
            stage.noisy = node.inputs.get("add_noise", True) not in (False, "disable")
        else:
            if noise is not None and noise.kind == "RandomNoise":
                stage.seed = self.value(noise, "noise_seed", int)
            elif noise is not None and noise.kind == "DisableNoise":
                stage.noisy = False
            else:
                self._pass(noise)
            if guider is not None and guider.kind == "CFGGuider":
                stage.guidance = self.value(guider, "cfg", float)
            elif guider is not None and guider.kind == "BasicGuider":
                stage.guidance = 1.0
            else:
                self._pass(guider)
        self._sampler_node(stage, self.next(node, "sampler"))
        self._scheduler_node(stage, self.next(node, "sigmas"))

    def _sampler_node(self, stage: SamplerPass, node: Node | None) -> None:
        if node is None or (node.kind != "KSamplerSelect" and node.kind not in SAMPLER_NODES):
            raise UserError(f"{node or stage.node}: this sampler is not read here; choose one with --sampler")
        if node.kind == "KSamplerSelect":
            return self._names(stage, self.value(node, "sampler_name", str), None)
        stage.sampler = SAMPLER_NODES[node.kind]
        stage.eta = self.value(node, "eta", float, 1.0)
        if node.kind == "SamplerDPMPP_2M_SDE" and node.inputs.get("solver_type") == "heun":
            stage.sampler = "dpmpp_2m_sde_heun"

    def _scheduler_node(self, stage: SamplerPass, node: Node | None) -> None:
        if node is None:
            raise UserError(f"{stage.node}: its sigmas come from a node that is not read here; give --steps")
        stage.steps = self.value(node, "steps", int)
        stage.denoise = self.value(node, "denoise", float, 1.0)
        if node.kind == "BasicScheduler":
            self._names(stage, None, self.value(node, "scheduler", str))
        elif node.kind == "AlignYourStepsScheduler":
            xl = self.value(node, "model_type", str) == "SDXL"
            stage.spacing = "align_your_steps_xl" if xl else "align_your_steps"
        elif node.kind == "SDTurboScheduler" and stage.steps == 1:
            stage.spacing = "sgm_uniform"  # one level, the highest; of more, these would be others
        else:
            stage.spacing = SCHEDULER_NODES.get(node.kind)
            self._pass(node)  # its own range, and shape, of the levels

    def _names(self, stage: SamplerPass, sampler: str | None, scheduler: str | None) -> None:
        if sampler is not None:
            stage.sampler = sampler_named(sampler) or sampler[:60]
        if scheduler is not None:
            stage.spacing = OWN_SCHEDULES.get(scheduler) or spacing_named(scheduler) or scheduler[:60]

    def _pass(self, node: Node | None) -> None:
        if node is not None:
            self.idle[node.kind[:60]] = None

    # --- its model and its prompts ----------------------------------------------------------------------------------

    def _model(self, stage: SamplerPass, node: Node | None) -> None:
        for one in self.back(node, "model", until=lambda node: node.kind in MODELS):
            if one.kind in MODELS:
                stage.model["model"] = stem(self.value(one, MODELS[one.kind], str))
            elif one.kind in ("LoraLoader", "LoraLoaderModelOnly"):
                if one.inputs.get("lora_name") is None:
                    self.idle[f"{one.kind} without a LoRA"] = None
                    continue
                stage.loras.append((stem(self.value(one, "lora_name", str)), self.value(one, "strength_model", float)))
            elif one.kind == "PerturbedAttentionGuidance":
                stage.model["perturbed"] = self.value(one, "scale", float)
            elif one.kind == "RescaleCFG":
                stage.model["rescale"] = self.value(one, "multiplier", float)
            elif one.kind == "ModelSamplingDiscrete" and one.inputs.get("sampling") in PREDICTION_WORDS:
                stage.model["prediction"] = PREDICTION_WORDS[one.inputs["sampling"]]
                stage.model["zero_snr"] = bool(one.inputs.get("zsnr"))
            else:
                self._pass(one)
        stage.loras.reverse()

    def _text(self, stage: SamplerPass, node: Node | None, side: str) -> str:
        """A prompt. Two that are concatenated are two chunks here."""
        way = self.back(node, side, "conditioning", "conditioning_1", "conditioning_to", "positive", until=is_text)
        for one in way:
            if one.kind == "ConditioningConcat":
                after = self.back(self.next(one, "conditioning_from"), "conditioning", until=is_text)
                if after and is_text(after[-1]) and is_text(way[-1]):
                    return f"{self._encoded(stage, way[-1])} BREAK {self._encoded(stage, after[-1])}"
            if not is_text(one):
                self._pass(one)
        if way and is_text(way[-1]):
            return self._encoded(stage, way[-1])
        if side == "positive":
            origin = way[-1] if way else stage.node
            raise UserError(f"{origin}: its prompt is none of CLIPTextEncode's; only those are read")
        return ""

    def _encoded(self, stage: SamplerPass, node: Node) -> str:
        layers = []
        for one in self.back(self.next(node, "clip"), "clip", until=lambda node: node.kind in MODELS):
            if one.kind == "CLIPSetLastLayer":
                layers.append(-self.value(one, "stop_at_clip_layer", int))
            elif one.kind in ("CLIPLoader", "DualCLIPLoader") and one.inputs.get("type") not in CLIP_TYPES:
                raise UserError(f"{one}: its text encoder is not that of Stable Diffusion 1, 2 or XL; these are read")
        if layers:
            stage.model["clip_skip"] = layers[0]  # the last one on the way counts
        if node.kind != "CLIPTextEncodeSDXL":
            return self._worded(stage, self.value(node, "text", str))
        large, small = (self.value(node, name, str) for name in ("text_g", "text_l"))
        if small not in ("", large):
            self.idle["CLIPTextEncodeSDXL's text_l"] = None
        return self._worded(stage, large or small)

    def _worded(self, stage: SamplerPass, text: str) -> str:
        """ComfyUI calls a learned word by its file, "embedding:kitty.pt"; here it is a word."""
        stage.words += [stem(name) for name in LEARNED_WORD.findall(text)]
        return LEARNED_WORD.sub(lambda found: stem(found[1]), text)


SAMPLING_NODES: dict[str, Callable[[GraphReader, SamplerPass], None]] = {
    "KSampler": GraphReader.ksampler, "KSamplerAdvanced": GraphReader.ksampler_advanced,
    "SamplerCustom": GraphReader.sampler_custom,
    "SamplerCustomAdvanced": GraphReader.sampler_custom,
}  # fmt: skip
PREDICTION_WORDS = {"eps": "epsilon", "v_prediction": "v_prediction"}


def is_text(node: Node) -> bool:
    return node.kind in ("CLIPTextEncode", "CLIPTextEncodeSDXL", "CLIPTextEncodeSDXLRefiner")


def stem(name: str) -> str:
    """A file's name as ComfyUI has it, with its folders, of either system -> the name alone."""
    return re.sub(r"\.(safetensors|sft|ckpt|pt|pth|bin)$", "", re.split(r"[/\\]", name)[-1])


def tag(name: str, strength: float) -> str:
    return f" <lora:{name}:{plain_number(strength)}>"
