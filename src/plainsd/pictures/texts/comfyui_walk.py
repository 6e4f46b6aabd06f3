"""A walk through the nodes of a ComfyUI workflow, back along its links, and the values that stand on the way."""

import math
import re
from collections.abc import Callable
from typing import TypeVar

from plainsd.errors import UserError
from plainsd.pictures.texts.comfyui_graph import Graph, Node, value_held

LONGEST_WAY = 1000  # nodes, one behind the other
MODELS = {"CheckpointLoaderSimple": "ckpt_name", "CheckpointLoader": "ckpt_name",
          "unCLIPCheckpointLoader": "ckpt_name", "UNETLoader": "unet_name"}  # fmt: skip
Type = TypeVar("Type", int, float, str)


class GraphWalk:
    """Remembers the nodes that have no meaning here."""

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
            value = value_held(holder)
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

    def pass_by(self, node: Node | None) -> None:
        if node is not None:
            self.idle[node.kind[:60]] = None


def stem(name: str) -> str:
    """A file's name as ComfyUI has it, with its folders, of either system -> the name alone."""
    return re.sub(r"\.(safetensors|sft|ckpt|pt|pth|bin)$", "", re.split(r"[/\\]", name)[-1])
