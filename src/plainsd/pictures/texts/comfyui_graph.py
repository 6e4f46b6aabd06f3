"""A ComfyUI workflow as a graph: nodes with named inputs, which are values or links to outputs of other nodes.

Nodes that only choose or compute a value (a switch, two texts joined, a size from a ratio) are settled at once, so that
a walk along the links meets none of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from plainsd.errors import UserError

NODES = 10_000
LONGEST_ROW = 100  # nodes that choose or compute, one behind the other
RATIOS = {"1:1": (1, 1), "3:2": (3, 2), "4:3": (4, 3), "16:9": (16, 9), "21:9": (21, 9), "2:3": (2, 3), "3:4": (3, 4),
          "9:16": (9, 16)}  # fmt: skip
LONGEST_JOINED = 2**20  # characters
VALUE = ("value", "seed", "text", "string", "int", "float", "Value", "Text", "String")  # of nodes that only hold one


@dataclass
class Node:
    name: str
    kind: str
    inputs: dict[str, Any] = field(default_factory=dict)  # values, and links as (name of a node, its output)

    def __str__(self) -> str:
        return f"node {self.name} ({self.kind})"


Graph = dict[str, Node]
Link = tuple[str, int]


def link_of(value: Any) -> Link | None:
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], (str, int)) and is_slot(value[1]):
        return str(value[0]), value[1]
    return None


def is_slot(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_nodes(count: int) -> None:
    if count > NODES:
        raise UserError(f"a workflow of {count} nodes is too large; {NODES} are the most that is read")


# --- nodes that choose or compute ------------------------------------------------------------------------------------


def with_chosen(graph: Graph) -> Graph:
    """The graph with each input that comes from such a node replaced by what that node hands on: a value, or a link.
    Where its own inputs are not known, the link to it stays."""
    settling = Settling(graph)
    return {name: Node(name, node.kind, {key: settling.behind(value) for key, value in node.inputs.items()})
            for name, node in graph.items()}  # fmt: skip


class Settling:
    def __init__(self, graph: Graph):
        self.graph, self.depth = graph, 0
        self.known: dict[Link, Any] = {}  # what such nodes hand on, by their outputs

    def behind(self, value: Any) -> Any:
        """What an input's value stands for: another link, a value, or itself."""
        node = self.graph.get(value[0]) if isinstance(value, tuple) else None
        if node is None or node.kind not in CHOOSING or self.depth > LONGEST_ROW:
            return value
        if value not in self.known:
            self.known[value] = value  # where a circle comes back to
            self.depth += 1
            found = CHOOSING[node.kind](self, node, value[1])
            self.depth -= 1
            self.known[value] = value if found is None else found
        return self.known[value]

    def held(self, node: Node, name: str) -> Any:
        """An input's value, also through nodes that only hold one; None where it is not known."""
        value, seen = self.behind(node.inputs.get(name)), set()
        while isinstance(value, tuple):
            if value in seen or value[0] not in self.graph:
                return None
            seen.add(value)
            value = self.behind(value_held(self.graph[value[0]]))
        return value

    def chosen(self, node: Node, slot: int) -> Any:
        """Of a switch whose one side is empty, the other."""
        switch = self.held(node, "switch")
        names = ("on_true", "on_false") if switch else ("on_false", "on_true")
        sides = (self.behind(node.inputs[name]) for name in names if node.inputs.get(name) is not None)
        return next(sides, None) if isinstance(switch, bool) else None

    def shown(self, node: Node, slot: int) -> Any:
        """A text that is shown on its way; a number shown is a text only there."""
        text = self.held(node, "source")
        return text if isinstance(text, str) else None

    def joined(self, node: Node, slot: int) -> Any:
        first, second = self.held(node, "string_a"), self.held(node, "string_b")
        between = self.held(node, "delimiter") if "delimiter" in node.inputs else ""
        if not all(isinstance(one, str) and len(one) <= LONGEST_JOINED for one in (first, second, between)):
            return None
        return f"{first}{between}{second}"

    def side(self, node: Node, slot: int) -> Any:
        """Width and height of so many pixels in a ratio (ComfyUI's nodes_resolution.py)."""
        ratio, megapixels = self.held(node, "aspect_ratio"), self.held(node, "megapixels")
        multiple, least = self.held(node, "multiple") or 8, self.held(node, "minimum") or 0
        numbers = all(is_slot(one) or isinstance(one, float) for one in (megapixels, multiple, least))
        sides = RATIOS.get(str(ratio).partition(" ")[0])
        if not numbers or sides is None or slot not in (0, 1) or not (0 < megapixels <= 100 and 0 < multiple <= 4096):
            return None
        scale = math.sqrt(megapixels * 1024 * 1024 / math.prod(sides))
        found = [round(side * scale / multiple) * multiple for side in sides]
        return found[slot] if min(found) >= least else None


def value_held(node: Node) -> Any:
    """Of a node that only holds a value."""
    return next((node.inputs[key] for key in VALUE if key in node.inputs), None)


CHOOSING: dict[str, Callable[[Settling, Node, int], Any]] = {
    "ComfySwitchNode": Settling.chosen, "ComfySoftSwitchNode": Settling.chosen, "PreviewAny": Settling.shown,
    "StringConcatenate": Settling.joined, "ResolutionSelector": Settling.side,
}  # fmt: skip
