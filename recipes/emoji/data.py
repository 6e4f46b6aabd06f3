"""Write the training set of the embedded model: captioned pictures of emoji, as an ordinary folder for `plainsd train`.

    python recipes/emoji/data.py runs/emoji/data

    OUT/metadata.jsonl   one line a picture: file name, captions, how it was made; written last
    OUT/images/*.png     RGB pictures of the seen (emoji, background) pairs
    OUT/heldout/         the same two things for pairs that are never trained on
    OUT/tokenizer/       a byte-level BPE vocabulary of these captions, in CLIP's file format
    OUT/concepts.json    names, characters, colours, templates and held-out pairs: what a scorer needs

Picture i is a pure function of (seed, i): its pair is entry i of the seen pairs, taken round and round, and its size
and place are drawn from the text "seed:picture:i". Which emoji, and how they are drawn: `plainsd.emoji.drawing`. In a
folder that was written before, the new set takes the place of the old one.

    python recipes/emoji/data.py runs/emoji128/set --set

writes no pictures: only tokenizer/ and concepts.json, which describes scenes of one to four of all emoji, drawn when
they are wanted (`plainsd train --data emoji:OUT/concepts.json`, see `plainsd.emoji.scenes`).
"""

import argparse
import json
import multiprocessing
import os
import sys
from contextlib import suppress
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from plainsd.cli import exit_code
from plainsd.disk import written_whole
from plainsd.emoji import drawing
from plainsd.emoji.captions import captions_of
from plainsd.emoji.protocol import scene_questions
from plainsd.emoji.scenes import SceneSet, describe_set, make_scene
from plainsd.emoji.words import COLOURS, every_noun
from plainsd.errors import UserError

PICTURES, SCENES = 57_600, 100_000
EMOJI = 400
VOCABULARY, SCENE_VOCABULARY = 2000, 4096
LEAST = {"count": 1, "heldout_count": 1, "emoji": 1, "workers": 1, "size": 16, "vocabulary": 514}  # two tokens a byte
TOKENIZER_SCENES = 20_000  # scenes whose captions the tokenizer is made of
QUESTIONS = 1024  # scenes that `plainsd eval` asks for
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # how CLIP cuts text before the merges


