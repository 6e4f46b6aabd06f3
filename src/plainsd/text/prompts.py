"""A1111's prompt syntax, parsed into plain data. No tokens, no tensors.

    (a) ((a)) (a:1.3) [a]     weight times 1.1, 1.21, 1.3, 1/1.1
    \\( \\) \\[ \\] \\\\           the character itself, as \\{ \\} \\|; any other backslash is a backslash
    a BREAK b                 b starts a new chunk of 75 tokens
    [a:b:0.5] [a:b:10]        prompt editing: a until half of the steps (or until step 10), then b
    [b:0.5] [a::0.5]          b from then on; a until then
    [a|b|c]                   alternation: the next one at each step
    a AND b:1.2               composition: each is denoised separately, with its weight
    <lora:name:0.8>           a LoRA with its strength
    <lora:name:0.5:0.8>       0.5 on the text encoders, 0.8 on the UNet; also <lora:name:te=0.5:unet=0.8>

The order of parsing is `tagged_loras`, `compose`, `schedule`, then `parse` for each resulting text. Unbalanced brackets
are handled as in A1111: an unclosed edit or alternation is plain text, an unclosed opening bracket still weights what
follows it, a stray closing one is plain text. A few quirks of A1111 are not reproduced: it drops a lone backslash,
treats BREAK inside weighted brackets as a word, may fail to parse an edit next to a stray bracket or `|`, and reads a
prompt that ends in `:2` as an AND of one part.

Reading takes time in proportion to the prompt's length. Brackets may stand inside each other, DEEPEST_BRACKET at once.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from plainsd.errors import UserError

DEEPEST_BRACKET = 64  # brackets open at once
MOST_WEIGHT = 1e4  # weights below this
NUMBER = r"[+-]?(?:\d++(?:\.\d*+)?|\.\d++)"  # no digit is looked at twice
PIECES = re.compile(rf"\\[()\[\]{{}}|\\]|:\s*({NUMBER})\s*\)|[()\[\]:\\]|[^()\[\]:\\]+")
SIGNS = re.compile(r"\\.|[()\[\]:|\\]|[^()\[\]:|\\]+", re.DOTALL)
ALONE = re.compile(rf"\s*({NUMBER}(?:[eE][+-]?\d+)?)\s*")
LORA_TAG = re.compile(r"<(lora|lyco|hypernet):([^<>]*)>")
LORA_STRENGTHS = ("te", "unet")  # in A1111's order
CONCAT = " <concat> "  # joins the encodings of two texts, as ComfyUI's ConditioningConcat
LEARNED_WORD = "embedding:"  # ComfyUI's, before the name of a learned word
WORD_ENDING = re.compile(r"\.(safetensors|pt|bin)$")
ROUND, SQUARE = 1.1, 1 / 1.1  # weight of a pair of brackets


@dataclass(frozen=True)
class Weighted:
    """A stretch of text and the weight of its tokens."""

    text: str
    weight: float = 1.0
    learned: bool = False  # the name of a learned word, which is left out if there is none


BREAK = Weighted("BREAK", 0.0)  # compared by `is`


@dataclass(frozen=True)
class Edit:
    """`before` up to step `when`, or that share of all steps; `after` from the next step on."""

    before: tuple
    after: tuple
    when: str


@dataclass(frozen=True)
class Alternate:
    options: tuple


def parse(prompt: str) -> list[Weighted]:
    """Pieces of text with their weights, and `BREAK` between chunks; neighbours of equal weight are joined."""
    pieces: list[tuple[str, float] | None] = []  # None is a BREAK
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where in `pieces` each open bracket starts

    def close(start: int, factor: float) -> None:
        pieces[start:] = [piece and (piece[0], piece[1] * factor) for piece in pieces[start:]]

    for match in PIECES.finditer(prompt):
        sign = match[0]
        if len(sign) == 2 and sign[0] == "\\":
            pieces.append((sign[1], 1.0))
        elif sign in opened:
            opened[sign].append(len(pieces))
            check_brackets(sum(map(len, opened.values())))
        elif opened["("] and match[1]:
            close(opened["("].pop(), float(match[1]))
        elif opened["("] and sign == ")":
            close(opened["("].pop(), ROUND)
        elif opened["["] and sign == "]":
            close(opened["["].pop(), SQUARE)
        else:
            for index, text in enumerate(_between_breaks(sign)):
                pieces += [None, (text, 1.0)] if index else [(text, 1.0)]
    for start in opened["("]:
        close(start, ROUND)
    for start in opened["["]:
        close(start, SQUARE)
    return _joined(pieces)


def check_brackets(count: int) -> None:
    """UserError for more than DEEPEST_BRACKET brackets open at once."""
    if count > DEEPEST_BRACKET:
        raise UserError(
            f"the prompt has more than {DEEPEST_BRACKET} brackets inside each other; write fewer", field="prompt"
        )


def _between_breaks(text: str) -> list[str]:
    """The parts of a text before and behind each word BREAK, without the blanks around that."""
    first, *others = re.split(r"\bBREAK\b", text)
    if not others:
        return [first]
    return [first.rstrip(), *(part.strip() for part in others[:-1]), others[-1].lstrip()]


def parse_words(prompt: str) -> list[Weighted]:
    """ComfyUI's notation: (a) weighs 1.1 times what is around it, (a:1.3) 1.3 whatever is around it; brackets behind a
    backslash are text, and so is all else, [a], BREAK and AND too; `embedding:name` is the learned word of this name.

    CONCAT stands between texts that ComfyUI's ConditioningConcat joins: there is a `BREAK` in its place.
    """
    pieces: list[Weighted] = []
    for number, text in enumerate(re.split(f" ?{CONCAT.strip()} ?", prompt)):
        pieces += [BREAK] if number else []
        hidden = text.replace(r"\)", "\0\1").replace(r"\(", "\0\2")
        for part, weight in _inner_weights(hidden, 1.0):
            pieces += _words_apart(part.replace("\0\1", ")").replace("\0\2", "("), weight)
    return pieces or [Weighted("")]


def _words_apart(text: str, weight: float) -> list[Weighted]:
    """A text's learned words, and what is around them. ComfyUI calls a word by its file, up to a blank, with or without
    folder and ending (comfy/sd1_clip.py, 0.8)."""
    first, *behind = re.split(rf"[ \n]{LEARNED_WORD}", f" {text}" if text.startswith(LEARNED_WORD) else text)
    pieces = [Weighted(first, weight)]
    for part in behind:
        called, *rest = part.split(maxsplit=1) or [""]
        name = called.rstrip(",")
        word = WORD_ENDING.sub("", re.split(r"[/\\]", name)[-1])
        pieces += [
            Weighted(word, weight, learned=True),
            Weighted(" ".join([called[len(name) :], *rest]).strip(), weight),
        ]
    return [piece for piece in pieces if piece.text]


def _inner_weights(text: str, weight: float, depth: int = 0) -> list[tuple[str, float]]:
    """The stretches of a text outside and, recursively, inside its outermost brackets. One that is not closed is
    text."""
    check_brackets(depth)
    found: list[tuple[str, float]] = []
    for part in _outermost(text):
        if not (len(part) > 1 and part[0] == "(" and part[-1] == ")"):
            found.append((part, weight))
            continue
        inner, own = part[1:-1], weight * ROUND
        before, colon, number = inner.rpartition(":")
        if before:
            try:
                inner, own = before, float(number)
            except ValueError:
                pass
        found += _inner_weights(inner, own, depth + 1)
    return found


def _outermost(text: str) -> list[str]:
    """A text cut before and behind each outermost pair of brackets; what is closed too often opens no pair."""
    parts, depth, start = [], 0, 0
    for place, sign in enumerate(text):
        if sign == "(":
            if depth == 0 and place > start:
                parts.append(text[start:place])
                start = place
            depth += 1
        elif sign == ")":
            depth -= 1
            if depth == 0:
                parts.append(text[start : place + 1])
                start = place + 1
    return [*parts, text[start:]] if start < len(text) else parts


def _joined(pieces: Sequence[tuple[str, float] | None]) -> list[Weighted]:
    result: list[Weighted] = []
    written = (piece for piece in pieces if piece is None or piece[0])
    for weight, alike in groupby(written, lambda piece: None if piece is None else piece[1]):
        if weight is None:
            result += [BREAK for _ in alike]
        else:
            result.append(Weighted("".join(piece[0] for piece in alike if piece), weight))
    return result or [Weighted("")]


def without_comments(prompt: str) -> str:
    """A prompt without A1111's comments: from each # to the end of its line; a line with nothing else goes too."""
    return re.sub(r"(?m)^#.*\n?|#.*", "", prompt)


