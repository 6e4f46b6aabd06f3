"""`plainsd eval`: scores a model trained on captioned emoji."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from plainsd.commands.flags import flag
from plainsd.errors import UserError
from plainsd.pictures.settings import RANDOM, Settings, drawn_seed, read_seed


@dataclass
class Evaluate:
    """Generates pictures for trained and held-out pairs of object and background, and scores both."""

    model: Annotated[Positional[str | None], flag("MODEL")] = None
    """folder of a model with its concepts.json; the embedded model if not given"""
    concepts: Annotated[Path | None, flag("FILE")] = None
    """concepts.json, if it is not in the model's folder"""
    prompts: int = 512
    """number of prompts; 500 or more for meaningful scores"""
    steps: int = 20
    guidance: Annotated[float | None, flag("SCALE")] = None
    sampler: Annotated[str | None, flag("NAME")] = None
    seed: str = "0"
    """seed of the first picture; random or -1 picks one"""
    out: Annotated[Path | None, flag("FOLDER")] = None
    """folder for scores.json, scores.txt and contact-sheet.png"""
    font: Annotated[Path | None, flag("FILE")] = None
    """the Noto Color Emoji font, if not at Debian's path"""
    prediction: Annotated[str | None, flag("NAME")] = None
    """override what the model predicts: epsilon or v_prediction"""
    zero_snr: Annotated[str | None, flag("on|off")] = None
    """override whether the model has zero terminal SNR"""
    device: str = "auto"
    dtype: str = "auto"

    def run(self) -> None:
        from tqdm import tqdm

        from plainsd.checkpoint import load
        from plainsd.disk import read_json
        from plainsd.emoji.evaluate import evaluate, score_table
        from plainsd.files.predicted import on_or_off

        seed = read_seed(self.seed)
        Settings(steps=self.steps, guidance=self.guidance, sampler=self.sampler, seed=seed).check()
        seed = drawn_seed() if seed == RANDOM else seed
        noise: dict[str, Any] = {"prediction": self.prediction, "zero_snr": on_or_off(self.zero_snr)}
        sd = load(self.model, device=self.device, dtype=self.dtype, **noise)
        assert sd.path is not None  # set by load
        file = self.concepts or sd.path / "concepts.json"
        if not file.is_file():
            raise UserError(
                f"no such file {file}: eval scores models trained on emoji, and needs their concepts.json; "
                "give it with --concepts",
                field="concepts",
                value=str(file),
            )
        concepts = read_json(file)
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
                progress=progress,
            )
        print(score_table(result), end="")