def write_whole(path: Path, text: str) -> None:
    """The file is there whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# ---- pictures --------------------------------------------------------------------------------------------------------


def start_worker(font_path: Path, concepts: list[drawing.Concept], size: int, in_cells: int | None) -> None:
    """Each process draws the glyphs once."""
    global glyphs, side, cells
    os.nice(10)
    font = drawing.open_font(font_path)
    glyphs, side, cells = [drawing.draw_glyph(font, concept.character) for concept in concepts], size, in_cells


def make_picture(job: tuple[str, int, tuple[int, int, int], Path]) -> drawing.GlyphBox:
    """Compose and write one picture; where the glyph lies in it."""
    key, concept, colour, path = job
    place = drawing.random_place(key, glyphs[concept].size, side, cells)
    drawing.draw_picture(glyphs[concept], colour, side, place).save(path, compress_level=1)
    return place


def write_pictures(
    folder: Path,
    kind: str,
    count: int,
    pairs: list[tuple[int, int]],
    concepts: list[drawing.Concept],
    options: argparse.Namespace,
) -> None:
    """`count` pictures of the pairs, taken round and round, and their metadata.jsonl, last."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    colours = list(drawing.BACKGROUNDS.items())
    jobs, lines = [], []
    for i in range(count):
        concept, background = pairs[i % len(pairs)]
        name, colour = colours[background]
        file_name = f"images/{i:06d}.png"
        jobs.append((f"{options.seed}:{kind}:{i}", concept, colour, folder / file_name))
        captions = [drawing.caption(template, concepts[concept], name) for template in drawing.TEMPLATES]
        lines.append({"file_name": file_name, "text": captions, "concept": concepts[concept].name, "background": name})
    with multiprocessing.Pool(
        options.workers, start_worker, (options.font, concepts, options.size, options.cells)
    ) as pool:
        for i, place in enumerate(pool.imap(make_picture, jobs, chunksize=64)):
            lines[i] |= {"left": place.left, "top": place.top, "width": place.width, "height": place.height}
            if (i + 1) % 5000 == 0:
                print(f"{kind}: {i + 1} of {count} pictures", file=sys.stderr, flush=True)
    write_whole(folder / "metadata.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def remove_heldout(folder: Path) -> None:
    """What `write_pictures` wrote there before."""
    (folder / "metadata.jsonl").unlink(missing_ok=True)
    for path in list((folder / "images").glob("[0-9]" * 6 + ".png")):
        path.unlink()
    for place in (folder / "images", folder):
        with suppress(OSError):  # there is none, or something else in it
            place.rmdir()


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def byte_symbols() -> list[str]:
    """The 256 printable characters that stand for the bytes, in CLIP's order: printable Latin-1, then the rest."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def train_merges(captions: list[str], limit: int) -> list[tuple[str, str]]:
    """Byte-pair merges of the captions, most frequent first, words ending in `</w>`."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    # Ties between pairs are broken by the symbols' numbers; named here, they do not depend on the order of a hash map.
    trainer = trainers.BpeTrainer(
        vocab_size=limit,
        end_of_word_suffix="</w>",
        initial_alphabet=byte_symbols(),
        special_tokens=[symbol + "</w>" for symbol in byte_symbols()],
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    return [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]


def write_tokenizer(folder: Path, captions: list[str], size: int) -> int:
    """The four files of a CLIP tokenizer folder; the number of entries. With all 256 bytes in it any text encodes."""
    symbols = byte_symbols()
    base = symbols + [symbol + "</w>" for symbol in symbols]
    merges = train_merges(captions, size)[: size - len(base) - 2]
    entries = list(dict.fromkeys([*base, *(left + right for left, right in merges)])) + [START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
        **special,
    }
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    write_whole(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_whole(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    write_whole(folder / "special_tokens_map.json", json.dumps(special, indent=2) + "\n")
    write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    return len(entries)


# ---- the whole -------------------------------------------------------------------------------------------------------


def describe(concepts: list[drawing.Concept], heldout: list[tuple[int, int]], options: argparse.Namespace) -> dict:
    """What concepts.json says."""
    names = list(drawing.BACKGROUNDS)
    return {
        "concepts": [{"name": c.name, "character": c.character, "phrase": c.phrase} for c in concepts],
        "backgrounds": {name: list(colour) for name, colour in drawing.BACKGROUNDS.items()},
        "templates": list(drawing.TEMPLATES),
        "heldout": [[concepts[i].name, names[j]] for i, j in heldout],
        "size": options.size,
        **({"cells": options.cells} if options.cells else {}),
        "seed": options.seed,
        "font": drawing.font_identity(options.font),
    }


def wanted_names(path: Path, known: list[str]) -> set[str]:
    """The names in a file, one a line."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --names {path}: {error}; give a text file in UTF-8") from error
    wanted = {line.strip() for line in text.split("\n") if line.strip()}
    if not wanted:
        raise UserError(f"{path} names no emoji; write one name a line")
    if strangers := sorted(wanted.difference(known)):
        raise UserError(f"{path}: {strangers[0]!r} is not among the {len(known)} emoji of the set; take it out")
    return wanted


def restricted(
    concepts: list[drawing.Concept], seen: list[tuple[int, int]], heldout: list[tuple[int, int]], path: Path
) -> tuple[list[drawing.Concept], list[tuple[int, int]], list[tuple[int, int]]]:
    """Only the emoji named in a file, one a line, and their pairs."""
    wanted = wanted_names(path, [concept.name for concept in concepts])
    new = {old: i for i, old in enumerate(i for i, concept in enumerate(concepts) if concept.name in wanted)}
    pairs = [[(new[concept], background) for concept, background in some if concept in new] for some in (seen, heldout)]
    return [concepts[old] for old in new], *pairs


def build_set(options: argparse.Namespace) -> None:
    """concepts.json of scenes, and the tokenizer of their captions."""
    nouns = every_noun(drawing.open_font(options.font))
    _, held = drawing.split_pairs(len(nouns), len(COLOURS), options.heldout_share, options.seed)
    if options.names:  # the held-out pairs stay those of all emoji
        wanted = wanted_names(options.names, [noun.name for noun in nouns])
        new = {old: i for i, old in enumerate(i for i, noun in enumerate(nouns) if noun.name in wanted)}
        nouns, held = [nouns[old] for old in new], [(new[old], colour) for old, colour in held if old in new]
    names = list(COLOURS)
    made_of = SceneSet(
        nouns=tuple(nouns),
        colours=COLOURS,
        heldout=frozenset((concept, names[colour]) for concept, colour in held),
        share=options.heldout_share,
        size=options.size,
        cells=options.cells,
        single=options.single,
        seed=options.seed,
        count=options.count or SCENES,
        heldout_count=options.heldout_count,
        font=drawing.font_identity(options.font),
    )
    scene_questions(made_of, QUESTIONS)  # an error says which scenes it is too small for
    texts = [
        text
        for i in range(TOKENIZER_SCENES)
        for text in captions_of(made_of, make_scene(made_of, "train", i), "train", i)
    ]
    entries = write_tokenizer(options.out / "tokenizer", texts, options.vocabulary or SCENE_VOCABULARY)
    text = json.dumps(describe_set(made_of), ensure_ascii=False, separators=(",", ":")) + "\n"
    write_whole(options.out / "concepts.json", text)
    print(
        f"{options.out}: {len(nouns)} emoji, {len(COLOURS)} colours, {len(held)} pairs of them held out, and "
        f"{options.heldout_share:.0%} of the pairs of emoji; {entries} tokens"
    )


def build(options: argparse.Namespace) -> None:
    drawing.check_cells(options.cells)
    font = drawing.open_font(options.font)
    concepts = drawing.choose(font, options.emoji or EMOJI)
    seen, heldout = drawing.split_pairs(len(concepts), len(drawing.BACKGROUNDS), options.heldout_share, options.seed)
    captions = [
        drawing.caption(template, concept, background)
        for concept in concepts
        for background in drawing.BACKGROUNDS
        for template in drawing.TEMPLATES
    ]
    if options.names:  # the vocabulary and the split stay those of the whole set
        concepts, seen, heldout = restricted(concepts, seen, heldout, options.names)
    if not seen:
        raise UserError(
            f"--heldout-share {options.heldout_share:g} leaves no pair of emoji and background to train on; give a "
            "smaller one"
        )
    for file in (options.out / "metadata.jsonl", options.out / "heldout" / "metadata.jsonl"):
        if file.exists() and not (options.out / "concepts.json").exists():
            raise UserError(f"{file} is not of this recipe, which would replace it; give another folder")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "metadata.jsonl").unlink(missing_ok=True)  # first, so that a run stopped here leaves no whole set
    remove_heldout(options.out / "heldout")
    entries = write_tokenizer(options.out / "tokenizer", captions, options.vocabulary or VOCABULARY)
    write_whole(
        options.out / "concepts.json",
        json.dumps(describe(concepts, heldout, options), ensure_ascii=False, indent=1) + "\n",
    )
    if heldout:
        write_pictures(options.out / "heldout", "heldout", options.heldout_count, heldout, concepts, options)
    count = options.count or PICTURES
    write_pictures(options.out, "picture", count, seen, concepts, options)
    print(
        f"{options.out}: {count} pictures of {len(seen)} pairs, {len(heldout)} pairs held out, "
        f"{len(concepts)} emoji, {entries} tokens"
    )


def check_numbers(options: argparse.Namespace) -> None:
    for name, least in LEAST.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value} is out of range; give {least} or more")
    if not 0 <= options.heldout_share < 1:  # NaN included
        raise UserError(f"--heldout-share {options.heldout_share:g} is out of range; give a share from 0 up to below 1")


def make(options: argparse.Namespace) -> None:
    if options.single and not options.set:
        raise UserError("--single is a kind of --set; without that there is one object in every picture")
    for name in ("workers", "emoji") if options.set else ():
        if getattr(options, name) is not None:
            raise UserError(f"--{name} has no effect with --set, which draws nothing and takes all emoji; leave it out")
    check_numbers(options)
    build_set(options) if options.set else build(options)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", action="store_true", help="scenes of all emoji, described and not drawn")
    parser.add_argument("--single", action="store_true", help="with --set: one object on one colour in every scene")
    parser.add_argument("--count", type=int, help=f"training pictures ({PICTURES}), or scenes an epoch ({SCENES})")
    parser.add_argument("--heldout-count", type=int, default=500, help="pictures of held-out pairs")
    parser.add_argument("--heldout-share", type=float, default=0.1, help="share of the pairs that is held out")
    parser.add_argument("--emoji", type=int, help=f"how many emoji ({EMOJI}); --set has all")
    parser.add_argument("--names", type=Path, help="file of the emoji to draw, one name a line; all if not given")
    parser.add_argument("--size", type=int, default=128, help="side of a picture in pixels")
    parser.add_argument(
        "--cells", type=int, help="cells of a side: sizes and places are whole cells; by default any size and place"
    )
    parser.add_argument(
        "--vocabulary", type=int, help=f"most entries in the tokenizer ({VOCABULARY}, of scenes {SCENE_VOCABULARY})"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--font", type=Path, help=f"by default {drawing.FONT}, or {drawing.FONT_VARIABLE}")
    parser.add_argument("--workers", type=int, help="processes that draw, by default one a core")
    options = parser.parse_args(argv)
    return exit_code(lambda: make(options), "data.py")


if __name__ == "__main__":
    sys.exit(main())
