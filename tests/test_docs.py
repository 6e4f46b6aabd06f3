"""README.md, CONTRIBUTING.md and the chapters in docs/: their Python runs and prints what they say, their commands
exist, what they quote is in the sources, and their links lead somewhere."""

import re
import shlex
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path

import flags
import pytest
import torch
from pages import answers, blocks, fences

from plainsd.adapters.making import KINDS_BY_PARTS
from plainsd.adapters.names import ENDINGS
from plainsd.cli import COMMANDS, parsed
from plainsd.diffusion.samplers import SAMPLERS
from plainsd.models.variants import VARIANTS

ROOT = Path(__file__).parents[1]
ITS_OWN = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES = sorted([*ROOT.glob("docs/*.md"), *ITS_OWN, *ROOT.glob("recipes/*/README.md")])
LANGUAGES = {"", "python", "py", "python client", "sh", "sh serve", "json", "toml", "math", "nginx", "text"}
WITH_EXERCISES = sorted(path.name for path in ROOT.glob("docs/[0-9]*.md"))  # the chapters
EACH = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
COMMAND = re.compile(r"^ *(?:\$ )?(?:\.venv/bin/)?(plainsd (?:.*\\\n)*.*)$", re.MULTILINE)


@pytest.fixture
def tables():
    """What a page registers is taken out again afterwards."""
    before = [(table, dict(table)) for table in (SAMPLERS, VARIANTS, ENDINGS)], list(KINDS_BY_PARTS)
    yield
    for table, entries in before[0]:
        table.clear()
        table.update(entries)
    KINDS_BY_PARTS[:] = before[1]


def promised(code: str) -> list[str]:
    """What the block says that it prints: `# -> ...` beside or below a line."""
    return re.findall(r"# -> (.*)$", code, re.MULTILINE)


def test_the_readme_counts_the_samplers():
    (count,) = re.findall(r"(\d+) samplers, guidance", (ROOT / "README.md").read_text("utf-8"))
    assert int(count) == len(SAMPLERS)


def test_every_flag_is_told():
    """docs/flags.md has the flags of each command as its help has them, and calls none by a name that is none."""
    text = flags.PAGE.read_text("utf-8")
    assert flags.updated(text) == text, "run python docs/scripts/flags.py"
    head, _, tables = text.partition(flags.MARK)
    of_generate = tables.split("## plainsd ")[1]
    assert of_generate.startswith("generate") and of_generate.count("\n| `--") > 80
    named = set(re.findall(r"`(--[a-z-]+)", head))
    assert len(named) > 50 and {name for name in named if f"| `{name}" not in of_generate} == set()


@EACH
def test_python_runs_and_prints_what_it_says(page, tmp_path, monkeypatch, tables):
    """A page's blocks share their names, as they would in one interpreter."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    torch.manual_seed(0)
    for code in blocks(page.read_text("utf-8"), "python"):
        said = StringIO()
        with redirect_stdout(said):
            exec(compile(code, str(page), "exec"), names)
        if promised(code):
            assert said.getvalue().splitlines() == promised(code)


@EACH
def test_no_block_is_passed_over(page):
    """Python that a test does not run would have another name, such as `Python` or `python3`; those are refused."""
    assert {fence.language for fence in fences(page.read_text("utf-8"))} <= LANGUAGES


@pytest.mark.parametrize("name", WITH_EXERCISES)
def test_a_chapter_has_three_exercises_with_answers_that_run(name):
    """`test_python_runs_and_prints_what_it_says` runs them, in order with the chapter's other blocks."""
    found = answers((ROOT / "docs" / name).read_text("utf-8"))
    assert len(found) >= 3 and all(blocks(answer, "python") for answer in found)


@EACH
def test_commands_exist_with_their_flags(page):
    text = page.read_text("utf-8")
    for line in COMMAND.findall(text):
        words = shlex.split(line.replace("\\\n", " "), comments=True)
        command, *flags = [word for word in words if word != "..."][1:]
        if command.startswith("-"):
            continue  # plainsd --help
        module, kind, _ = COMMANDS[command]
        made = parsed(getattr(import_module(module), kind), command, flags)
        assert made is not None or "--help" in flags, line
    named = re.findall(r"`make ([a-z-]+)", text) + re.findall(r"^    make ([a-z-]+)", text, re.MULTILINE)
    assert set(named) <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


@EACH
def test_quotes_are_in_the_sources(page):
    for block in blocks(page.read_text("utf-8"), "py"):
        file, quoted = block.split("\n", 1)
        assert quoted in (ROOT / file.removeprefix("# ")).read_text("utf-8"), quoted


@EACH
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_every_command_and_chapter_is_told():
    readme, index = (path.read_text("utf-8") for path in (ROOT / "README.md", ROOT / "docs" / "README.md"))
    chapters = "".join(path.read_text("utf-8") for path in ROOT.glob("docs/*.md"))
    assert all(f"plainsd {name}" in readme + chapters for name in COMMANDS)
    assert all(f"]({path.name})" in index for path in ROOT.glob("docs/[0-9]*.md"))


def test_the_readers_of_pages_see_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nprint(1)  # -> 2\n```\n\n    plainsd generate x --sped 3\n\n[x](nowhere.md)\n"
        "```py\n# README.md\nnot there\n```\n"
    )
    for check in (test_commands_exist_with_their_flags, test_quotes_are_in_the_sources, test_links_lead_somewhere):
        with pytest.raises((AssertionError, ValueError)):
            check(page)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
        test_python_runs_and_prints_what_it_says(page, tmp_path, patch, None)


def test_blocks_are_found_where_readers_see_them():
    page = (
        "```python\na = 1\n```\n\n<details><summary>Answer</summary>\n\n```python\nb = 2\n```\n</details>\n\n"
        "1. An exercise.\n\n   <details><summary>Answer</summary>\n\n   ```python\n   if c:\n       d = 3\n   ```\n\n"
        "   </details>\n\n````text\n```python\nnot code\n```\n````\n"
    )
    assert blocks(page, "python") == ["a = 1\n", "b = 2\n", "if c:\n    d = 3\n"]
    assert [blocks(answer, "python") for answer in answers(page)] == [["b = 2\n"], ["if c:\n    d = 3\n"]]
    assert blocks(page, "text") == ["```python\nnot code\n```\n"]
    with pytest.raises(ValueError, match="line 1: the fence '```python' is not closed"):
        fences("```python\na = 1\n")


def test_an_answer_that_fails_is_seen(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "- x\n\n  <details><summary>Answer</summary>\n\n  ```python\n  print(1)  # -> 2\n  ```\n  </details>\n"
    )
    with pytest.raises(AssertionError):
        test_python_runs_and_prints_what_it_says(page, tmp_path, monkeypatch, None)


def test_what_a_page_registers_does_not_stay():
    assert not {"careful", "sd1-half", "loudness"} & {*SAMPLERS, *VARIANTS, *ENDINGS}
    assert all("loudness" not in parts for parts, _ in KINDS_BY_PARTS)
