"""Make a 128-pixel model of scenes of emoji in one command: set, autoencoder, UNet with text encoder, scores.

    python recipes/emoji/train.py --preset cpu      two cores, about eight hours, in pieces if need be
    python recipes/emoji/train.py --preset gpu      one large GPU, twelve minutes with everything
    python recipes/emoji/train.py --preset tiny     the whole way at 32 pixels, within a minute: does it work here?

    OUT/set/      concepts.json and tokenizer
    OUT/vae/      the run of the autoencoder
    OUT/emoji/    the run of UNet and text encoder; OUT/emoji/emoji is the model
    OUT/scores/   what `plainsd eval` says, and its sheets

A stage that is done is skipped, and one that was interrupted goes on where it was. How many steps a stage takes is
measured: it begins with a few, and its share of --minutes is divided by the time that each of those took. The answer
is kept in OUT/plan.json with these minutes, and other ones do not change it later.
"""

import argparse
import json
import math
import os
import runpy
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from plainsd.cli import exit_code
from plainsd.cli import main as plainsd
from plainsd.disk import read_json, written_whole
from plainsd.errors import UserError

HERE = Path(__file__).parent
CELLS = 16  # of a side: sizes and places are multiples of a latent's width at 128 pixels
PROBE = 60  # steps that are timed, by the last LOG of them
LOG = 20
RESULTS = {"vae": "vae/vae/config.json", "scratch": "emoji/emoji/model_index.json"}  # in OUT; a run writes them last
TINY = {
    "name": "tiny",
    "size": 32,
    "prediction": "v_prediction",
    "spacing": "trailing",
    "schedule": {"zero_terminal_snr": True},
    "steps": 4,
    "unet": {"channels": [32, 32], "depth": [0, 1], "heads": [2, 2], "layers": 1, "context": 32, "groups": 8},
    "vae": {"channels": [8, 16], "layers": 1, "groups": 4},
    "text": [{"width": 32, "layers": 1, "heads": 2, "mlp": 64, "positions": 48}],
}
TINY_NAMES = "owl fox rocket pizza key ghost robot castle fire rose guitar crown".split()


@dataclass(frozen=True)
class Preset:
    minutes: float  # in all
    shares: tuple[float, float]  # of the minutes: autoencoder; UNet and text encoder
    scenes: int  # of an epoch
    heldout: int
    prompts: int  # of the scores
    workers: int
    vae: tuple[str, ...]
    scratch: tuple[str, ...]
    steps: tuple[int, int] | None = None  # instead of minutes
    size: int = 128


USUAL = ("--beta2", "0.99", "--warmup", "200", "--log-every", str(LOG))
CORES = os.cpu_count() or 2
PRESETS = {
    "cpu": Preset(
        minutes=480,
        shares=(0.25, 0.68),
        scenes=80_000,
        heldout=500,
        prompts=1024,
        workers=1,
        vae=("--batch", "16", "--lr", "1.5e-3", "--ema", "0.998", "--kl-weight", "3e-4", *USUAL),
        scratch=("--batch", "64", "--lr", "1.2e-3", "--ema", "0.999", *USUAL),
    ),
    "gpu": Preset(
        minutes=12,
        shares=(0.25, 0.55),
        scenes=200_000,
        heldout=500,
        prompts=256,
        workers=max(2, CORES - 2),
        vae=("--batch", "64", "--lr", "2e-3", "--ema", "0.998", "--kl-weight", "3e-4", *USUAL),
        scratch=("--batch", "256", "--lr", "1.5e-3", "--ema", "0.999", "--live-latents", *USUAL),
    ),
    "tiny": Preset(
        minutes=1,
        shares=(0.3, 0.5),
        scenes=64,
        heldout=8,
        prompts=16,
        workers=1,
        vae=("--batch", "8", "--lr", "2e-3", *USUAL),
        scratch=("--batch", "8", "--lr", "1e-3", *USUAL),
        steps=(20, 20),
        size=32,
    ),
}


@dataclass(frozen=True)
class Recipe:
    """One call: the preset, and where."""

    name: str
    preset: Preset
    out: Path
    font: Path | None
    device: str

    @property
    def concepts(self) -> Path:
        return self.out / "set" / "concepts.json"

    @property
    def network(self) -> Path:
        return self.out / "model.json"

    @property
    def model(self) -> Path:
        return self.out / "emoji" / "emoji"


# ---- stages ----------------------------------------------------------------------------------------------------------


def make_set(recipe: Recipe) -> None:
    preset = recipe.preset
    options = [
        "--set",
        "--size",
        str(preset.size),
        "--cells",
        str(CELLS),
        "--count",
        str(preset.scenes),
        "--heldout-count",
        str(preset.heldout),
    ]
    if recipe.name == "tiny":
        write(recipe.out / "names.txt", "\n".join(TINY_NAMES) + "\n")
        options += ["--names", str(recipe.out / "names.txt"), "--heldout-share", "0.2"]
    options += ["--font", str(recipe.font)] if recipe.font else []
    checked(runpy.run_path(str(HERE / "data.py"))["main"]([str(recipe.out / "set"), *options]))
    described = json.dumps(TINY) if recipe.name == "tiny" else (HERE / "model128.json").read_text("utf-8")
    write(recipe.network, described)


