"""`plainsd eval`: scores a model trained on captioned emoji, or with --clip-score any pictures against their texts."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction

from plainsd.arguments import Switch, flag
from plainsd.commands.cluster import ClusterFlags
from plainsd.commands.flags import GenerateFlags
from plainsd.errors import UserError
from plainsd.listing import read_prompts
from plainsd.pictures.settings import RANDOM, Settings, drawn_seed, read_seed

if TYPE_CHECKING:
    from plainsd.commands.adapters import LoraFiles
    from plainsd.commands.generate_cluster import ListRun
    from plainsd.pictures.model import StableDiffusion
    from plainsd.reports.clip_score import Captioned


DRAWN_FOLDER = "drawn"  # folder in --out for the pictures of a cluster, until they are scored
OF_DRAWING = ("prompts", "steps", "guidance", "sampler", "seed", "batch", "prediction",
              "zero_snr", "dtype", "plain", "ray")  # fmt: skip


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
    lora: Annotated[UseAppendAction[tuple[str, ...]], flag("FILE:STRENGTH")] = ()
    """LoRA on the model, as `plainsd generate --lora`; repeatable"""
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
    """override what the model predicts: epsilon, v_prediction or sample (x0)"""
    zero_snr: Annotated[str | None, flag("on|off")] = None
    """override whether the model has zero terminal SNR"""
    device: str = "auto"
    dtype: str = "auto"
    plain: Switch = False
    """do not pack the weights for the processor, as `plainsd generate --plain`"""
    ray: OmitArgPrefixes[ClusterFlags] = ClusterFlags()

    def check_kind(self) -> None:
        """UserError for options of the other kind of score."""
        names: tuple[str, ...] = ("pictures", "prompt_file", "batch", "clip_prefix")
        says = "needs --clip-score, the CLIP to score with; give both"
        if self.clip_score is not None:
            says = "is for scores of emoji; leave it or --clip-score out"
            names = ("sheet", "font", "concepts") if self.pictures or self.prompt_file else ("sheet", "font")
        for name in names:
            if getattr(self, name) != getattr(Evaluate, name):
                raise UserError(f"--{name.replace('_', '-')} {says}", field=name)
        if self.sheet is not None and self.sheet.is_dir():
            raise UserError(f"--sheet '{self.sheet}' is a folder; give a file in it", field="sheet")
        if self.prompt_file and self.prompts != Evaluate.prompts:
            raise UserError(
                f"--prompts {self.prompts} is a number of prompts of concepts.json; leave it or --prompt-file out",
                field="prompts",
            )

    def run(self) -> None:
        self.ray.check()
        seed = read_seed(self.seed)
        Settings(steps=self.steps, guidance=self.guidance, sampler=self.sampler, seed=seed).check()
        from plainsd.commands.output import check_writable

        for place in (self.out, None if self.sheet is None else self.sheet.parent):
            if place is not None:
                check_writable(place)
        least = 2 if self.clip_score is None else 1  # one of a seen and one of a held-out pair
        if self.prompts < least:
            raise UserError(f"{self.prompts} prompts; give at least {least}", field="prompts")
        self.check_kind()
        if self.pictures:
            self.check_pictures()
        if seed == RANDOM:
            seed = self.random_seed()
            print(f"seed {seed}", file=sys.stderr)
        if self.clip_score is not None:
            return self.score_by_clip(seed)
        if self.sheet is not None and self.sheet.suffix.lower() != ".png":
            raise UserError(f"--sheet {self.sheet} is a PNG; call it {self.sheet.stem}.png", field="sheet")
        from tqdm import tqdm

        from plainsd.emoji.drawing import open_font
        from plainsd.emoji.evaluate import evaluate, score_table

        open_font(self.font)  # said before the model is read
        sd = self.loaded()
        concepts = self.concepts_of(sd)
        drawing: AbstractContextManager = nullcontext({}) if self.ray.cluster is None else self.rows_of_cluster()
        with drawing as by, tqdm(unit="picture", disable=None, dynamic_ncols=True) as bar:

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
                about=self.about(sd),
                progress=progress,
                **by,
            )
        print(score_table(result), end="")

    def random_seed(self) -> int:
        """That of the run on a cluster that stopped in --out, if there is one."""
        from plainsd.commands.generate_cluster import seed_of_record

        if self.ray.cluster is None or self.out is None:
            return drawn_seed()
        before = seed_of_record(self.out if self.clip_score is not None else self.out / DRAWN_FOLDER, "seed")
        return drawn_seed() if before is None else before

    @contextmanager
    def rows_of_cluster(self) -> Iterator[dict[str, Any]]:
        """The argument of `evaluate` for pictures that a cluster draws. They are kept until all are scored."""
        from plainsd.emoji.evaluate import BATCH
        from plainsd.pictures.images import open_picture

        with self.place_for_pictures() as folder:
            runs: list[ListRun] = []

            def draw(sd: StableDiffusion, asked: Sequence[Any], scales: Sequence[float], options: dict) -> list:
                prompts = [question.prompt for question in asked]
                run = self.rows_by_cluster(prompts, scales, options["seed"], BATCH, folder)
                runs.append(run)
                starts = range(0, len(run.paths), len(prompts))
                return [map(open_picture, run.paths[start : start + len(prompts)]) for start in starts]

            yield {"draw": draw}
            for run in runs:
                run.remove()

    @contextmanager
    def place_for_pictures(self) -> Iterator[Path]:
        """In --out, where they outlive a stop, or a temporary folder."""
        if self.out:
            yield self.out / DRAWN_FOLDER
            return
        with TemporaryDirectory(prefix="plainsd-eval-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    def rows_by_cluster(
        self, prompts: list[str], scales: Sequence[float | None], seed: int, batch: int, folder: Path
    ) -> ListRun:
        """Draws the prompts once for each guidance scale."""
        from plainsd.commands.generate_cluster import draw_rows

        names = ("model", "lora", "prediction", "zero_snr", "device", "dtype", "plain", "ray")
        command = GenerateFlags(**{name: getattr(self, name) for name in names})
        rows = [{"guidance": scale, "steps": self.steps, "sampler": self.sampler} for scale in scales]
        return draw_rows(command, prompts, rows, seed, batch, folder)

    def loaded(self) -> StableDiffusion:
        from plainsd.checkpoint import load
        from plainsd.speed.model import faster

        loras = [(file, one.strength) for file, one in self.lora_files()]
        sd = load(self.model, loras=loras, device=self.device, dtype=self.dtype, **self.noise())
        return sd if self.plain else faster(sd, tell=partial(print, file=sys.stderr))

    def lora_files(self) -> LoraFiles:
        from plainsd.commands.adapters import chosen_loras

        return chosen_loras(self.lora, {}, None)

    def noise(self) -> dict[str, Any]:
        from plainsd.files.predicted import on_or_off

        return {"prediction": self.prediction, "zero_snr": on_or_off(self.zero_snr)}

    def about(self, sd: StableDiffusion) -> dict[str, Any]:
        """What scores.json says of the model, and of what drew."""
        import torch

        from plainsd import __version__

        return {
            "model": str(sd.path), "loras": [*self.lora], "prediction": sd.prediction, "device": str(sd.device),
            "dtype": str(sd.dtype).removeprefix("torch."), "plainsd": __version__, "torch": torch.__version__,
        }  # fmt: skip

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

    def check_pictures(self) -> None:
        """UserError for what says how pictures are drawn, where they are there."""
        says = "--pictures scores pictures that are there; leave"
        if self.model or self.prompt_file or self.lora:
            raise UserError(f"{says} MODEL, --prompt-file and --lora out", field="pictures")
        given = [name for name in OF_DRAWING if getattr(self, name) != getattr(Evaluate, name)]
        if given:
            names = ", ".join("--cluster" if name == "ray" else f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"{says} out {names}", field="pictures")

    def score_by_clip(self, seed: int) -> None:
        """Prints the score, and writes it to --out; drawn pictures are written there too."""
        if self.batch < 1:
            raise UserError(f"batch {self.batch} is out of range; give 1 or more", field="batch", value=self.batch)
        from tqdm import tqdm

        from plainsd.checkpoint import load_clip
        from plainsd.emoji.evaluate import asked_of
        from plainsd.reports.clip_score import captioned_in, drawn, score_all, score_summary, score_text, write_scores

        say = partial(print, file=sys.stderr)
        if self.pictures:
            pictures: Iterable = captioned_in(self.pictures, say)
            total = None
        else:
            prompts = read_prompts(self.prompt_file) if self.prompt_file else None
            sd = self.loaded()
            if prompts is None:
                prompts = [asked.prompt for asked in asked_of(self.concepts_of(sd), self.prompts, seed)]
            total = len(prompts)
            options = {"steps": self.steps, "guidance": self.guidance, "sampler": self.sampler}
            if self.ray.cluster is None:
                from plainsd.commands.recorded import with_notes

                noted = partial(with_notes, sd=sd, loras=self.lora_files(), words={}, vae=None, noise=self.noise())
                pictures = drawn(sd, prompts, seed, self.batch, self.out, noted, **options)
            else:
                pictures = self.drawn_by_cluster(prompts, seed)
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

    def drawn_by_cluster(self, prompts: list[str], seed: int) -> Iterator[Captioned]:
        """The same pictures, all drawn before the first comes; in --out they outlive a stop."""
        from plainsd.reports.clip_score import read_back

        with nullcontext(self.out) if self.out else TemporaryDirectory(prefix="plainsd-eval-") as place:
            run = self.rows_by_cluster(prompts, [self.guidance], seed, self.batch, Path(place))
            yield from map(read_back, run.paths)
            run.finish()
