"""Prompts with choices in them, in the notation of the dynamicprompts library, which A1111's extension made common.

    {red|green|blue}          one of them
    {2::red|blue}             weighted: red twice as often as blue
    {2$$a|b|c}                two different ones in any order, as `b,a`; {1-2$$...} one or two, {2-$$...} two or more
    {2$$ and $$a|b|c}         joined by what stands between the signs
    __colours__               a line of colours.txt in the folder of wildcards; __clothes/*__ of all files there
    \\{ \\} \\|                  the sign itself; they stay so in what comes out, and `prompts.parse` reads them

Choices may stand inside each other, and lines of a wildcard's file may hold choices and wildcards. Files are UTF-8,
a choice a line; empty lines and those that begin with # do not count.

`settled` draws at random from a seed, so that a picture's prompt is settled by its seed; `combinations` gives all.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, permutations, product
from pathlib import Path
from random import Random

from plainsd.errors import UserError
from plainsd.text.wildcard_files import Wildcards

TOKEN = re.compile(r"\\.|[{}|]|__(?!_)([^\s{}|\\]{1,200}?)__|\\|_+|[^\\{}|_]+", re.DOTALL)
COUNT = re.compile(r"(?:(\d{1,3})?(-)?(\d{1,3})?\$\$)(?:([^{}|$]*)\$\$)?")
WEIGHT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)::")
DEEPEST_CHOICE = 20  # choices inside each other, and wildcards inside wildcards
HEAVIEST_OPTION = 1e9
MOST_COMBINATIONS = 10_000  # combinations of one prompt


@dataclass(frozen=True)
class Choice:
    options: "tuple[tuple[float, Template], ...]"  # weights, and what they stand before
    low: int = 1
    high: int = 1
    joiner: str = ","


@dataclass(frozen=True)
class Wildcard:
    name: str


Template = tuple[str | Choice | Wildcard, ...]


# --- reading ---------------------------------------------------------------------------------------------------------


def template_of(prompt: str) -> Template:
    """A prompt's choices. UserError for braces without a partner, and for notation that is not read here."""
    parts: list[str | Choice | Wildcard] = []
    opened: list[tuple[int, list, list]] = []  # of each open brace: where, what stands before it, its options
    for sign, name, at in _signs(prompt):
        if sign == "{":
            if len(opened) == DEEPEST_CHOICE:
                raise UserError(
                    f"choices are more than {DEEPEST_CHOICE} deep in each other; write fewer", field="prompt"
                )
            opened.append((at, parts, []))
            parts = []
        elif sign == "|" and opened:
            opened[-1][2].append(parts)
            parts = []
        elif sign == "}" and opened:
            _, outer, options = opened.pop()
            outer.append(choice_of([*options, parts]))
            parts = outer
        elif sign == "}":
            raise unpaired("}", prompt, at)
        elif name:
            parts.append(Wildcard(name.removeprefix("~")))
        else:
            parts.append(sign)
    if opened:
        raise unpaired("{", prompt, opened[-1][0])
    return tuple(parts)


def _signs(prompt: str) -> Iterator[tuple[str, str | None, int]]:
    """The braces and bars of a prompt, its wildcards with their names, the text between them in one piece; each with
    its place. A bar outside all braces is text."""
    text: list[str] = []
    depth = 0
    for match in TOKEN.finditer(prompt):
        if match[0] in ("{", "}") or match[1] or (match[0] == "|" and depth):
            if text:
                yield "".join(text), None, match.start()
                text.clear()
            depth += {"{": 1, "}": -1}.get(match[0], 0)
            yield match[0], match[1], match.start()
        else:
            text.append(match[0])
    if text:
        yield "".join(text), None, len(prompt)


def unpaired(sign: str, prompt: str, at: int) -> UserError:
    near = prompt[max(at - 15, 0) : at + 15]
    return UserError(f"{sign!r} without its partner near {near!r} in the prompt; write \\{sign} for the sign itself",
                     field="prompt")  # fmt: skip


def choice_of(options: list[list]) -> Choice:
    """The choice between these options, the first of which may begin with how many are wanted."""
    start = options[0][0] if options[0] and isinstance(options[0][0], str) else ""
    if start[:1] in ("@", "!"):
        raise UserError(
            f"{{{start[:12]!r}: choices in turn or in all orders are not read; leave {start[0]!r} out", field="prompt"
        )
    start = start.removeprefix("~")
    low = high = 1
    joiner = ","
    if found := COUNT.match(start):
        least, dash, most, between = found.groups()
        low = int(least or 1)
        high = int(most) if most else len(options) if dash else low
        joiner = joiner if between is None else between
        start = start[found.end() :]
        if low > high:
            raise UserError(f"{{{found[0]}...}} asks for {low} to {high} of its options; correct it", field="prompt")
    if options[0]:
        options = [[start, *options[0][1:]] if isinstance(options[0][0], str) else options[0], *options[1:]]
    weighted = tuple(weighed(option) for option in options)
    possible = sum(weight > 0 for weight, _ in weighted)
    if not possible:
        raise UserError("every option of a choice has weight 0; give one of them a larger weight", field="prompt")
    return Choice(weighted, min(low, possible), min(high, possible), joiner)


