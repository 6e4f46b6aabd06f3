"""`plainsd eval`: scores a model trained on captioned emoji, or with --clip-score any pictures against their texts."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional

from plainsd.arguments import Switch
from plainsd.commands.flags import flag
from plainsd.errors import UserError
from plainsd.listing import read_prompts
from plainsd.pictures.settings import RANDOM, Settings, drawn_seed, read_seed

if TYPE_CHECKING:
    from plainsd.pictures.model import StableDiffusion


@dataclass
class Evaluate:
    """Generates pictures for trained and held-out pairs of object and background, and scores both.

    With --clip-score: CLIPScore (Hessel et al. 2021) of the pictures of a folder, or of pictures drawn from prompts.
    """

    model: Annotated[Positional[str | None], flag("MODEL")] = None
    """folder of a model with its concepts.json; the embedded model if not given"""
    concepts: Annotated[Path | None, flag("FILE")] = None
    """concepts.json, if it is not in the model's folder"""
    prompts: int = 1024
    """number of prompts, half of them of held-out combinations; 1000 or more for narrow intervals"""
    steps: int = 20
    guidance: Annotated[float | None, flag("SCALE")] = None
    sampler: Annotated[str | None, flag("NAME")] = None
    clip_score: Annotated[str | None, flag("CLIP")] = None
    """CLIPScore by this CLIP: folder, file or Hub id, such as openai/clip-vit-base-patch32"""
    pictures: Annotated[Path | None, flag("FOLDER")] = None
    """with --clip-score: pictures with captions beside them (as for training), or with their settings inside"""
    prompt_file: Annotated[Path | None, flag("FILE")] = None
    """with --clip-score: a text file of prompts, one per line, to draw from (default: --prompts of the model's
    concepts.json)"""
    clip_prefix: Annotated[str, flag("TEXT")] = "A photo depicts "
    """with --clip-score: what precedes each text, as in the paper"""
    batch: Annotated[int, flag("N")] = 4
    """with --clip-score: pictures drawn at once"""
    seed: str = "0"
    """seed of the first picture; random or -1 picks one"""
    out: Annotated[Path | None, flag("FOLDER")] = None
    """folder for scores.json, scores.txt and contact-sheet.png"""
    sheet: Annotated[Path | None, flag("FILE.png")] = None
    """file for the first 64 pictures, 8 by 8 at the model's size, failures in red frames"""
    font: Annotated[Path | None, flag("FILE")] = None
    """the Noto Color Emoji font, if not at Debian's path"""
    prediction: Annotated[str | None, flag("NAME")] = None
    """override what the model predicts: epsilon or v_prediction"""
    zero_snr: Annotated[str | None, flag("on|off")] = None
    """override whether the model has zero terminal SNR"""
    device: str = "auto"
    dtype: str = "auto"
    plain: Switch = False
    """do not pack the weights for the processor, as `plainsd generate --plain`"""

    def run(self) -> None:
        seed = read_seed(self.seed)
        Settings(steps=self.steps, guidance=self.guidance, sampler=self.sampler, seed=seed).check()
        seed = drawn_seed() if seed == RANDOM else seed
        if self.clip_score is not None:
            return self.score_by_clip(seed)
        if self.sheet is not None and self.sheet.suffix.lower() != ".png":
            raise UserError(f"--sheet {self.sheet} is a PNG; call it {self.sheet.stem}.png", field="sheet")
        for name in ("pictures", "prompt_file"):
            if getattr(self, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} needs --clip-score, the CLIP to score with; give both", field=name)
        from tqdm import tqdm

        from plainsd.emoji.evaluate import evaluate, score_table

        sd = self.loaded()
        concepts = self.concepts_of(sd)
        with tqdm(unit="picture", disable=None, dynamic_ncols=True) as bar:

            def progress(row: str, done: int, count: int) -> None:
                if done < bar.n or not bar.n:  # another row begins
                    bar.reset(total=count)
                    bar.set_description(row)
                bar.update(done - bar.n)

            result = evaluate(
                sd,
                concepts,
                prompts=self.prompts,
                steps=self.steps,
                guidance=self.guidance,
                sampler=self.sampler,
                seed=seed,
                out=self.out,
                font=self.font,
                sheet=self.sheet,
                progress=progress,
            )
        print(score_table(result), end="")

    def loaded(self) -> StableDiffusion:
        from plainsd.checkpoint import load
        from plainsd.files.predicted import on_or_off
        from plainsd.speed.model import faster

        noise: dict[str, Any] = {"prediction": self.prediction, "zero_snr": on_or_off(self.zero_snr)}
        sd = load(self.model, device=self.device, dtype=self.dtype, **noise)
        return sd if self.plain else faster(sd, tell=partial(print, file=sys.stderr))

    def concepts_of(self, sd: StableDiffusion) -> dict:
        from plainsd.disk import read_json

        assert sd.path is not None  # set by load
        file = self.concepts or sd.path / "concepts.json"
        if not file.is_file():
            raise UserError(
                f"no such file {file}: eval scores models trained on emoji, and needs their concepts.json; "
                "give it with --concepts, or score pictures with --clip-score",
                field="concepts",
                value=str(file),
            )
        return read_json(file)

    # --- CLIPScore ---------------------------------------------------------------------------------------------------

    def score_by_clip(self, seed: int) -> None:
        """Prints the score, and writes it to --out; drawn pictures are written there too."""
        if self.pictures and (self.model or self.prompt_file):
            raise UserError(
                "--pictures scores pictures that are there; leave MODEL and --prompt-file out", field="pictures"
            )
        if self.batch < 1:
            raise UserError(f"batch {self.batch} is out of range; give 1 or more", field="batch", value=self.batch)
        from tqdm import tqdm

        from plainsd.checkpoint import load_clip
        from plainsd.commands.output import check_writable
        from plainsd.emoji.evaluate import questions
        from plainsd.reports.clip_score import captioned_in, drawn, score_all, score_summary, score_text, write_scores

        if self.out:
            check_writable(self.out)
        say = partial(print, file=sys.stderr)
        if self.pictures:
            pictures: Iterable = captioned_in(self.pictures, say)
            total = None
        else:
            prompts = read_prompts(self.prompt_file) if self.prompt_file else None
            sd = self.loaded()
            if prompts is None:
                prompts = [asked.prompt for asked in questions(self.concepts_of(sd), self.prompts, seed)]
            options = {"steps": self.steps, "guidance": self.guidance, "sampler": self.sampler}
            pictures, total = drawn(sd, prompts, seed, self.batch, self.out, **options), len(prompts)
        clip = load_clip(self.clip_score or "", self.device)
        with tqdm(total=total, unit="picture", disable=None, dynamic_ncols=True) as bar:
            scored = score_all(clip, pictures, self.clip_prefix, bar.update)
        if not scored:
            raise UserError(
                f"'{self.pictures}' has no pictures with captions or settings; give a folder of such", field="pictures"
            )
        result = score_summary(scored, self.clip_prefix)
        print(score_text(result), end="")
        if self.out:
            write_scores(result, self.out)
