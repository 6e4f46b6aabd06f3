"""`plainsd bench`: our speed beside that of others, on this machine."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from plainsd.errors import UserError, unknown


@dataclass
class Bench:
    """The same work by diffusers, by OpenVINO where it is installed, and by plainsd, taking turns; a table of seconds.

    Needs the extra [bench]. Let the machine do nothing else meanwhile.
    """

    rows: Annotated[Positional[tuple[str, ...]], arg(metavar="ROW")] = ()
    """small, unet, decode, picture, load, start; all if none is given"""
    model: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """a diffusers folder of SD 1.x; random weights of that shape if not given"""
    rounds: Annotated[int, arg(metavar="N")] = 5
    """turns of each side"""
    compile: bool = False
    """a side with torch.compile too, which first takes minutes"""
    out: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """bench.json and bench.png are written there"""
    device: str = "auto"
    dtype: str = "auto"

    def run(self) -> None:
        import importlib.util

        if missing := [name for name in ("diffusers", "transformers") if importlib.util.find_spec(name) is None]:
            raise UserError(f"the comparison needs {' and '.join(missing)}; pip install 'plainsd[bench]'")
        if self.rounds < 1:
            raise UserError(f"rounds {self.rounds} is out of range; give 1 or more")

        from plainsd import bench
        from plainsd.commands.output import check_writable
        from plainsd.checkpoint import choose_device, choose_dtype

        for name in self.rows:
            if name not in bench.ROWS:
                raise unknown("row", name, bench.ROWS)
        if self.out:
            check_writable(self.out)
        device = choose_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        with tempfile.TemporaryDirectory() as temporary:
            wanted, rows, folder = self.rows or tuple(bench.ROWS), [], self.model or Path(temporary) / "random"
            if self.model is None and set(wanted) & {"unet", "decode", "picture", "load"}:
                print("making random weights of SD 1.5's shape", file=sys.stderr)
                bench.random_folder(folder, dtype)
            place = bench.Place(folder, dtype, device, self.rounds)
            for name in wanted:
                print(f"timing {name}", file=sys.stderr)
                rows.append(bench.ROWS[name](place, self.compile))
        about = bench.machine(place)
        print(bench.table(rows, about), end="")
        if self.out:
            from plainsd.images import written_whole

            self.out.mkdir(parents=True, exist_ok=True)
            with written_whole(self.out / "bench.json") as path:
                path.write_text(bench.as_json(rows, about), encoding="utf-8")
            with written_whole(self.out / "bench.png") as path:
                bench.plot(rows, about, path)
