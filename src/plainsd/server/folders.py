"""Folders of adapters: files by name, and by nothing else."""

from collections import Counter
from pathlib import Path

from plainsd.listing import files_below, suffix_of


def named_files(folder: Path | None) -> dict[str, Path]:
    """The .safetensors files in a folder by their names, or by their places below it where two have one name."""
    if folder is None:
        return {}
    paths = [path for path in files_below(folder) if suffix_of(path) == ".safetensors" and path.is_file()]
    stems = Counter(path.stem for path in paths)
    places = [path.relative_to(folder).with_suffix("").as_posix() for path in paths]
    return {path.stem if stems[path.stem] == 1 else place: path for path, place in zip(paths, places, strict=True)}
