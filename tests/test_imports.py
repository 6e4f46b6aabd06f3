"""Who may import whom: the folders in their order, types counted, and no circle anywhere. And what importing costs."""

import ast
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "plainsd"
ORDER = (  # lowest first: a file imports from its own room and from those above it here
    "errors",
    "json_reader",
    "arguments",
    "listing",
    "disk",
    "allocator",
    "device",
    "diffusion",
    "models",
    "text",
    "files",
    "pictures",
    "generate",
    "adapters",
    "speed",
    "checkpoint",
    "emoji",
    "train",
    "reports",
    "cluster",
    "server",
    "commands",
    "cli",
    "__main__",
)
WITHIN = {  # the same inside the rooms that have rooms of their own
    "train": ("data", "methods"),
    "server": ("jobs", "api"),
}


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in it: at the top, inside functions, for types alone."""
    found = set()
    package = path.relative_to(SOURCE).parent.parts
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = ".".join(("plainsd", *package[: len(package) - node.level + 1], *filter(None, [module])))
            if module == "plainsd" or module.startswith("plainsd."):
                found.update(at_home(module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(a.name.removeprefix("plainsd.") for a in node.names if a.name.startswith("plainsd."))
    return found - {""}


def at_home(module: str, name: str) -> str:
    """The module that `from module import name` means: a file of that name, or `module` itself."""
    inside = f"{module}.{name}".removeprefix("plainsd.")
    place = SOURCE / inside.replace(".", "/")
    return (
        inside if place.is_dir() or place.with_suffix(".py").is_file() else module.removeprefix("plainsd").lstrip(".")
    )


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def graph() -> dict[str, set[str]]:
    return {name_of(path): imports(path) for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"}


def place(name: str) -> int:
    return ORDER.index(name.split(".")[0])


def circles(edges: dict[str, set[str]]) -> Iterator[list[str]]:
    """Every way from a module back to itself that a search in depth meets."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> Iterator[list[str]]:
        if name in way:
            yield [*way[way.index(name) :], name]
        elif name not in done:
            for other in sorted(edges.get(name, ())):
                yield from visit(other, [*way, name])
            done.add(name)

    for name in sorted(edges):
        yield from visit(name, [])


def test_every_room_has_its_place_in_the_order():
    rooms = {name.split(".")[0] for name in graph()} - {"assets"}
    assert rooms == set(ORDER)


def test_rooms_import_only_what_stands_before_them():
    upward = [f"{a} imports {b}" for a, others in graph().items() for b in others if place(b) > place(a)]
    assert not upward


@pytest.mark.parametrize("room", WITHIN)
def test_inner_rooms_too(room):
    """What stands in the room itself is above its inner rooms where it puts them together, and below where they use it:
    that no circle is closed is all that is asked of it. Between the inner rooms the order holds."""
    inner = WITHIN[room]

    def floor(name: str) -> int | None:
        parts = name.split(".")
        return inner.index(parts[1]) if parts[0] == room and len(parts) > 2 and parts[1] in inner else None

    for a, others in graph().items():
        for b in others:
            low, high = floor(a), floor(b)
            assert low is None or high is None or high <= low, f"{a} imports {b}"


def test_there_is_no_circle():
    assert not list(circles(graph()))


def test_a_circle_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.SOURCE", tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text('"""A room."""\n')
    (tmp_path / "models" / "layers.py").write_text("def f():\n    from plainsd.models import unet\n")
    unet = tmp_path / "models" / "unet.py"
    unet.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .layers import Attention\n")
    assert list(circles(graph())) == [["models.layers", "models.unet", "models.layers"]]
    unet.write_text("import torch\n")
    assert not list(circles(graph()))
    (tmp_path / "generate.py").write_text("import plainsd.models.unet\nfrom plainsd import errors\n")
    (tmp_path / "errors.py").write_text("from plainsd import generate\n")
    assert imports(tmp_path / "generate.py") == {"models.unet", "errors"}
    with pytest.raises(AssertionError):
        test_rooms_import_only_what_stands_before_them()


def test_each_room_says_what_belongs_in_it():
    """One docstring: what belongs here, and what does not."""
    for path in SOURCE.rglob("__init__.py"):
        if path.parent in (SOURCE, SOURCE / "speed"):
            continue  # these hand names on
        body = ast.parse(path.read_text("utf-8")).body
        assert len(body) == 1 and len(ast.literal_eval(body[0].value)) > 60, path


PRIVATE_TWICE = {"log"}  # names of two modules that no other module imports: loggers
PUBLIC_TWICE = {
    "routes",  # openai.routes and a1111.routes: each of one API
}


def defined(path: Path) -> set[str]:
    """Functions, classes and constants at the top of a file."""
    names = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name))
    return {name for name in names if not name.startswith("__")}


def defined_twice() -> set[str]:
    homes = Counter(name for path in SOURCE.rglob("*.py") if path.stem != "__init__" for name in defined(path))
    return {name for name, count in homes.items() if count > 1}


def used_elsewhere() -> set[str]:
    """Names that some module takes from another: `from module import NAME`, or `module.NAME` of an imported one."""
    used = set()
    for path in SOURCE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        ours = {
            alias.asname or alias.name
            for node in nodes
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("plainsd"))
            for alias in node.names
        }
        used |= ours | {
            node.attr
            for node in nodes
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours
        }
    return used


def test_a_name_has_one_meaning():
    """A new name in two modules: give one of them another name, or make one definition of both."""
    assert defined_twice() <= PRIVATE_TWICE | PUBLIC_TWICE
    assert not PRIVATE_TWICE & used_elsewhere()


def test_a_second_meaning_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.SOURCE", tmp_path)
    (tmp_path / "one.py").write_text("A, LIMIT = 1, 2\nclass Row: ...\n")
    (tmp_path / "two.py").write_text("LIMIT: int = 3\nasync def f(): ...\n")
    assert defined_twice() == {"LIMIT"} and not used_elsewhere()
    (tmp_path / "three.py").write_text("from plainsd import one\nfrom plainsd.two import f\nprint(one.LIMIT)\n")
    assert used_elsewhere() == {"one", "f", "LIMIT"}


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


def test_reading_settings_needs_no_torch():
    code = (
        "import sys; from plainsd.pictures.texts.a1111 import parse_settings\n"
        "parse_settings('x\\nSteps: 3, Sampler: Euler, Seed: 1')\n"
        "assert not {'torch', 'numpy', 'PIL', 'tyro'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_speed_hands_its_functions_on():
    """The public names stay, whichever of its files was imported before."""
    code = (
        "import sys, plainsd.speed; assert 'torch' not in sys.modules\n"
        "import plainsd.speed.model, plainsd.speed.training\n"
        "from plainsd.speed import compile_unet, faster, pack, trained_faster\n"
        "assert all(map(callable, (compile_unet, faster, pack, trained_faster)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_comes_at_once():
    assert best_of_three("-m", "plainsd", "--help") < 0.3


def test_oracles_are_never_imported():
    for path in SOURCE.rglob("*.py"):
        if path.name in ("references.py", "rivals.py"):
            continue  # `plainsd verify` and `plainsd bench` compare with them, by name
        tree = ast.parse(path.read_text("utf-8"))
        names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {
            (n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level
        }
        assert not names & {"diffusers", "transformers", "peft", "lycoris", "clip"}, path
