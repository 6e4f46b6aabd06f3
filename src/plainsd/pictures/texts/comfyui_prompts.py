"""What a ComfyUI workflow says of a pass's texts: prompts, LoRAs and layers of their text encoders, SDXL's sizes."""

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from plainsd.errors import UserError
from plainsd.pictures.settings import plain_number
from plainsd.pictures.texts.comfyui_graph import Node
from plainsd.pictures.texts.comfyui_walk import MODELS, GraphWalk
from plainsd.text.prompts import CONCAT, LORA_TAG, parse_words

XL_TEXT, REFINER_TEXT = "CLIPTextEncodeSDXL", "CLIPTextEncodeSDXLRefiner"
TEXT_NODES = ("CLIPTextEncode", XL_TEXT, REFINER_TEXT)
JOINING = "ConditioningConcat"
ZEROS = "ConditioningZeroOut"  # an encoding of nothing but zeros, whatever the text
CONDITIONING = ("conditioning", "conditioning_1", "conditioning_to", "positive")  # inputs, followed back
MOST_JOINED = 100  # texts in one prompt
CLIP_TYPES = (None, "stable_diffusion", "sdxl")  # types of text encoders that are loaded apart
SCORES = {"positive": 6.0, "negative": 2.5}  # the refiner's, as they are drawn here


class ClipUse(NamedTuple):
    """What a text's encoder is, and went through."""

    loras: dict[str, float]  # strengths other than 0, by the nodes that load them
    skip: int | None  # the layer that is read, counted from the last
    checkpoint: Any  # its file, as its loader says it


@dataclass
class PassTexts:
    """A pass's prompts."""

    prompt: str = ""
    negative: str = ""
    clips: list[ClipUse] = field(default_factory=list)  # of each text, the prompt's first
    words: list[str] = field(default_factory=list)  # learned ones
    nodes: list[tuple[Node, str]] = field(default_factory=list)  # of each text, with its side

    @property
    def clip(self) -> ClipUse:
        return self.clips[0]


def texts_of_pass(walk: GraphWalk, sampler: Node, guider: Node) -> PassTexts:
    """UserError where there is no prompt."""
    texts = PassTexts()
    start = walk.next(guider, "positive", "conditioning")
    texts.prompt = joined_text(walk, texts, start, "positive")
    if not texts.nodes:
        way = walk.back(start, "positive", *CONDITIONING, until=lambda one: False)
        origin = way[-1] if way else sampler
        raise UserError(f"{origin}: its prompt is none of CLIPTextEncode's; only those are read")
    texts.negative = joined_text(walk, texts, walk.next(guider, "negative"), "negative")
    if any(clip != texts.clip for clip in texts.clips):
        walk.idle["LoRAs or layers of one text alone"] = None
    return texts


def joined_text(walk: GraphWalk, texts: PassTexts, start: Node | None, side: str) -> str:
    """The texts whose encodings are joined, in order, with CONCAT between them; usually one."""
    found: list[str] = []
    left: list[tuple[Node | None, Node | None]] = [(start, None)]  # where a text comes from, and what joins it
    for _ in range(2 * MOST_JOINED):
        if not left:
            return CONCAT.join(found)
        node, joining = left.pop()
        way = walk.back(node, side, *CONDITIONING, until=lambda one: one.kind in (*TEXT_NODES, JOINING, ZEROS))
        end = way[-1] if way else None
        for one in way:
            if one.kind not in (*TEXT_NODES, JOINING):
                walk.pass_by(one)
        if end is not None and end.kind == JOINING:
            left += [(walk.next(end, name), end) for name in ("conditioning_from", "conditioning_to")]
        elif end is not None and end.kind == ZEROS:
            found.append("")
        elif end is not None and end.kind in TEXT_NODES:
            found.append(encoded_text(walk, texts, end, side))
        else:
            walk.pass_by(joining)
    raise UserError(f"{start}: more than {MOST_JOINED} texts are joined; join fewer")


def encoded_text(walk: GraphWalk, texts: PassTexts, node: Node, side: str) -> str:
    texts.clips.append(clip_use(walk, node))
    texts.nodes.append((node, side))
    if node.kind == XL_TEXT:
        large, small = (walk.value(node, name, str) for name in ("text_g", "text_l"))
        if small != large:
            walk.idle[f"{node.kind}'s text_{'l' if large else 'g'}"] = None
        text = large or small
    else:
        text = walk.value(node, "text", str)
    for sign in LORA_TAG.search(text), re.search(CONCAT.strip(), text):
        if sign:  # here it will not be
            walk.idle[f"{sign[0][:60]} as a text"] = None
    texts.words += [piece.text for piece in parse_words(text) if piece.learned]
    return text


def clip_use(walk: GraphWalk, node: Node) -> ClipUse:
    loras, skip, checkpoint = {}, None, None
    for one in walk.back(walk.next(node, "clip"), "clip", until=lambda one: one.kind in MODELS):
        if one.kind in MODELS:
            checkpoint = one.inputs.get(MODELS[one.kind])
        elif one.kind == "CLIPSetLastLayer":
            skip = -walk.value(one, "stop_at_clip_layer", int) if skip is None else skip  # the one behind counts
        elif one.kind == "LoraLoader":
            if one.inputs.get("lora_name") is not None and (strength := walk.value(one, "strength_clip", float)):
                loras[one.name] = strength
        elif one.kind in ("CLIPLoader", "DualCLIPLoader") and one.inputs.get("type") not in CLIP_TYPES:
            raise UserError(f"{one}: its text encoder is not that of Stable Diffusion 1, 2 or XL; these are read")
        else:
            walk.pass_by(one)
    if skip == 1:  # of SD 1 the layer that is read anyway
        walk.idle["CLIPSetLastLayer -1 of SD 2 and SDXL"] = None
    return ClipUse(loras, skip, checkpoint)


def note_sizes(walk: GraphWalk, texts: PassTexts, size: tuple[int, int] | None) -> None:
    """Names the sizes, crops and scores in SDXL's text nodes that differ from what is drawn: the size of the latents,
    where it is known, no crop, SCORES."""
    width, height = size or (None, None)
    drawn = {"width": width, "height": height, "crop_w": 0, "crop_h": 0, "target_width": width,
             "target_height": height}  # fmt: skip
    for node, side in texts.nodes:
        for name, ours in (drawn | {"ascore": SCORES[side]}).items():
            if node.kind in (XL_TEXT, REFINER_TEXT):
                note_other(walk, node, name, ours)


def note_other(walk: GraphWalk, node: Node, name: str, ours: float | None) -> None:
    """Names an input whose value is there, and not ours."""
    theirs = number_in(walk, node, name)
    if name in node.inputs and (theirs is None or theirs != ours):
        said = "" if theirs is None else f" {plain_number(theirs)}"
        walk.idle[f"{node.kind}'s {name}{said}"] = None


def number_in(walk: GraphWalk, node: Node, name: str) -> float | None:
    """None where it comes from a node that is not read here."""
    try:
        return walk.value(node, name, float)
    except UserError:
        return None