def escape(text: str) -> str:
    """The prompt that means this text literally (apart from BREAK and AND)."""
    return re.sub(r"([()\[\]\\])", r"\\\1", text)


def schedule(prompt: str, steps: int, first_pass: int | None = None) -> list[tuple[int, str]]:
    """The text of each span of steps, as (last step of the span, counted from 1; text), with editing and alternation
    resolved.

    A number with a decimal point is a share of `steps`, one without is a step. In the second of two passes,
    `first_pass` is the number of steps of the first: its steps and the share 1.0 are then already past.
    """
    tree = _tree(prompt)
    if all(isinstance(node, str) for node in tree):
        return [(steps, prompt)]
    texts = [_at(tree, step, steps, first_pass) for step in range(1, steps + 1)]
    last = [step for step in range(1, steps) if texts[step] != texts[step - 1]]
    return [(step, texts[step - 1]) for step in [*last, steps]]


def alternates(prompt: str) -> bool:
    """Whether some of it is another one each step."""

    def found(tree: Sequence) -> bool:
        return any(
            isinstance(node, Alternate) or (isinstance(node, Edit) and (found(node.before) or found(node.after)))
            for node in tree
        )

    return found(_tree(prompt))


def _at(tree: Sequence, step: int, steps: int, first_pass: int | None) -> str:
    texts = []
    for node in tree:
        if isinstance(node, Edit):
            done = step > _last_step(node.when, steps, first_pass)
            node = _at(node.after if done else node.before, step, steps, first_pass)
        elif isinstance(node, Alternate):
            node = _at(node.options[(step - 1) % len(node.options)], step, steps, first_pass)
        texts.append(node)
    return "".join(texts)


