"""What ComfyUI's nodes say of one pass: from a sampler's node back to its numbers, prompts, model and latents."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from plainsd.errors import UserError
from plainsd.pictures.texts.comfyui_graph import Node
from plainsd.pictures.texts.comfyui_prompts import PassTexts, note_other, texts_of_pass
from plainsd.pictures.texts.comfyui_walk import MODELS, GraphWalk, stem
from plainsd.pictures.texts.labels import sampler_named, spacing_named
from plainsd.text.prompts import LoraTag

LORA_LOADERS = ("LoraLoader", "LoraLoaderModelOnly")
SAMPLING = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
SAMPLER_NODES = {"SamplerEulerAncestral": "euler_a", "SamplerDPMPP_SDE": "dpmpp_sde",
                 "SamplerDPMPP_2S_Ancestral": "dpmpp_2s_a", "SamplerDPMPP_2M_SDE": "dpmpp_2m_sde",
                 "SamplerDPMPP_3M_SDE": "dpmpp_3m_sde"}  # fmt: skip
NOISE_OPTIONS = {"s_noise": 1.0, "r": 0.5}  # of these, as they are drawn here
SCHEDULER_NODES = {"KarrasScheduler": "karras", "ExponentialScheduler": "exponential",
                   "PolyexponentialScheduler": "polyexponential", "BetaSamplingScheduler": "beta"}  # fmt: skip
OWN_SCHEDULES = {
    "beta": "beta",
    "kl_optimal": "kl_optimal",
    "ddim_uniform": "ddim_uniform",
}  # not A1111's of these names


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
    texts: PassTexts = field(default_factory=PassTexts)
    checkpoint: Any = None  # the file of its model, as its loader says it
    model: dict[str, Any] = field(default_factory=dict)  # fields of Settings that its loaders and patches say
    loras: list[LoraTag] = field(default_factory=list)
    latent: Node | None = None  # where its latents come from


class GraphReader(GraphWalk):
    """A walk that reads passes."""

    def stage(self, node: Node) -> SamplerPass:
        stage = SamplerPass(node)
        SAMPLING_NODES[node.kind](self, stage)
        guider = self.next(node, "guider") or node
        strengths = self._model(stage, self.next(guider, "model"))
        stage.texts = texts_of_pass(self, node, guider)
        clip = stage.texts.clip
        stage.loras = self._loras(strengths, clip.loras)
        if clip.skip is not None:
            stage.model["clip_skip"] = clip.skip
        if None not in (clip.checkpoint, stage.checkpoint) and clip.checkpoint != stage.checkpoint:
            self.idle["the text encoder of another checkpoint"] = None
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
                self.pass_by(noise)
            if guider is not None and guider.kind == "CFGGuider":
                stage.guidance = self.value(guider, "cfg", float)
            elif guider is not None and guider.kind == "BasicGuider":
                stage.guidance = 1.0
            else:
                self.pass_by(guider)
        self._sampler_node(stage, self.next(node, "sampler"))
        self._scheduler_node(stage, self.next(node, "sigmas"))

    def _sampler_node(self, stage: SamplerPass, node: Node | None) -> None:
        if node is None or (node.kind != "KSamplerSelect" and node.kind not in SAMPLER_NODES):
            raise UserError(f"{node or stage.node}: this sampler is not read here; choose one with --sampler")
        if node.kind == "KSamplerSelect":
            return self._names(stage, self.value(node, "sampler_name", str), None)
        stage.sampler = SAMPLER_NODES[node.kind]
        stage.eta = self.value(node, "eta", float, 1.0)
        for name, ours in NOISE_OPTIONS.items():
            note_other(self, node, name, ours)
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
            self.pass_by(node)  # its own range, and shape, of the levels

    def _names(self, stage: SamplerPass, sampler: str | None, scheduler: str | None) -> None:
        if sampler is not None:
            stage.sampler = sampler_named(sampler) or sampler[:60]
        if scheduler is not None:
            stage.spacing = OWN_SCHEDULES.get(scheduler) or spacing_named(scheduler) or scheduler[:60]

    # --- its model ----------------------------------------------------------------------------------------------------

    def _model(self, stage: SamplerPass, node: Node | None) -> dict[str, float]:
        """Reads its loaders and patches; returns the strengths of LoRAs on the UNet, by their nodes."""
        strengths: dict[str, float] = {}
        for one in reversed(self.back(node, "model", until=lambda node: node.kind in MODELS)):
            if one.kind in MODELS:
                stage.checkpoint = one.inputs.get(MODELS[one.kind])
                stage.model["model"] = stem(self.value(one, MODELS[one.kind], str))
            elif one.kind in LORA_LOADERS:
                if one.inputs.get("lora_name") is None:
                    self.idle[f"{one.kind} without a LoRA"] = None
                    continue
                strengths[one.name] = self.value(one, "strength_model", float)
            elif one.kind == "PerturbedAttentionGuidance":
                stage.model["perturbed"] = self.value(one, "scale", float)
            elif one.kind == "RescaleCFG":
                stage.model["rescale"] = self.value(one, "multiplier", float)
            elif one.kind == "ModelSamplingDiscrete" and one.inputs.get("sampling") in PREDICTION_WORDS:
                stage.model["prediction"] = PREDICTION_WORDS[one.inputs["sampling"]]
                stage.model["zero_snr"] = bool(one.inputs.get("zsnr"))
            else:
                self.pass_by(one)
        return strengths

    def _loras(self, unet: dict[str, float], text: dict[str, float]) -> list[LoraTag]:
        """The LoRAs on the way to the UNet and to the text encoders. One that is loaded twice adds up."""
        sums: dict[str, list[float]] = {}
        for name in {**unet, **text}:
            both = sums.setdefault(stem(self.value(self.graph[name], "lora_name", str)), [0.0, 0.0])
            both[0] += unet.get(name, 0.0)
            both[1] += text.get(name, 0.0)
        return [LoraTag(name, *both) for name, both in sums.items() if any(both)]


SAMPLING_NODES: dict[str, Callable[[GraphReader, SamplerPass], None]] = {
    "KSampler": GraphReader.ksampler, "KSamplerAdvanced": GraphReader.ksampler_advanced,
    "SamplerCustom": GraphReader.sampler_custom,
    "SamplerCustomAdvanced": GraphReader.sampler_custom,
}  # fmt: skip
PREDICTION_WORDS = {"eps": "epsilon", "v_prediction": "v_prediction", "x0": "sample"}
