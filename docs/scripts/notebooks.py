"""Writes docs/notebooks/: a Jupyter notebook for each page of docs/ that has Python to run.

    make notebooks      # or: .venv/bin/python docs/scripts/notebooks.py

jupytext makes them of the same Markdown. They are committed without outputs: those differ between processors and
versions, and the text already says what is printed. The Python of a page becomes cells; its other blocks stay text.
An answer to an exercise stays folded, and its code is text too, so that "run all" neither runs nor reveals it; below
it is an empty cell to work in. Links and pictures lead to GitHub, since Colab has no files beside the notebook.
"""

import os
import re
from pathlib import Path

import jupytext
import nbformat
from pages import ANSWER, DOCS, GITHUB, LINK, ROOT, blocks, fences, outside_fences

NOTEBOOKS = DOCS / "notebooks"
INSTALL = f"""```python
try:
    import plainsd
except ModuleNotFoundError:
    %pip install --quiet "plainsd[train] @ git+{GITHUB}"
```
"""
REGION = "<!-- #region -->\n{}\n<!-- #endregion -->\n"


def sources() -> list[Path]:
    """The pages that become notebooks: those with Python to run."""
    pages = sorted(page for page in DOCS.glob("*.md") if page.name != "README.md")
    return [page for page in pages if blocks(page.read_text("utf-8"), "python")]


def notebook_of(page: Path) -> Path:
    return NOTEBOOKS / f"{page.stem}.ipynb"


def colab(page: Path) -> str:
    """The address that opens a page's notebook in Google Colab."""
    path = notebook_of(page).relative_to(ROOT).as_posix()
    return f"https://colab.research.google.com/{GITHUB.removeprefix('https://').replace('.com', '')}/blob/main/{path}"


def absolute(link: re.Match) -> str:
    """A link as it is on GitHub, whatever the folder it is read in."""
    target, folder = link["target"], link["bracket"].startswith("!") and "raw" or "blob"
    if re.match(r"[a-z]+:|#", target):
        return link[0]
    inside = os.path.normpath(f"docs/{target}")
    return f"{link['bracket']}({GITHUB}/{folder}/main/{inside}{link['title']})"


def cells_text(text: str) -> str:
    """The page as jupytext should read it: what is no cell stands in regions, which stay one cell of text."""
    text = outside_fences(text, lambda part: LINK.sub(absolute, part))
    text = re.sub(r"\n*" + ANSWER.pattern + r"\n*", _folded, text, flags=ANSWER.flags)
    lines, parts, end = text.splitlines(keepends=True), [], 0
    for fence in fences(text):
        block, before = "".join(lines[fence.lines]), "".join(lines[end : fence.lines.start])
        inside = before.count("<!-- #region -->") > before.count("<!-- #endregion -->")
        runs = fence.language == "python" and not block.startswith(" ")
        parts += [before, block if inside or runs else REGION.format(block)]
        end = fence.lines.stop
    return INSTALL + "\n" + "".join([*parts, *lines[end:]])


def _folded(answer: re.Match) -> str:
    return "\n\n" + REGION.format(answer[0].strip("\n")) + "\n```python\n# try it here\n```\n\n"


def notebook(page: Path) -> str:
    """A page's notebook, as the text of its file: the same whenever it is made."""
    made = jupytext.reads(cells_text(page.read_text("utf-8")), fmt="md")
    for number, cell in enumerate(made.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})
    made.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    })  # fmt: skip
    made.nbformat, made.nbformat_minor = 4, 5
    return nbformat.writes(made) + "\n"


def index() -> str:
    """The section of docs/README.md that opens each notebook."""
    rows = []
    for page in sources():
        title = page.read_text("utf-8").split("\n", 1)[0].removeprefix("# ")
        rows.append(f"- [{title}](notebooks/{notebook_of(page).name}), [in Colab]({colab(page)})\n")
    return "".join(["<!-- notebooks -->\n", *rows, "<!-- written by `make notebooks` -->"])


def with_index(text: str) -> str:
    return re.sub(r"<!-- notebooks -->.*<!-- written by `make notebooks` -->", lambda _: index(), text, flags=re.DOTALL)


def main() -> None:
    NOTEBOOKS.mkdir(exist_ok=True)
    for old in NOTEBOOKS.glob("*.ipynb"):
        old.unlink()
    for page in sources():
        notebook_of(page).write_text(notebook(page), "utf-8")
    readme = DOCS / "README.md"
    readme.write_text(with_index(readme.read_text("utf-8")), "utf-8")
    print(f"{len(sources())} notebooks in {NOTEBOOKS}")


if __name__ == "__main__":
    main()
