"""`plainsd generate --cluster`: batches of a list are drawn by several processes; this one writes the files.

Batches are those of a run in one process, and so are the pictures. While a run is not finished, `unfinished.json` in
the folder says which; the same command then goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from plainsd.cluster.host import Tool
from plainsd.cluster.lists import Again, TaskList
from plainsd.cluster.worker import TaskError
from plainsd.commands.adapters import chosen_loras, from_flag
from plainsd.commands.cluster import ClusterFlags
from plainsd.commands.flags import GenerateFlags
from plainsd.commands.output import PromptBatch, Target
from plainsd.commands.recorded import check_recorded, noise_flags, with_notes
from plainsd.commands.setup import DrawingSetup, note_unused_embeddings, upscaler_file
from plainsd.commands.texts import TEXTS_BESIDE
from plainsd.disk import written_whole
from plainsd.errors import UserError
from plainsd.files.hub import find
from plainsd.json_reader import parsed_json
from plainsd.pictures.settings import SEEDS

if TYPE_CHECKING:
    from plainsd.pictures.images import PictureFile

RUN_RECORD = "unfinished.json"
NOT_COMPARED = (  # flags that change no picture, and seeds as typed: those drawn are among the settings
    "out",
    "batch",
    "ray",
    "low_memory",
    *SEEDS,
)
EVENT_EVERY = 0.1  # seconds between messages about steps


class ListedBatch(NamedTuple):
    """A batch of the list: which of the tasks (one for each picture of --image), its prompts and settings, and the
    numbers of its pictures in the list."""

    draw: int
    batch: PromptBatch
    numbers: range


class Loaded(NamedTuple):
    """What loading printed, and the steps of the batch that follows."""

    text: str
    steps: int


class Stepped(NamedTuple):
    steps: int


class FinishedBatch(NamedTuple):
    pictures: list[PictureFile]


# --- in the worker's process -----------------------------------------------------------------------------------------


class ListDrawer:
    """Draws batches of a list."""

    def __init__(
        self, setup: DrawingSetup, draws: list[Callable], prompts: list[str], choices: dict[str, Any], suffix: str
    ):
        self.setup, self.draws, self.suffix = setup, draws, suffix
        with redirect_stderr(io.StringIO()) as said:
            self.sd, self.words = setup.ready(setup.command.model)
            note_unused_embeddings(self.words, [*prompts, *map(choices.get, TEXTS_BESIDE)])
            check_recorded(setup.command, self.sd, prompts, setup.loras, self.words, choices)
            self.joins = setup.joins(self.sd)
        self.said = said.getvalue()

    def __call__(self, task: ListedBatch) -> Iterator[Loaded | Stepped | FinishedBatch]:
        import torch

        try:
            yield from self.drawn(task)
        except torch.OutOfMemoryError:
            many = len(task.numbers)
            raise UserError(f"out of memory on a batch of {many} pictures; try a smaller --batch") from None

    def drawn(self, task: ListedBatch) -> Iterator[Loaded | Stepped | FinishedBatch]:
        from plainsd.diffusion.samplers import Step
        from plainsd.pictures.images import PictureFile

        setup, (prompts, choices) = self.setup, task.batch
        run = self.draws[task.draw](self.sd, prompts, **choices | self.joins)
        yield Loaded(self.said, run.steps)
        last, count = time.monotonic(), 0
        for event in run:
            if isinstance(event, Step):
                count += 1
                if time.monotonic() - last >= EVENT_EVERY:
                    yield Stepped(count)
                    last, count = time.monotonic(), 0
                continue
            command = setup.command
            settings = [
                with_notes(one, self.sd, setup.loras, self.words, command.vae, setup.noise) for one in event.settings
            ]
            pairs = zip(event.images, settings, strict=True)
            yield FinishedBatch([PictureFile.of(image, self.suffix, one) for image, one in pairs])


# --- in this process -------------------------------------------------------------------------------------------------


@dataclass
class ListRun:
    """The files of a run over a list, and the record of one that is not finished."""

    target: Target
    paths: list[Path]  # of each picture

    @classmethod
    def begin(cls, target: Target, digest: str, seeds: list[int], drawn: dict[str, int]) -> ListRun:
        """A new run, or the one that stopped in this folder. UserError if that was of something else. `seeds`: in the
        files' names; `drawn`: those of the whole run, by their names."""
        if target.file:
            if len(seeds) > 1:
                raise UserError(
                    f"--out '{target.file}' is a file, for {len(seeds)} pictures; with --cluster give a folder",
                    field="out",
                )
            return cls(target, [target.file])
        record = target.folder / RUN_RECORD
        if record.exists():
            first = first_of_record(record, digest)
        else:
            first = target.next_number()
            write_record(record, digest, first, len(seeds), drawn)
        return cls(target, [target.path_of(first + index, seed) for index, seed in enumerate(seeds)])

    @classmethod
    def named(cls, folder: Path, digest: str, names: list[str], drawn: dict[str, int]) -> ListRun:
        """As `begin`, with files of these names. A new run removes those of an older one."""
        record, paths = folder / RUN_RECORD, [folder / name for name in names]
        if record.exists():
            first_of_record(record, digest)
        else:
            for path in paths:
                path.unlink(missing_ok=True)
            write_record(record, digest, 0, len(paths), drawn)
        return cls(Target(folder), paths)

    def left(self, batches: Sequence[ListedBatch]) -> list[ListedBatch]:
        """Those with a picture that is not there. Batches stay whole, for the same pictures to the last bit."""
        if self.target.file:
            return list(batches)
        return [batch for batch in batches if not all(self.paths[number].exists() for number in batch.numbers)]

    def write(self, number: int, picture: PictureFile) -> Path | None:
        """The file of a picture; None if it is there already."""
        from plainsd.pictures.images import write_new_file

        path = self.paths[number]
        if not self.target.file and path.exists():
            return None
        return write_new_file(picture, path)

    def finish(self) -> None:
        if not self.target.file:
            (self.target.folder / RUN_RECORD).unlink(missing_ok=True)

    def remove(self) -> None:
        """Its pictures and its record, and the folder if nothing else is in it."""
        for path in self.paths:
            path.unlink(missing_ok=True)
        self.finish()
        with suppress(OSError):
            self.target.folder.rmdir()


