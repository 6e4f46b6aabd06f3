"""Who may import whom: mathematics and networks know nothing of files, commands and training, and files nothing of
training and commands. And what importing costs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "plainsd"
ALWAYS = {"errors"}
ALLOWED = {  # module -> the modules of ours that it may import
    "schedule": set(),
    "denoiser": {"schedule"},
    "samplers": {"schedule", "denoiser"},
    "models.layers": set(),
    "models.clip": {"models.layers"},
    "models.vae": {"models.layers"},
    "models.unet": {"models.layers"},
    "variants": {"models.clip", "models.vae", "models.unet", "schedule"},
    "tokenizer": set(),
    "prompts": set(),
}
LEAVES = ("cli", "commands", "server", "evaluate", "verify", "oracle", "bench")  # nothing but leaves imports these
TOP = ("train", "__init__", "__main__", *LEAVES)  # what lies above files and pictures


def imports(path: Path, *, lazy: bool) -> set[str]:
    """Modules of ours that a file imports: at its top, or with `lazy` inside its functions too. Types do not count."""
    found = set()
    package = path.relative_to(SOURCE).parent.parts

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, (ast.FunctionDef, ast.Lambda)) and not lazy:
                continue
            if isinstance(child, ast.ImportFrom):
                module = child.module or ""
                if child.level:
                    module = ".".join(("plainsd", *package[: len(package) - child.level + 1], *filter(None, [module])))
                if module == "plainsd":
                    found.update(alias.name for alias in child.names)
                elif module.startswith("plainsd."):
                    found.add(module.removeprefix("plainsd."))
            elif isinstance(child, ast.Import):
                found.update(a.name.removeprefix("plainsd.") for a in child.names if a.name.startswith("plainsd."))
            visit(child)

    visit(ast.parse(path.read_text("utf-8")))
    return found


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


@pytest.mark.parametrize("name", ALLOWED)
def test_mathematics_and_networks_import_only_what_comes_before_them(name):
    path = SOURCE / (name.replace(".", "/") + ".py")
    assert imports(path, lazy=True) - ALWAYS <= ALLOWED[name]


def test_files_and_pictures_know_nothing_of_training():
    for path in SOURCE.rglob("*.py"):
        if name_of(path).split(".")[0] not in TOP:
            upward = {name for name in imports(path, lazy=True) if name.split(".")[0] == "train"}
            assert not upward, f"{name_of(path)} imports {upward}"


def best_of_three(*arguments: str) -> float:
    """Seconds that the processor works for Python with these arguments, less those for doing nothing."""

    def best(*command):
        return min(timed([sys.executable, *command]) for _ in range(3))

    return best(*arguments) - best("-c", "")


def timed(command: list[str]) -> float:
    before = os.times()
    subprocess.run(command, check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_importing_costs_nothing():
    """The names load what they need when they are used: torch, and a quarter of its time."""
    assert best_of_three("-c", "import plainsd") < 0.2
    code = "import sys, plainsd; assert not {'torch', 'numpy', 'PIL', 'tyro'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import plainsd; [getattr(plainsd, name) for name in plainsd.__all__]; assert not hasattr(plainsd, 'x')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_comes_at_once():
    assert best_of_three("-m", "plainsd", "--help") < 0.3


def test_nothing_builds_on_commands_and_server():
    for path in SOURCE.rglob("*.py"):
        name = name_of(path)
        if name.split(".")[0] not in (*LEAVES, "__main__"):
            upward = {i for i in imports(path, lazy=True) if i.split(".")[0] in LEAVES and i != "cli.parsed"}
            assert not upward, f"{name} imports {upward}"


def test_the_reader_of_imports_sees_them(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.SOURCE", tmp_path)
    (tmp_path / "models").mkdir()
    file = tmp_path / "models" / "x.py"
    file.write_text(
        "from .layers import a\nfrom plainsd import cli\nimport plainsd.generate\n"
        "def f():\n    from plainsd.train.loop import fit\n"
    )
    assert imports(file, lazy=True) == {"models.layers", "cli", "generate", "train.loop"}
    assert imports(file, lazy=False) == {"models.layers", "cli", "generate"}


def test_oracles_are_never_imported():
    for path in SOURCE.rglob("*.py"):
        if path.name in ("oracle.py", "rivals.py"):
            continue  # `plainsd verify` and `plainsd bench` compare with them, by name
        tree = ast.parse(path.read_text("utf-8"))
        names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {
            (n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level
        }
        assert not names & {"diffusers", "transformers", "peft", "clip"}, path
