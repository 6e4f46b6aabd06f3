"""The documentation as a site: pages as Python-Markdown reads them, formulas as MathML, no link that leads nowhere."""

import pytest
import website
from pages import DOCS


def test_pages_are_rewritten_for_the_site():
    page = (
        "[a](2-samplers.md#x) [b](../src/plainsd/cli.py) ![c](../bench/results/scale.png) [d](https://x.org)\n\n"
        "```math\n\\frac{a}{b}\n```\n\n```python client\n[e](../kept.py)\n```\n\n"
        "<details><summary>Answer</summary>\n\nBecause.\n\n```python\nif a:\n    b\n```\n\n</details>\n"
    )
    made = website.page_for_site(page)
    assert "[a](2-samplers.md#x)" in made and "![c](bench/results/scale.png)" in made and "[d](https://x.org)" in made
    assert "[b](https://github.com/plainsd/plainsd/blob/main/src/plainsd/cli.py)" in made
    assert "$$\n\\frac{a}{b}\n$$" in made and "```python\n[e](../kept.py)\n```" in made
    assert '??? question "Answer"\n\n    Because.\n\n    ```python\n    if a:\n        b\n    ```' in made
    assert "details" not in made


def test_formulas_become_mathml():
    text = (
        r'<span class="arithmatex">\(\sigma_t &lt; 1\)</span> <div class="arithmatex">\[\sqrt{1 - \bar\alpha}\]</div>'
    )
    made = website.formulas_as_mathml(text)
    assert made.count("<math") == 2 and 'display="block"' in made and "<msqrt>" in made
    assert "arithmatex" not in made and "\\" not in made
    made = website.formulas_as_mathml(r'<span class="arithmatex">\(\mathbb E, \mathbb R, \mathcal N, \log s\)</span>')
    assert all(f"<mi>{letter}</mi>" in made for letter in "\U0001d53c\u211d\U0001d4a9") and "<mspace" in made
    made = website.formulas_as_mathml(r'<span class="arithmatex">\(\operatorname{Var}\!\left(x\right), \max x\)</span>')
    assert "<mi>Var</mi>" in made and "<mi>max</mi>" in made and 'width="-0.167em"' in made
    made = website.formulas_as_mathml(r'<span class="arithmatex">\(\lVert x_i\rVert = -\infty, [-3], a - b\)</span>')
    assert made.count('<mo stretchy="false">&#x02016;</mo>') == 2 and "<mi>&#x0221E;</mi>" in made
    assert made.count('<mo form="prefix">&#x02212;</mo>') == 2 and made.count("<mo>&#x02212;</mo>") == 1
    made = website.formulas_as_mathml(r'<span class="arithmatex">\(\log_{10} x, \cos^2 x, z \sim p, \log x\)</span>')
    assert made.count("<mspace") == 1 and "<mo>&#x0223C;</mo>" in made  # a base and a power are one of two parts
    made = website.formulas_as_mathml(r'<span class="arithmatex">\(\cos a \cos b\)</span>')
    assert made.count("<mspace") == 3


def test_broken_links_are_seen(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="here"></h1><a href="b.html#there"></a><a href="#here"></a><a href="c.html"></a>'
        '<a href="b.html#no"></a>'
        '<script src="https://cdn.example/x.js"></script><img src="gone.png">'
    )
    (tmp_path / "b.html").write_text('<p id="there"><a href="https://x.org">x</a></p>')
    assert website.broken_links(tmp_path) == [
        "a.html loads https://cdn.example/x.js",
        "a.html links to c.html",
        "a.html links to b.html#no",
        "a.html links to gone.png",
    ]


@pytest.mark.full
def test_the_site_builds_and_its_reference_has_the_public_names(tmp_path, monkeypatch):
    """Strict, and `main` fails on broken links. Every name of `import plainsd` is in the reference."""
    import plainsd

    monkeypatch.setattr(website, "BUILD", tmp_path)
    website.main()
    for page in DOCS.glob("*.md"):
        assert (tmp_path / "html" / ("index.html" if page.stem == "README" else f"{page.stem}.html")).exists()
    reference = (tmp_path / "html" / "api" / "plainsd.html").read_text("utf-8")
    assert all(f'id="plainsd.{plainsd._HOME[name]}.{name}"' in reference for name in plainsd.__all__)
    assert (tmp_path / "html" / "search.json").exists()