def write_record(record: Path, digest: str, first: int, pictures: int, seeds: dict[str, int]) -> None:
    with written_whole(record) as draft:
        data = {"digest": digest, "first": first, "pictures": pictures, "seeds": seeds}
        draft.write_text(json.dumps(data) + "\n", "utf-8")


def seed_of_record(folder: Path, name: str) -> int | None:
    """Of the run that stopped in this folder: what `--seed random` was there. None if there is no such run."""
    try:
        return int(parsed_json((folder / RUN_RECORD).read_text("utf-8"))["seeds"][name])
    except (OSError, ValueError, LookupError, TypeError):
        return None  # a record that cannot be read is named by `begin`


def first_of_record(record: Path, digest: str) -> int:
    """The number of the first file of the run that stopped."""
    try:
        data = parsed_json(record.read_text("utf-8"))
        same, first = data["digest"] == digest, int(data["first"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"cannot read {record} ({error}); delete it to begin anew", field="out") from None
    if not same:
        raise UserError(
            f"'{record.parent}' has an unfinished run of other prompts, flags or files; repeat that command, "
            f"give another --out, or delete {record}",
            field="out",
        )
    return first


def digest_of_run(setup: DrawingSetup, prompts: list[str], choices: dict[str, Any]) -> str:
    """Of all that decides how the pictures look. Files count by their names, sizes and times."""
    command = {name: value for name, value in asdict(setup.command).items() if name not in NOT_COMPARED}
    names = [setup.loras, setup.embeddings, setup.noise, setup.controls, setup.image_prompts]
    files = [stamp(path) for path in files_read(setup)]
    return hashlib.sha256(repr((command, prompts, sorted(choices.items()), names, files)).encode()).hexdigest()


def files_read(setup: DrawingSetup) -> list[Path]:
    """The files and folders of models, adapters and pictures, those that are on this machine; a model of the Hub has
    its name alone."""
    command = setup.command
    named: list[Any] = [command.model or find(None), command.vae, command.refiner, upscaler_file(command)]
    named += [path for path, _ in (*setup.loras, *setup.embeddings)]
    named += [from_flag(text, "control")[0] for text in command.control]
    named += [from_flag(text, "image-prompt")[0] for text in command.image_prompt]
    named += [*command.image_encoder, *command.control_image, *command.image_prompt_image, *command.image_prompt_mask]
    named += [command.image, command.mask]
    return [Path(name) for name in named if name and Path(name).exists()]


def stamp(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of a file, or of all those in a folder."""
    found = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [(str(file), stat.st_size, stat.st_mtime_ns) for file in found for stat in [file.stat()]]


def generate_on_cluster(
    setup: DrawingSetup,
    draws: list[Callable],
    prompts: list[str],
    choices: dict[str, Any],
    batches: list[PromptBatch],
    run: ListRun,
) -> Iterator[Path]:
    """Draws what is left of a run; the files as they are written."""
    from tqdm import tqdm

    left = run.left(listed_batches(len(draws), batches))
    make = partial(ListDrawer, setup, draws, prompts, choices, run.paths[0].suffix)
    try:
        with tqdm(unit="step", disable=None, dynamic_ncols=True) as bar:
            for batch, finished in drawn_on_cluster(setup.command.ray, make, left, bar):
                for number, picture in zip(batch.numbers, finished.pictures, strict=True):
                    if (path := run.write(number, picture)) is not None:
                        yield path
    except TaskError as error:
        raise UserError(
            f"a worker failed ({error}); repeat the command, and in the same folder it goes on where it stopped"
        ) from None


def draw_rows(
    command: GenerateFlags, prompts: list[str], rows: list[dict[str, Any]], seed: int, batch: int, folder: Path
) -> ListRun:
    """Draws the prompts with each of some settings, for `plainsd eval`: prompt k with seed + k, in the batches of one
    process. The run is not marked as finished."""
    from plainsd.generate import text_to_image

    command.ray.join()
    loras = chosen_loras(command.lora, {}, None)
    setup = DrawingSetup(command, command.device, loras, [], noise_flags(command, {}), (), ())
    batches = [
        (prompts[start : start + batch], row | {"seed": seed + start})
        for row in rows
        for start in range(0, len(prompts), batch)
    ]
    names = [f"{index:05d}{f'-{row}' if row else ''}.png" for row in range(len(rows)) for index in range(len(prompts))]
    run = ListRun.named(folder, digest_of_run(setup, prompts, {"rows": rows, "seed": seed}), names, {"seed": seed})
    for _ in generate_on_cluster(setup, [text_to_image], prompts, {}, batches, run):
        pass
    return run


def listed_batches(draws: int, batches: list[PromptBatch]) -> list[ListedBatch]:
    """All batches for each of so many tasks, their pictures numbered through."""
    listed, start = [], 0
    for draw in range(draws):
        for batch in batches:
            listed.append(ListedBatch(draw, batch, range(start, start + len(batch[0]))))
            start += len(batch[0])
    return listed


def drawn_on_cluster(
    flags: ClusterFlags, make: Callable[[], Tool], tasks: Sequence[Any], bar: Any
) -> Iterator[tuple[Any, FinishedBatch]]:
    """Tasks with what came of them, as they are finished. `bar` shows their steps."""
    if not tasks:
        return
    share = flags.join()
    shown: set[str] = set()
    steps = [Loaded("", 0)] * len(tasks)
    done = [0] * len(tasks)
    for task, event in TaskList(make, share, flags.workers or 1, tasks).events():
        if isinstance(event, Loaded):
            steps[task] = event
            if event.text and event.text not in shown:
                shown.add(event.text)
                print(event.text, end="", file=sys.stderr)
            bar.total = sum(one.steps for one in steps) * len(tasks) // sum(one.steps > 0 for one in steps)
        elif isinstance(event, Stepped):
            done[task] += event.steps
        elif isinstance(event, Again):
            done[task] = 0
        else:
            done[task] = steps[task].steps
            yield tasks[task], event
        bar.update(sum(done) - bar.n)
