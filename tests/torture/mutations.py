"""Changes of a file's bytes, each drawn from a seed."""

import random
import re

NUMBERS = (b"0", b"-1", b"1e999", b"NaN", b"9" * 50, b"4294967296", b"18446744073709551616", b"null", b'"x"', b"[]",
           b"{}", b"true", b"-0.0", b"1.5")  # fmt: skip
VALUE = re.compile(rb'-?\d+(?:\.\d+)?|"[^"]{0,40}"|true|false|null')
MOST = 2**21  # bytes that a file grows by, at most


def flip(content: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 1, 1, 4, 64))):
        content[place_in(content, chance)] ^= 1 << chance.randrange(8)


def overwrite(content: bytearray, chance: random.Random) -> None:
    at = place_in(content, chance)
    count = min(chance.choice((1, 4, 8, 64, 4096)), len(content) - at)
    content[at : at + count] = chance.choice((bytes(count), b"\xff" * count, chance.randbytes(count)))


def cut(content: bytearray, chance: random.Random) -> None:
    if chance.random() < 0.5:
        del content[place_in(content, chance) :]
    else:
        at = place_in(content, chance)
        del content[at : at + chance.choice((1, 8, 100, 5000))]


def grow(content: bytearray, chance: random.Random) -> None:
    """A stretch again and again, or something strange, at some place."""
    at = place_in(content, chance)
    part = bytes(content[at : at + chance.choice((1, 2, 16, 300))]) or b"["
    if chance.random() < 0.3:
        part = chance.choice((b"[", b'{"a":', b"(", b"9", b" ", b"\n", b",", b'"', b"\\", b"\0"))
    count = min(chance.choice((1, 2, 100, 5000, 200_000)), max(1, MOST // len(part)))
    content[at:at] = part * count


def swap(content: bytearray, chance: random.Random) -> None:
    length = min(chance.choice((1, 8, 64, 1024)), len(content) // 2)
    one, other = (chance.randrange(max(1, len(content) - length)) for _ in range(2))
    if abs(one - other) >= length:
        first, second = content[one : one + length], content[other : other + length]
        content[one : one + length], content[other : other + length] = second, first


def revalue(content: bytearray, chance: random.Random) -> None:
    """Another value in place of one in the text of the file, of its header for instance."""
    start = content[:65_536]
    found = [match.span() for match in VALUE.finditer(start)]
    if not found:
        return flip(content, chance)
    begin, end = chance.choice(found)
    others = [bytes(start[a:b]) for a, b in found]
    content[begin:end] = chance.choice((*NUMBERS, chance.choice(others)))
    return None


CHANGES = (flip, overwrite, cut, grow, swap, revalue, revalue)


def place_in(content: bytearray, chance: random.Random) -> int:
    """More often near the beginning, where headers are."""
    length = max(1, len(content))
    return chance.randrange(min(length, chance.choice((64, 4096, length, length))))


def mutated(whole: bytes, seed: str) -> bytes:
    """The content with one to three changes."""
    chance, content = random.Random(seed), bytearray(whole)
    for _ in range(chance.choice((1, 1, 2, 3))):
        if content:
            chance.choice(CHANGES)(content, chance)
    return bytes(content)