def weighed(option: list) -> tuple[float, Template]:
    """An option's weight, and the option without it and without the blanks around it."""
    weight = 1.0
    if option and isinstance(option[0], str) and (found := WEIGHT.match(option[0])):
        weight, option = float(found[1]), [option[0][found.end() :], *option[1:]]
        if weight > HEAVIEST_OPTION:
            raise UserError(
                f"the weight {weight:g} of an option is out of bounds; choose 0 to {HEAVIEST_OPTION:g}",
                field="prompt",
                value=weight,
            )
    if option and isinstance(option[0], str):
        option = [option[0].lstrip(), *option[1:]]
    if option and isinstance(option[-1], str):
        option = [*option[:-1], option[-1].rstrip()]
    return weight, tuple(option)


# --- what they become ------------------------------------------------------------------------------------------------


def has_choices(prompt: str) -> bool:
    return any(not isinstance(part, str) for part in template_of(prompt))


def settled(prompt: str, seed: int, wildcards: Wildcards | Path | None = None) -> str:
    """The prompt with every choice made, the same for the same seed and the same files. `wildcards`: a folder, or one
    that several prompts share."""
    return _drawn(template_of(prompt), Random(seed), as_wildcards(wildcards), 0)


def as_wildcards(wildcards: Wildcards | Path | None) -> Wildcards:
    return wildcards if isinstance(wildcards, Wildcards) else Wildcards(wildcards)


def line_template(line: str, wildcards: Wildcards) -> Template:
    """Of a line of a wildcard's file."""
    wildcards.spend(len(line))
    return template_of(line)


def _drawn(template: Template, random: Random, wildcards: Wildcards, depth: int) -> str:
    check_depth(depth)
    texts = []
    for part in template:
        if isinstance(part, Choice):
            count = random.randint(part.low, part.high)
            wildcards.spend(count * (len(part.options) + len(part.joiner)))
            chosen = _sampled(part.options, count, random)
            texts.append(part.joiner.join(_drawn(option, random, wildcards, depth + 1) for option in chosen))
        elif isinstance(part, Wildcard):
            line = random.choice(wildcards.lines(part.name))
            texts.append(_drawn(line_template(line, wildcards), random, wildcards, depth + 1))
        else:
            texts.append(part)
    return "".join(texts)


def _sampled(options: Sequence[tuple[float, Template]], count: int, random: Random) -> list[Template]:
    """Different ones, each with the chance that its weight has among those that are left; at least `count` of them have
    weights above 0."""
    left, chosen = list(options), []
    for _ in range(count):
        weights = [weight for weight, _ in left]
        chosen.append(left.pop(random.choices(range(len(left)), weights)[0])[1])
    return chosen


def combinations(prompt: str, wildcards: Wildcards | Path | None = None) -> list[str]:
    """Every prompt that it may become, the last choice changing fastest; each once. UserError for more than
    MOST_COMBINATIONS."""
    return _all(template_of(prompt), as_wildcards(wildcards), 0)


def _all(template: Template, wildcards: Wildcards, depth: int) -> list[str]:
    check_depth(depth)
    each = [_of_part(part, wildcards, depth) for part in template]
    return distinct_texts("".join(texts) for texts in product(*each))


def _of_part(part: str | Choice | Wildcard, wildcards: Wildcards, depth: int) -> list[str]:
    if isinstance(part, str):
        return [part]
    if isinstance(part, Wildcard):
        templates = (line_template(line, wildcards) for line in wildcards.lines(part.name))
        return distinct_texts(text for template in templates for text in _all(template, wildcards, depth + 1))
    options = [_all(option, wildcards, depth + 1) for weight, option in part.options if weight]
    return distinct_texts(
        part.joiner.join(texts)
        for count in range(part.low, part.high + 1)
        for order in permutations(options, count)
        for texts in product(*order)
    )


def distinct_texts(texts: Iterable[str]) -> list[str]:
    """The distinct texts in order. Not even copies may be more than MOST_COMBINATIONS: to pass over them takes time."""
    found = list(islice(texts, MOST_COMBINATIONS + 1))
    if len(found) > MOST_COMBINATIONS:
        raise UserError(
            f"the prompt has more than {MOST_COMBINATIONS} combinations; draw at random instead", field="prompt"
        )
    return list(dict.fromkeys(found))


def check_depth(depth: int) -> None:
    if depth > DEEPEST_CHOICE:
        raise UserError(
            f"wildcards stand in each other more than {DEEPEST_CHOICE} deep; is one of them in its own lines?",
            field="prompt",
        )
