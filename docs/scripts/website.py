"""Builds the documentation as a site: build/docs/html, which loads nothing from elsewhere.

    make docs      # or: .venv/bin/python docs/scripts/website.py

Zensical, the successor of mkdocs-material, makes it of the pages in docs/, mkdocstrings the API reference of the
docstrings. The pages are written for GitHub; `page_for_site` turns what Python-Markdown reads otherwise. Formulas
become MathML, which browsers draw by themselves. A warning or a link that leads nowhere fails the build.
"""

import contextlib
import html
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from latex2mathml.converter import convert
from pages import ANSWER, DOCS, GITHUB, LINK, ROOT, outside_fences

HERE = Path(__file__).parent
BUILD = ROOT / "build" / "docs"
REFERENCE = ("flags", "glossary", "symptoms", "papers", "lesson")  # pages that are looked up, not read through
FOLDERS = ("diffusion", "models", "text", "files", "pictures", "adapters", "speed", "train", "reports")
PICTURES = (".png", ".svg", ".jpg", ".webp")
CSS = """[data-md-color-scheme=slate] img[src$=".svg"] { background: #fff; border-radius: 4px }
math { font-family: "Latin Modern Math", "STIX Two Math", "Cambria Math", "DejaVu Math TeX Gyre", math }
math[display=block] { overflow-x: auto; overflow-y: hidden; padding: .3em 0 }
.md-typeset table:not([class]) { font-size: .68rem }
.md-typeset table:not([class]) th:empty { min-width: 0 }
"""


