"""docs/papers.md has every paper that the code names, with the files that name it."""

import papers
import pytest


def test_the_map_is_complete():
    text = papers.PAGE.read_text("utf-8")
    assert papers.updated(text, papers.named()) == text, "run python docs/scripts/papers.py"
    assert len(papers.named()) > 70


def test_numbers_are_found_and_faults_are_seen(tmp_path):
    (tmp_path / "a.py").write_text('"""DDPM (arXiv:2006.11239), and https://arxiv.org/abs/1312.6114."""\n')
    found = papers.named(tmp_path)
    assert found == {"1312.6114": ["a.py"], "2006.11239": ["a.py"]}
    rows = [f"| Somebody, [{n}](https://arxiv.org/abs/{n}) | a title | |" for n in found]
    written = papers.updated("\n".join(rows), found)
    assert written.count("[a.py](../src/plainsd/a.py)") == 2 and papers.updated(written, found) == written
    for page, fault in (
        (rows[:1], "without a row: .'2006"),
        (rows * 2, "twice: .'1312"),
        (rows, "no file names: .'13"),
    ):
        sources = found if "names" not in fault else {"2006.11239": ["a.py"]}
        with pytest.raises(ValueError, match=fault):
            papers.updated("\n".join(page), sources)
