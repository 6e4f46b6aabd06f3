"""The Python of a chapter, for figures that show what it makes."""

import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

DOCS = Path(__file__).parents[1]
sys.path.insert(0, str(DOCS / "scripts"))

from pages import blocks  # noqa: E402


def names_of(chapter: str, wanted: str, **longer: str) -> dict[str, Any]:
    """Runs a chapter's blocks in order, in a folder of its own, to the end of the one that prints or defines `wanted`
    (a piece of its text). The names that they leave. `longer`: settings to replace, such as steps="60" for steps=12,
    where a figure has more time than a reader. ValueError where there is no such block or setting."""
    names: dict[str, Any] = {}
    here = Path.cwd()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(folder)
        try:
            for code in blocks(_with(longer, (DOCS / chapter).read_text("utf-8")), "python"):
                exec(compile(code, chapter, "exec"), names)
                if wanted in code:
                    return names
        finally:
            os.chdir(here)
    raise ValueError(f"{chapter} has no Python block with {wanted!r}")


def _with(settings: dict[str, str], text: str) -> str:
    for name, value in settings.items():
        text, count = re.subn(rf"\b{name}=[\d.]+", f"{name}={value}", text, count=1)
        if not count:
            raise ValueError(f"no setting {name} in the chapter")
    return text
