"""`plainsd bench`: our speed compared with others', on this machine."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional

from plainsd.arguments import Switch
from plainsd.commands.flags import flag
from plainsd.errors import UserError, unknown

if TYPE_CHECKING:
    from plainsd.reports.bench import Timing


@dataclass
class Bench:
    """Times the same work in diffusers, OpenVINO (if installed) and plainsd, in turns, and prints a table of seconds.

    Needs the extra [bench], and an otherwise idle machine.
    """

    rows: Annotated[Positional[tuple[str, ...]], flag("ROW")] = ()
    """small, unet, decode, picture, load, start, first; on a GPU also 30 steps of 1 or 8 pictures with random weights:
    sd1-1, sd1-8, sdxl-1, sdxl-8. Default: all these rows for the device. decode-memory, small-memory and train-memory
    compare glibc's own handling of freed memory with keeping it"""
    model: Annotated[Path | None, flag("FOLDER")] = None
    """an SD 1.x model in diffusers layout; random weights of the same shapes if not given"""
    rounds: Annotated[int, flag("N")] = 5
    """rounds per side"""
    compile: Switch = False
    """also time torch.compile, which takes minutes to compile"""
    out: Annotated[Path | None, flag("FOLDER")] = None
    """where to write bench.json and bench.png"""
    device: str = "auto"
    dtype: str = "auto"

    def run(self) -> None:
        import importlib.util

        if missing := [name for name in ("diffusers", "transformers") if importlib.util.find_spec(name) is None]:
            raise UserError(f"bench needs {' and '.join(missing)}; pip install 'plainsd[bench]'")
        if self.rounds < 1:
            raise UserError(f"rounds {self.rounds} is out of range; give 1 or more", field="rounds", value=self.rounds)

        from plainsd.commands.output import check_writable
        from plainsd.device import choose_device, choose_dtype
        from plainsd.reports import bench

        known = bench.BENCHMARKS | bench.ALLOCATOR_BENCHMARKS | bench.GPU_BENCHMARKS
        for name in self.rows:
            if name not in known:
                raise unknown("row", name, known, field="rows")
        if self.out:
            check_writable(self.out)
            check_charts()
        device = choose_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        if self.model is not None:
            bench.check_model(self.model)
        with tempfile.TemporaryDirectory() as temporary:
            all_rows = bench.BENCHMARKS | ({} if device.type == "cpu" else bench.GPU_BENCHMARKS)
            left_out = () if Path("/proc/self/status").exists() else ("load",)  # it reads its memory there
            wanted = self.rows or tuple(name for name in all_rows if name not in left_out)
            rows, folder = [], self.model or Path(temporary) / "sd1"  # shared by the rows
            if self.model is None and set(wanted) & {"unet", "decode", "picture", "load", "decode-memory"}:
                print("making random weights of SD 1.5", file=sys.stderr)
                bench.random_folder(folder, dtype)
            workbench = bench.Workbench(folder, dtype, device, self.rounds, Path(temporary))
            about = bench.machine(workbench)
            print(table_head(about), flush=True)
            for name in wanted:
                print(f"timing {name}", file=sys.stderr)
                rows.append(known[name](workbench, self.compile))
                print(table_row(rows[-1]), flush=True)  # at once: a later row may fail
        if self.out:
            from plainsd.disk import written_whole

            with written_whole(self.out / "bench.json") as path:
                path.write_text(as_json(rows, about), encoding="utf-8")
            if bars := bars_of(rows):
                with written_whole(self.out / "bench.png") as path:
                    plot(bars, about, path)


def table_head(about: dict[str, object]) -> str:
    """Of a Markdown table: what was measured on, and the names of the columns."""
    lines = [
        ", ".join(f"{name} {value}" for name, value in about.items()),
        "",
        "| work | by | least s | median s | first s | diffusers / this | relative error | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines)


def table_row(row: Timing) -> str:
    """Its sides, a line each. The ratio is to diffusers; empty without."""
    lines, base = [], row.seconds.get("diffusers")
    for side, seconds in row.seconds.items():
        error = f"{row.errors[side]:.1e}" if side in row.errors else ""
        peak = f"{row.peaks[side] / 1e9:.2f} GB" if side in row.peaks else ""
        first = f"{row.first[side]:.1f}" if side in row.first else ""
        ratio = f"{min(base) / min(seconds):.2f}" if base else ""
        lines.append(
            f"| {row.name} | {side} | {min(seconds):.3f} | {statistics.median(seconds):.3f} | {first} | "
            f"{ratio} | {error} | {peak} |"
        )
    return "\n".join(lines)


def timing_table(rows: list[Timing], about: dict[str, object]) -> str:
    """The timings as a Markdown table."""
    return "\n".join([table_head(about), *map(table_row, rows)]) + "\n"


def check_charts() -> None:
    """UserError without matplotlib."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the bar chart of --out needs matplotlib; pip install 'plainsd[bench]'")


def bars_of(rows: list[Timing]) -> list[tuple[str, float]]:
    """Names and speeds relative to diffusers, of the rows that it has a side in; the last first."""
    return [
        (f"{row.name}: {side}", min(row.seconds["diffusers"]) / min(seconds))
        for row in reversed(rows)
        if "diffusers" in row.seconds
        for side, seconds in reversed(row.seconds.items())
        if side != "diffusers"
    ]


def plot(bars: list[tuple[str, float]], about: dict[str, object], path: Path) -> None:
    """Bar chart of speed relative to diffusers, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.3 * len(bars)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh([name for name, _ in bars], [ratio for _, ratio in bars])
    axes.bar_label(drawn, [f"{ratio:.2f}" for _, ratio in bars], padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlim(0, min(4.0, 1.15 * max(ratio for _, ratio in bars)))  # longer bars are clipped
    axes.set_xlabel("times diffusers' speed")
    axes.set_title(f"{about['device']}, {about['threads']} threads, {about['dtype']}", fontsize=8)
    figure.savefig(path, dpi=120, format="png")


def as_json(rows: list[Timing], about: dict[str, object]) -> str:
    return json.dumps({"machine": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