def train(recipe: Recipe, method: str) -> None:
    """To the end of its share of the time; the steps are those of the plan, or found by a probe."""
    number, folder = (0, "vae") if method == "vae" else (1, "emoji")
    plan, minutes = read_plan(recipe), recipe.preset.minutes
    if recipe.preset.steps:
        plan[method] = recipe.preset.steps[number]
    elif method not in plan:
        if not run_training(recipe, method, folder, PROBE):
            return  # a signal stopped it
        rate = pictures_a_second(recipe.out / folder)
        batch = int(getattr(recipe.preset, method)[1])
        seconds = 60 * minutes * recipe.preset.shares[number]
        plan[method] = max(PROBE, round(rate * seconds / batch))
        plan["minutes"] = plan.get("minutes", {}) | {method: minutes}
        print(f"{method}: {rate:.1f} pictures a second, {plan[method]} steps in {seconds / 60:.1f} minutes", flush=True)
    elif (planned := plan.get("minutes", {}).get(method, minutes)) != minutes:
        print(f"{method}: {plan[method]} steps, as planned with --minutes {planned:g}, not {minutes:g}", flush=True)
    write_plan(recipe, plan)
    if run_training(recipe, method, folder, plan[method]):
        write_plan(recipe, plan | {"done": sorted({*plan.get("done", []), method})})


def read_plan(recipe: Recipe) -> dict:
    """The steps of each method; under "minutes" what they were found for, under "done" the methods at their end."""
    path = recipe.out / "plan.json"
    return read_json(path, "remove it, and the steps are measured again") if path.is_file() else {}


def write_plan(recipe: Recipe, plan: dict) -> None:
    write(recipe.out / "plan.json", json.dumps(plan) + "\n")


