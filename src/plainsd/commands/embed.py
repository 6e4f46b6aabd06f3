"""`plainsd embed`: CLIP embeddings of a folder's pictures, and near-duplicates among them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from plainsd.commands.flags import flag
from plainsd.errors import UserError


@dataclass
class Embed:
    """Writes the CLIP embeddings of a folder of pictures, and lists near-duplicates: for cleaning training data."""

    folder: Annotated[Positional[Path], flag("FOLDER")]
    """pictures; subfolders count"""
    clip: Annotated[str | None, flag("CLIP")] = None
    """a whole CLIP: folder, file or Hub id, such as openai/clip-vit-large-patch14"""
    out: Annotated[Path | None, flag("FILE")] = None
    """where to write the embeddings: .npz (arrays files and embeddings) or .safetensors"""
    duplicates: Annotated[float, flag("COSINE")] = 0.95
    """cosine from which two pictures count as near-duplicates, 0 to 1"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""

    def run(self) -> None:
        if self.clip is None:
            raise UserError("embed needs a CLIP; give one with --clip, such as openai/clip-vit-large-patch14",
                            field="clip")  # fmt: skip
        if not 0 <= self.duplicates <= 1:
            raise UserError(
                f"duplicates {self.duplicates} is out of range; choose a cosine from 0 to 1",
                field="duplicates",
                value=self.duplicates,
            )
        from tqdm import tqdm

        from plainsd.checkpoint import load_clip
        from plainsd.commands.output import check_writable
        from plainsd.reports.embeddings import (
            check_embeddings_file,
            embedded,
            near_duplicates,
            pictures_in,
            write_embeddings,
        )

        if self.out:
            check_embeddings_file(self.out)
            check_writable(self.out.parent)
        paths = pictures_in(self.folder)
        clip = load_clip(self.clip, self.device)
        with tqdm(total=len(paths), unit="picture", disable=None, dynamic_ncols=True) as bar:
            read, embeddings = embedded(clip, paths, lambda line: tqdm.write(line, file=sys.stderr), bar.update)
        names = [path.relative_to(self.folder).as_posix() for path in read]
        if self.out:
            write_embeddings(self.out, names, embeddings)
        found = near_duplicates(embeddings, self.duplicates)
        for one in found:
            print(f"{one.cosine:.4f}  {names[one.picture]}  is like  {names[one.like]}")
        print(
            f"{len(found)} of {len(names)} pictures are near-duplicates of earlier ones (cosine {self.duplicates:g} or "
            f"more){f'; embeddings are in {self.out}' if self.out else ''}",
            file=sys.stderr,
        )
