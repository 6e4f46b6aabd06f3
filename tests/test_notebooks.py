"""The notebooks in docs/notebooks: made of the pages as they are now, and they run."""

import re

import nbformat
import notebooks
import pytest
from nbclient import NotebookClient
from pages import DOCS, ROOT, answers, blocks

PAGES = notebooks.sources()
EACH = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
EXAMPLE = (
    "# A page\n\nText with $\\sigma_t$ and ![a figure](figures/x.svg), [a file](../src/x.py), [a part](#part).\n\n"
    "```python\na = 1\n```\n\n```sh\nplainsd info\n```\n\n$$\n\\frac{a}{b}\n$$\n\n"
    "<details><summary>Answer</summary>\n\nBecause.\n\n```python\nb = 2\n```\n\n</details>\n\nMore.\n"
)


def cells(path):
    return nbformat.read(path, 4).cells


@EACH
def test_committed_notebooks_are_those_of_the_pages(page):
    made = notebooks.notebook(page)
    assert notebooks.notebook_of(page).read_text("utf-8") == made, "run `make notebooks`"
    nbformat.validate(nbformat.reads(made, 4))
    assert all(not cell.outputs for cell in cells(notebooks.notebook_of(page)) if cell.cell_type == "code")


def test_there_are_no_others_and_each_opens_with_one_click():
    assert {path.name for path in notebooks.NOTEBOOKS.iterdir()} == {f"{page.stem}.ipynb" for page in PAGES}
    assert {page.name for page in DOCS.glob("[0-9]*.md")} <= {page.name for page in PAGES}
    readme = (DOCS / "README.md").read_text("utf-8")
    assert notebooks.with_index(readme) == readme, "run `make notebooks`"
    for page in PAGES:
        path = notebooks.notebook_of(page).relative_to(ROOT)
        assert f"https://colab.research.google.com/github/plainsd/plainsd/blob/main/{path}" in readme


@EACH
def test_every_block_is_in_a_notebook_once(page):
    """Code that the page runs is a cell, that of answers is text."""
    text, found = page.read_text("utf-8"), cells(notebooks.notebook_of(page))
    folded = [code for answer in answers(text) for code in blocks(answer, "python")]
    code = [cell.source for cell in found if cell.cell_type == "code"][1:]
    inside = [code for cell in found if cell.cell_type == "markdown" for code in blocks(cell.source, "python")]
    own = [block.strip("\n") for block in blocks(text, "python") if block not in folded]
    assert [one for one in code if one != "# try it here"] + [
        one.strip("\n") for one in inside if one not in folded
    ] == own
    assert [one for one in inside if one in folded] == folded and code.count("# try it here") == len(answers(text))


def test_math_answers_and_links_survive(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(EXAMPLE)
    _, text, code, shell, *rest = nbformat.reads(notebooks.notebook(page), 4).cells
    assert (code.cell_type, code.source) == ("code", "a = 1")
    assert (shell.cell_type, shell.source.strip()) == ("markdown", "```sh\nplainsd info\n```")
    assert "$\\sigma_t$" in text.source and "[a part](#part)" in text.source
    assert "(https://github.com/plainsd/plainsd/raw/main/docs/figures/x.svg)" in text.source
    assert "(https://github.com/plainsd/plainsd/blob/main/src/x.py)" in text.source
    formula, answer, empty, last = rest
    assert formula.source == "$$\n\\frac{a}{b}\n$$" and last.source == "More."
    assert answer.cell_type == "markdown" and re.fullmatch(
        r"<details>.*b = 2\n```\n\n</details>", answer.source.strip(), re.DOTALL
    )
    assert (empty.cell_type, empty.source) == ("code", "# try it here")


QUICK = "1-schedule-and-denoiser"  # the others run as pages in every test run, and as notebooks in the full one


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[] if page.stem == QUICK else pytest.mark.full, id=page.stem) for page in PAGES],
)
def test_notebooks_run(page, tmp_path):
    made = nbformat.read(notebooks.notebook_of(page), 4)
    NotebookClient(made, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    for cell in made.cells:
        promised = re.findall(r"# -> (.*)$", cell.source, re.MULTILINE) if cell.cell_type == "code" else []
        if promised:
            said = "".join(out.text for out in cell.outputs if out.output_type == "stream" and out.name == "stdout")
            assert said.splitlines() == promised