def run_training(recipe: Recipe, method: str, folder: str, steps: int) -> bool:
    """Whether it wrote its result; where a signal stops it, it does not, though its exit code may be 0."""
    before = written_at(recipe.out / RESULTS[method])
    preset, data = recipe.preset, f"emoji:{recipe.concepts}"
    options = ["train", "--method", method, "--data", data, "--heldout", data, "--out", str(recipe.out / folder)]
    options += ["--model", str(recipe.network), "--workers", str(preset.workers), "--steps", str(steps)]
    options += ["--device", recipe.device, "--validate-every", str(max(100, steps // 10))]
    options += ["--sample-every", str(max(100, steps // 5)), "--save-every", "500", *getattr(preset, method)]
    if method == "scratch":
        options += ["--vae", str(recipe.out / "vae" / "vae"), "--tokenizer", str(recipe.out / "set" / "tokenizer")]
        options += ["--carry", str(recipe.concepts)]
    checked(plainsd(options))
    return written_at(recipe.out / RESULTS[method]) not in (None, before)


def written_at(path: Path) -> int | None:
    """In nanoseconds; None where there is no such file."""
    return path.stat().st_mtime_ns if path.is_file() else None


def score(recipe: Recipe) -> None:
    scores = recipe.out / "scores"
    options = ["eval", str(recipe.model), "--prompts", str(recipe.preset.prompts), "--out", str(scores)]
    options += ["--sheet", str(scores / "sheet.png"), "--device", recipe.device]
    options += ["--font", str(recipe.font)] if recipe.font else []
    options += ["--steps", str(TINY["steps"])] if recipe.name == "tiny" else []
    checked(plainsd(options))


def make(recipe: Recipe) -> int:
    """Every stage that is not done; 0, or 130 where one was stopped."""
    print(machine_text(recipe.device), flush=True)
    stages = (
        ("set", recipe.network, lambda: make_set(recipe)),
        ("autoencoder", recipe.out / RESULTS["vae"], lambda: train(recipe, "vae")),
        ("UNet and text encoder", recipe.out / RESULTS["scratch"], lambda: train(recipe, "scratch")),
        ("scores", recipe.out / "scores" / "scores.json", lambda: score(recipe)),
    )
    for name, result, run in stages:
        if is_done(recipe, name, result):
            print(f"{name}: done before", flush=True)
            continue
        began = time.monotonic()
        run()
        if not is_done(recipe, name, result):
            print(f"{name}: stopped; the same command goes on from there", flush=True)
            return 130
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return 0


def is_done(recipe: Recipe, name: str, result: Path) -> bool:
    """Whether a stage's result is there, and is that of its end: a probe writes one too."""
    method = {"autoencoder": "vae", "UNet and text encoder": "scratch"}.get(name)
    return result.is_file() and (method is None or method in read_plan(recipe).get("done", []))


# ---- what a run's log says -------------------------------------------------------------------------------------------


def log_lines(folder: Path) -> list[dict]:
    from plainsd.train.log import read_log

    return read_log(folder / "log.jsonl")


def pictures_a_second(folder: Path) -> float:
    return next(line["samples_per_s"] for line in reversed(log_lines(folder)) if "samples_per_s" in line)


def machine_text(device: str) -> str:
    """`cpu, bfloat16 (AMX), 2 cores`."""
    from plainsd.device import choose_device, choose_dtype
    from plainsd.speed.kernels import amx

    chosen = choose_device(device)
    dtype = str(choose_dtype("auto", chosen)).removeprefix("torch.")
    if chosen.type == "cpu":
        dtype += " (AMX)" if amx() else " (no AMX: several times slower than with it)"
    return f"{chosen}, {dtype}, {CORES} cores"


# ---- shards ----------------------------------------------------------------------------------------------------------


def shard_weights(folder: Path, most: int) -> None:
    """Splits each file of weights above `most` bytes into several with an index, as diffusers does; a tensor that is
    larger alone is in a file of its own."""
    from plainsd.files.tensorfile import open_tensors, write_safetensors

    for path in sorted(folder.rglob("*.safetensors")):
        if path.stat().st_size <= most or "-of-" in path.name:
            continue
        file, parts, room = open_tensors(path), [], 0
        for name, stored in file.tensors.items():
            size = stored.nbytes
            if not parts or room + size > most - HEADER:
                parts.append({})
                room = 0
            parts[-1][name] = stored
            room += size
        names = [f"{path.stem}-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
        for name, tensors in zip(names, parts, strict=True):
            write_safetensors(path.with_name(name), tensors)
        weights = {tensor: name for name, tensors in zip(names, parts, strict=True) for tensor in tensors}
        total = sum(stored.nbytes for stored in file.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weights}
        write(path.with_name(f"{path.name}.index.json"), json.dumps(index, indent=1) + "\n")
        path.unlink()


HEADER = 2**17  # bytes left for a shard's header


# ---- the command -----------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    with written_whole(path) as draft:
        draft.write_text(text, encoding="utf-8")


class Stopped(Exception):
    """A command ended with this exit code; it has said why."""


def checked(code: int | None) -> None:
    if code:
        raise Stopped(code)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji128"))
    parser.add_argument("--minutes", type=float, help="in all, instead of the preset's")
    parser.add_argument("--workers", type=int, help="processes that draw scenes, instead of the preset's")
    parser.add_argument("--prompts", type=int, help="of the scores, instead of the preset's")
    parser.add_argument("--shards", type=float, metavar="MIB", help="at the end, split weights into files of this size")
    parser.add_argument("--font", type=Path, help="the Noto Color Emoji font, if not at Debian's path")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(argv)
    return exit_code(lambda: run(options), "train.py")


def run(options: argparse.Namespace) -> int:
    changes = {name: getattr(options, name) for name in ("minutes", "workers", "prompts")}
    preset = replace(PRESETS[options.preset], **{name: value for name, value in changes.items() if value is not None})
    recipe = Recipe(options.preset, preset, options.out, options.font, options.device)
    check_numbers(options)
    if options.font:
        os.environ["PLAINSD_EMOJI_FONT"] = str(options.font)
    check_preset(recipe)
    try:
        code = make(recipe)
    except Stopped as stopped:
        return int(str(stopped))
    if code == 0 and options.shards is not None:
        shard_weights(recipe.model, int(options.shards * 2**20))
    return code


def check_numbers(options: argparse.Namespace) -> None:
    """At the door, not after hours."""
    for name, is_right, remedy in (
        ("minutes", lambda number: 0 < number < math.inf, "give a number above 0"),  # NaN is refused too
        ("shards", lambda number: 0 < number < math.inf, "give a number above 0"),
        ("workers", lambda number: number >= 0, "give 0 or more"),
        ("prompts", lambda number: number >= 2, "give at least 2, one of a seen and one of a held-out pair"),
    ):
        value = getattr(options, name)
        if value is not None and not is_right(value):
            raise UserError(f"--{name} {value:g} is out of range; {remedy}")
    if options.minutes is not None and PRESETS[options.preset].steps:
        raise UserError(
            f"--minutes {options.minutes:g}: --preset {options.preset} counts steps, not time; leave it out"
        )


def check_preset(recipe: Recipe) -> None:
    """A folder belongs to one preset."""
    path = recipe.out / "preset.txt"
    before = path.read_text("utf-8").strip() if path.is_file() else recipe.name
    if before != recipe.name:
        raise UserError(f"{recipe.out} was begun with --preset {before}; give that again, or another --out")
    write(path, recipe.name + "\n")


if __name__ == "__main__":
    sys.exit(main())
