"""ComfyUI's workflows, in either of the two forms in which it writes them, as a graph of nodes with named inputs.

The API's form is that already, and what ran: {"3": {"class_type": "KSampler", "inputs": {"seed": 5, "model": ["4", 0],
...}}}; a list of two is a link, to an output of another node. The editor's form lists nodes, with the values of their
widgets in the order of the screen, and links apart; parts of it may be folded into subgraphs, muted or bypassed. A
subgraph's node has values of its own for what its frame shows, and those count.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from plainsd.errors import UserError
from plainsd.json_reader import BadJSON, parsed_json
from plainsd.pictures.texts.comfyui_graph import Graph, Link, Node, check_nodes, is_slot, link_of, with_chosen
from plainsd.pictures.texts.entries import check_length

LONGEST_WORKFLOW = 2**24  # characters
DEEPEST = 8  # subgraphs in subgraphs
MUTED, BYPASSED = 2, 4
FROM_OUTSIDE, TO_OUTSIDE = -10, -20  # the ends of links that leave a subgraph

# The widgets of the nodes that are understood, in the order of the screen; of others no value is read.
WIDGETS = {
    "KSampler": "seed after steps cfg sampler_name scheduler denoise",
    "KSamplerAdvanced": "add_noise noise_seed after steps cfg sampler_name scheduler start_at_step end_at_step "
    "return_with_leftover_noise",
    "SamplerCustom": "add_noise noise_seed after cfg", "RandomNoise": "noise_seed after",
    "BasicScheduler": "scheduler steps denoise", "KSamplerSelect": "sampler_name", "CFGGuider": "cfg",
    "KarrasScheduler": "steps sigma_max sigma_min rho", "ExponentialScheduler": "steps sigma_max sigma_min",
    "PolyexponentialScheduler": "steps sigma_max sigma_min rho", "SDTurboScheduler": "steps denoise",
    "AlignYourStepsScheduler": "model_type steps denoise", "BetaSamplingScheduler": "steps alpha beta",
    "SamplerEulerAncestral": "eta s_noise", "SamplerDPMPP_2M_SDE": "solver_type eta s_noise noise_device",
    "SamplerDPMPP_SDE": "eta s_noise r noise_device", "SamplerDPMPP_3M_SDE": "eta s_noise noise_device",
    "SamplerDPMPP_2S_Ancestral": "eta s_noise",
    "CheckpointLoaderSimple": "ckpt_name", "CheckpointLoader": "config_name ckpt_name",
    "unCLIPCheckpointLoader": "ckpt_name", "UNETLoader": "unet_name weight_dtype", "VAELoader": "vae_name",
    "LoraLoader": "lora_name strength_model strength_clip", "LoraLoaderModelOnly": "lora_name strength_model",
    "CLIPLoader": "clip_name type device", "DualCLIPLoader": "clip_name1 clip_name2 type device",
    "CLIPTextEncode": "text", "CLIPSetLastLayer": "stop_at_clip_layer",
    "CLIPTextEncodeSDXL": "width height crop_w crop_h target_width target_height text_g text_l",
    "CLIPTextEncodeSDXLRefiner": "ascore width height text",
    "EmptyLatentImage": "width height batch_size", "LatentUpscale": "upscale_method width height crop",
    "LatentUpscaleBy": "upscale_method scale_by", "ImageScale": "upscale_method width height crop",
    "ImageScaleBy": "upscale_method scale_by", "LoadImage": "image upload",
    "UpscaleModelLoader": "model_name",
    "PerturbedAttentionGuidance": "scale", "RescaleCFG": "multiplier", "ModelSamplingDiscrete": "sampling zsnr",
    "PrimitiveNode": "value", "PrimitiveInt": "value", "PrimitiveFloat": "value", "PrimitiveString": "value",
    "PrimitiveStringMultiline": "value", "PrimitiveBoolean": "value", "SeedNode": "seed after",
    "ComfySwitchNode": "switch", "ComfySoftSwitchNode": "switch", "StringConcatenate": "string_a string_b delimiter",
    "ResolutionSelector": "aspect_ratio megapixels multiple minimum",
}  # fmt: skip


def read_graph(text: str) -> Graph:
    """A workflow's JSON, in either form. UserError for anything else."""
    check_length(text, LONGEST_WORKFLOW)
    try:
        whole = parsed_json(text)
    except BadJSON:
        raise UserError("this is not a workflow: its JSON is broken; save it again in ComfyUI") from None
    if isinstance(whole, dict) and isinstance(whole.get("prompt"), dict):
        whole = whole["prompt"]  # as it is sent to ComfyUI's server
    if not isinstance(whole, dict):
        raise UserError("this is not a workflow of ComfyUI; give what its Save or Export (API) writes")
    graph = Editor(whole).graph() if isinstance(whole.get("nodes"), list) else from_api(whole)
    if not graph:
        raise UserError("this is not a workflow of ComfyUI: it has no nodes; give what its Save or Export (API) writes")
    return with_chosen(graph)