def page_for_site(text: str) -> str:
    """A page as Python-Markdown should read it."""
    text = re.sub(r"^( *)```math\n(.*?)^ *```$", r"\1$$\n\2\1$$", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^( *```(?:python|sh)) \w+$", r"\1", text, flags=re.MULTILINE)  # `python client`, `sh serve`
    text = outside_fences(text, lambda part: LINK.sub(_inside, part))
    return ANSWER.sub(_folded, text)


def _inside(link: re.Match) -> str:
    """Links to pages and pictures stay in the site; those to other files lead to GitHub."""
    target = link["target"]
    path = os.path.normpath(f"docs/{target.split('#')[0]}")
    if path.endswith(PICTURES) and not path.startswith("docs/"):
        return f"{link['bracket']}({path}{link['title']})"  # `stage` puts it there
    if re.match(r"[a-z]+:|#", target) or re.fullmatch(r"docs/[^/]+\.md", path) or path.endswith(PICTURES):
        return link[0]
    return f"{link['bracket']}({GITHUB}/blob/main/{os.path.normpath(f'docs/{target}')}{link['title']})"


def _folded(answer: re.Match) -> str:
    """A folded answer in pymdownx's notation."""
    indent = re.match(" *", answer[0])[0]
    body = re.sub(r"^ *<details>\s*<summary>.*?</summary>|^ *</details>$", "", answer[0], flags=re.MULTILINE)
    lines = [f"    {line}" if line.strip() else "" for line in body.strip("\n").split("\n")]
    return f'\n{indent}??? question "Answer"\n\n' + "\n".join(lines) + "\n"


def api_pages() -> dict[str, str]:
    """The reference: what `import plainsd` offers, then a page for each folder that others build on."""
    import plainsd

    places = [f"plainsd.{plainsd._HOME[name]}.{name}" for name in plainsd.__all__]
    pages = {"plainsd": "# plainsd\n\nWhat `import plainsd` offers.\n\n" + "".join(f"::: {p}\n\n" for p in places)}
    for folder in FOLDERS:
        root = ROOT / "src" / "plainsd" / folder
        files = [path for path in sorted(root.rglob("*.py")) if path.name != "__init__.py"]
        names = [".".join(path.relative_to(ROOT / "src").with_suffix("").parts) for path in files]
        modules = "".join(f"::: {name}\n    options:\n      show_root_full_path: true\n\n" for name in names)
        pages[folder] = f"# plainsd.{folder}\n\n{modules}"
    return pages


def navigation(pages: list[Path]) -> str:
    """The order of the pages, as TOML."""
    chapters = [page for page in pages if page.name[0].isdigit()]  # 0 to 9, with 3a to 3c: in order already
    guides = [page for page in pages if page not in chapters and page.stem not in ("README", *REFERENCE)]
    parts = {
        "Chapters": [page.name for page in chapters],
        "Guides": [page.name for page in guides],
        "Reference": [f"{name}.md" for name in REFERENCE if DOCS / f"{name}.md" in pages],
        "API": [f"api/{name}.md" for name in ("plainsd", *FOLDERS)],
    }
    rows = "".join(f"  {{ {part} = {names} }},\n" for part, names in parts.items() if names)
    return f'nav = [\n  {{ Home = "README.md" }},\n{rows}]\n'.replace("'", '"')


def stage() -> None:
    """Writes the pages and the configuration that Zensical reads."""
    shutil.rmtree(BUILD, ignore_errors=True)
    (BUILD / "pages" / "api").mkdir(parents=True)
    pages = sorted(DOCS.glob("*.md"))
    for page in pages:
        (BUILD / "pages" / page.name).write_text(page_for_site(page.read_text("utf-8")), "utf-8")
    for picture in (path for folder in (DOCS, ROOT / "bench") for path in folder.rglob("*") if path.suffix in PICTURES):
        target = BUILD / "pages" / picture.relative_to(DOCS if picture.is_relative_to(DOCS) else ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)
    for name, text in api_pages().items():
        (BUILD / "pages" / "api" / f"{name}.md").write_text(text, "utf-8")
    (BUILD / "pages" / "site.css").write_text(CSS)
    config = (HERE / "zensical.toml").read_text("utf-8").replace("../../src", str(ROOT / "src"))
    (BUILD / "zensical.toml").write_text(f"[project]\n{navigation(pages)}{config}", "utf-8")


TIDIER = (  # what latex2mathml writes, and what browsers draw as TeX would
    (r"<mo>([A-Za-z]{2,}|&#x0221E;|&#x02202;)</mo>", r"<mi>\1</mi>"),  # functions, infinity, d: no operator's space
    (r"<mo>(&#x02016;|&#x0007C;)</mo>", r'<mo stretchy="false">\1</mo>'),  # bars of a norm
    (r"<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>"),  # "is distributed as"
    (r"(<mo[^>]*>(?:&#x00028;|\[|&#x0003D;|&#x0002C;|&#x02248;)</mo>)<mo>&#x02212;</mo>",
     r'\1<mo form="prefix">&#x02212;</mo>'),
    (r'"negativethinmathspace"', '"-0.167em"'),  # MathML Core knows lengths only
    (r"(</m(?:i|n|sub|sup)>)(?=<mi>(?:log|exp|sin|cos)</mi>)", r'\1<mspace width="0.17em"/>'),
    (r"(?<!<msub>)(?<!<msup>)(<mi>(?:log|exp|sin|cos)</mi>)(?=<m(?!o))", r'\1<mspace width="0.17em"/>'),
)  # fmt: skip


def formulas_as_mathml(text: str) -> str:
    r"""An HTML page with what arithmatex marks, \(...\) and \[...\], as MathML."""

    def mathml(found: re.Match) -> str:
        formula, block = html.unescape(found[3]), found[2] == "["
        made = convert(formula.strip(), display="block" if block else "inline")
        made = re.sub(r'<mi mathvariant="(double-struck|script)">([A-Z])</mi>', _letter, made)
        for pattern, better in TIDIER:
            made = re.sub(pattern, better, made)
        return made

    return re.sub(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', mathml, text, flags=re.DOTALL)


def _letter(found: re.Match) -> str:
    """MathML Core knows no alphabets but those of Unicode: E in double-struck is U+1D53C, R is U+211D."""
    for name in (f"MATHEMATICAL {found[1]} CAPITAL {found[2]}", f"{found[1]} CAPITAL {found[2]}"):
        with contextlib.suppress(KeyError):
            return f"<mi>{unicodedata.lookup(name.upper())}</mi>"
    return found[0]


class Links(HTMLParser):
    """What a page points to, what it loads, and the anchors that it has."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors, self.targets, self.loaded = {""}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        has = dict(attributes)
        self.anchors |= {has[key] for key in ("id", "name") if has.get(key)}
        if tag == "a" and has.get("href"):
            self.targets.append(has["href"])
        if has.get("src"):
            self.loaded.append(has["src"])
        if tag == "link" and has.get("href") and has.get("rel") in ("stylesheet", "icon", "preload", "modulepreload"):
            self.loaded.append(has["href"])


def broken_links(site: Path) -> list[str]:
    """Links inside the site without a page or anchor, and whatever a page would load from elsewhere."""
    pages = {path: Links(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for page, links in pages.items():
        if page.name == "404.html":
            continue  # its addresses are absolute
        found += [f"{page.name} loads {one}" for one in links.loaded if re.match(r"(https?:)?//", one)]
        for target in [*links.targets, *links.loaded]:
            if re.match(r"[a-z]+:|//", target):
                continue
            file, _, anchor = unquote(target).partition("#")
            path = (page.parent / file).resolve() if file else page
            path = path / "index.html" if path.is_dir() else path
            if not path.exists() or (path in pages and anchor not in pages[path].anchors):
                found.append(f"{page.relative_to(site)} links to {target}")
    return found


def main() -> None:
    stage()
    site = BUILD / "html"
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    subprocess.run(command, cwd=BUILD, check=True)
    for page in site.rglob("*.html"):
        page.write_text(formulas_as_mathml(page.read_text("utf-8")), "utf-8")
    if broken := broken_links(site):
        raise SystemExit("\n".join(broken))
    print(f"open {site / 'index.html'}; to search, serve it: python -m http.server --directory {site}")


if __name__ == "__main__":
    main()