def _last_step(when: str, steps: int, first_pass: int | None) -> int:
    """The last step, counted from 1, before an edit; shares of the steps are rounded down."""
    value = float(when)
    if "." in when:
        value = (value - (first_pass is not None)) * steps
    else:
        value -= first_pass or 0
    return int(max(0, min(steps, value)))


class _Group:
    """An open bracket: its parts, and the `:` and `|` between them."""

    def __init__(self, bracket: str = ""):
        self.bracket = bracket
        self.separators: list[str] = []
        self.parts: list[list] = [[]]

    def literal(self) -> list:
        nodes = [self.bracket, *self.parts[0]]
        for separator, part in zip(self.separators, self.parts[1:], strict=True):
            nodes += [separator, *part]
        return nodes

    def closed(self) -> list | None:
        """What the closed group means; None where it is no edit or alternation."""
        if not self.separators or (self.bracket == "(" and self.separators == [":"]):
            return [*self.literal(), PAIRS[self.bracket]]  # a weight: left to `parse`
        if self.bracket == "[" and set(self.separators) == {"|"}:
            return [Alternate(tuple(map(tuple, self.parts)))]
        *texts, when = self.parts
        if self.bracket == "[" and self.separators in ([":"], [":", ":"]) and all(isinstance(one, str) for one in when):
            if number := ALONE.fullmatch("".join(when)):
                before = texts[0] if len(texts) == 2 else ()
                return [Edit(tuple(before), tuple(texts[-1]), number[1])]
        return None


PAIRS = {"(": ")", "[": "]"}