def from_api(whole: dict[str, Any]) -> Graph:
    graph: Graph = {}
    for name, one in whole.items():
        if isinstance(one, dict) and isinstance(one.get("class_type"), str) and isinstance(one.get("inputs"), dict):
            inputs = {key: link_of(value) or value for key, value in one["inputs"].items()}
            graph[name] = Node(name, one["class_type"], inputs)
    check_nodes(len(graph))
    return graph


class Fixed(NamedTuple):
    """In place of a link, a value that stands on the frame of a subgraph."""

    value: Any


class Editor:
    """The editor's form. Links of subgraphs and of what is bypassed are followed to the nodes that ran."""

    def __init__(self, whole: dict[str, Any]):
        definitions = whole.get("definitions")
        folded = definitions.get("subgraphs") if isinstance(definitions, dict) else None
        self.subgraphs = {one["id"]: one for one in dicts(folded) if isinstance(one.get("id"), str)}
        self.raw: dict[str, dict[str, Any]] = {}  # each node by its whole name, "7:3" being node 3 of the subgraph 7
        self.ends: dict[tuple[str, Any], tuple[Any, Any]] = {}  # (where, link) -> origin and its output
        self.outputs: dict[tuple[str, int], Any] = {}  # (a subgraph's node, its output) -> the link inside it
        self.firsts: dict[str, dict[str, Any]] = {}  # of a bypassed node: its first link of each type
        self._unfold(whole, "", 0)

    def _unfold(self, part: dict[str, Any], where: str, depth: int) -> None:
        for number, origin, slot, target, place in links_of(part):
            self.ends[where, number] = (origin, slot)
            if target == TO_OUTSIDE and is_slot(place):
                self.outputs[where.removesuffix(":"), place] = number
        for node in dicts(part.get("nodes")):
            name = f"{where}{node.get('id')}"
            self.raw[name] = node
            check_nodes(len(self.raw))
            runs = node.get("mode") not in (MUTED, BYPASSED)
            if runs and depth < DEEPEST and isinstance(node.get("type"), str) and node["type"] in self.subgraphs:
                self._unfold(self.subgraphs[node["type"]], f"{name}:", depth + 1)

    def graph(self) -> Graph:
        return {name: self._node(name, raw) for name, raw in self.raw.items() if raw.get("mode") != MUTED
                and raw.get("mode") != BYPASSED and raw.get("type") not in self.subgraphs}  # fmt: skip

    def _node(self, name: str, raw: dict[str, Any]) -> Node:
        kind = str(raw.get("type"))
        values = raw.get("widgets_values")
        if isinstance(values, dict):
            inputs = dict(values)
        else:
            names = WIDGETS.get(kind, "").split()
            inputs = dict(zip(names, values if isinstance(values, list) else [], strict=False))
        where = name.rpartition(":")[0]
        for one in dicts(raw.get("inputs")):
            found = self._origin(f"{where}:" if where else "", one.get("link"))
            if found is not None:
                inputs[str(one.get("name"))] = found.value if isinstance(found, Fixed) else found
        return Node(name, kind, inputs)

    def _origin(self, where: str, number: Any) -> Link | Fixed | None:
        """The output that a link comes from, through subgraphs, and past nodes that are bypassed."""
        for _ in range(100):
            if not isinstance(number, (int, str)) or (where, number) not in self.ends:
                return None
            origin, slot = self.ends[where, number]
            if origin == FROM_OUTSIDE:
                folder = where.removesuffix(":")
                where, number = f"{folder.rpartition(':')[0]}:".lstrip(":"), self._input(folder, slot)
                if number is None:
                    return self._on_frame(folder, slot)
                continue
            name = f"{where}{origin}"
            raw = self.raw.get(name)
            if raw is None or not is_slot(slot) or raw.get("mode") == MUTED:
                return None
            if raw.get("mode") == BYPASSED:
                number = self._past(name, slot)
            elif (name, slot) in self.outputs:
                where, number = f"{name}:", self.outputs[name, slot]
            else:
                return name, slot
        return None

    def _input(self, name: str, slot: Any) -> Any:
        """The link into a subgraph's node, by its inputs' names where they have any: not all need be listed."""
        raw = self.raw.get(name, {})
        inside = table_at(self.subgraphs.get(str(raw.get("type")), {}).get("inputs"), slot)
        if inside is not None and inside.get("name") is not None:
            one = next((one for one in dicts(raw.get("inputs")) if one.get("name") == inside["name"]), None)
        else:
            one = table_at(raw.get("inputs"), slot)
        return one and one.get("link")

    def _on_frame(self, name: str, slot: Any) -> Fixed | None:
        """The value of this input on a subgraph's node, which lists those of all inputs that lead to a widget."""
        raw = self.raw.get(name, {})
        subgraph, values = self.subgraphs.get(str(raw.get("type")), {}), raw.get("widgets_values")
        inputs = subgraph.get("inputs")
        shown = [place for place in range(len(inputs) if isinstance(inputs, list) else 0)
                 if self._leads_to_widget(subgraph, place)]  # fmt: skip
        if not isinstance(values, list) or len(values) != len(shown) or slot not in shown:
            return None
        value = values[shown.index(slot)]
        return None if value is None else Fixed(value)

    def _leads_to_widget(self, subgraph: dict[str, Any], place: int, depth: int = 0) -> bool:
        targets = {number: target for number, origin, slot, target, _ in links_of(subgraph)
                   if origin == FROM_OUTSIDE and slot == place}  # fmt: skip
        for node in dicts(subgraph.get("nodes")):
            for one in dicts(node.get("inputs")):
                link = one.get("link")
                if isinstance(link, (int, str)) and link in targets and targets[link] == node.get("id"):
                    nested = self.subgraphs.get(str(node.get("type")))
                    if nested is None or depth >= DEEPEST:
                        return isinstance(one.get("widget"), dict)
                    names = [inner.get("name") for inner in dicts(nested.get("inputs"))]
                    if one.get("name") in names:
                        return self._leads_to_widget(nested, names.index(one["name"]), depth + 1)
        return False

    def _past(self, name: str, slot: int) -> Any:
        """Of a bypassed node's inputs, the first of the same type as its output."""
        raw = self.raw[name]
        if name not in self.firsts:
            inputs = reversed([*dicts(raw.get("inputs"))])
            self.firsts[name] = {str(one.get("type")): one.get("link") for one in inputs}
        one = table_at(raw.get("outputs"), slot)
        return one and self.firsts[name].get(str(one.get("type")))


def links_of(part: dict[str, Any]) -> Iterator[tuple[Any, Any, Any, Any, Any]]:
    """A part's links, in either form: number, origin and its output, target and its input."""
    links = part.get("links")
    for link in links if isinstance(links, list) else []:
        if isinstance(link, list) and len(link) >= 5:
            ends = link[:5]
        elif isinstance(link, dict):
            ends = [link.get(name) for name in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]
        else:
            continue
        if all(isinstance(one, (int, str)) for one in ends):
            yield tuple(ends)


def table_at(values: Any, place: Any) -> dict[str, Any] | None:
    """Of a list the table at this place."""
    there = isinstance(values, list) and is_slot(place) and 0 <= place < len(values)
    return values[place] if there and isinstance(values[place], dict) else None


def dicts(value: Any) -> Iterator[dict[str, Any]]:
    return (one for one in value if isinstance(one, dict)) if isinstance(value, list) else iter(())