def _tree(prompt: str) -> list:
    """Strings, `Edit`s and `Alternate`s in order. Unclosed groups are plain text."""
    stack = [_Group()]

    def give_up() -> None:
        while len(stack) > 1:
            inner = stack.pop()
            stack[-1].parts[-1] += inner.literal()

    for sign in SIGNS.findall(prompt):
        top = stack[-1]
        if sign in PAIRS:
            check_brackets(len(stack))
            stack.append(_Group(sign))
        elif sign in (":", "|") and top.bracket:
            top.separators.append(sign)
            top.parts.append([])
        elif sign in PAIRS.values():
            nodes = top.closed() if PAIRS.get(top.bracket) == sign else None
            if nodes is None:
                give_up()
                nodes = [sign]
            else:
                stack.pop()
            stack[-1].parts[-1] += nodes
        else:
            top.parts[-1].append(sign)
    give_up()
    return stack[0].parts[0]


def compose(prompt: str) -> list[tuple[str, float]]:
    """The prompts that `AND` joins, each with its weight: `a AND b:1.2` (Liu et al. 2022, arXiv:2206.01714).

    A prompt without AND is one prompt of weight 1, whatever it ends with.
    """
    texts = re.split(r"\bAND\b", prompt)
    if len(texts) == 1:
        return [(prompt, 1.0)]
    parts = []
    for text in texts:
        before, _, behind = text.rpartition(":")
        weight = behind.strip()
        parts.append((before.strip(), float(weight)) if re.fullmatch(NUMBER, weight) else (text.strip(), 1.0))
        check_weight(parts[-1][1], parts[-1][0])
    return parts


def check_weight(weight: float, text: str) -> None:
    """UserError for a weight of MOST_WEIGHT and more, infinity and NaN included."""
    if not abs(weight) < MOST_WEIGHT:
        what = f"the weight {weight:g} of {text[:60]!r} is out of bounds"
        raise UserError(f"{what}; most are between 0 and 2", field="prompt", value=weight)


class LoraTag(NamedTuple):
    """A LoRA as a prompt names it."""

    name: str
    strength: float = 1.0  # on the UNet
    text_strength: float = 1.0  # on the text encoders

    def __str__(self) -> str:
        """The tag, with one strength where both are equal."""
        both = [self.text_strength, self.strength][self.strength == self.text_strength :]
        return f"<lora:{':'.join([self.name, *(repr(float(one)).removesuffix('.0') for one in both)])}>"


def tagged_loras(prompt: str) -> tuple[str, list[LoraTag]]:
    """The prompt without its LoRA tags, and the LoRAs that they name."""
    return LORA_TAG.sub("", prompt), [_read_tag(*found) for found in LORA_TAG.findall(prompt)]


def _read_tag(kind: str, content: str) -> LoraTag:
    """A1111's order: the text encoders' strength, then the UNet's, by default the same; `te=` and `unet=` name them
    (extensions-builtin/Lora/extra_networks_lora.py, 1.10.1)."""
    if kind == "hypernet":
        raise UserError(
            f"<hypernet:{content}>: hypernetworks are not supported; remove the tag from the prompt", field="prompt"
        )
    name, *parts = (part.strip() for part in content.split(":"))
    found: dict[str, float] = {}
    unnamed = iter(LORA_STRENGTHS)
    for part in parts:
        key, named, number = part.rpartition("=")
        key = key.strip() if named else next(unnamed, "")
        if key not in LORA_STRENGTHS or key in found or not ALONE.fullmatch(number):
            raise UserError(
                f"<{kind}:{content}> is not a LoRA with one strength or two ({part!r}); write it as <lora:name:0.8>, "
                "or for text encoders and UNet as <lora:name:0.5:0.8>",
                field="prompt",
            )
        found[key] = float(number)
        if not abs(found[key]) < MOST_WEIGHT:
            raise UserError(f"LoRA strength {found[key]:g} is out of bounds; most are between 0 and 1", field="prompt")
    if not name:
        raise UserError(f"<{kind}:{content}> names no LoRA; write it as <lora:name:0.8>", field="prompt")
    text_strength = found.get("te", 1.0)
    return LoraTag(name, found.get("unet", text_strength), text_strength)
