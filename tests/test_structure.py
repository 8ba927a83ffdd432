"""The structure: imports point down, few floors, short files; the module names no objective and no benchmark."""

import ast
import importlib
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "simnpo_pl"
# Lower floors first; a room imports from floors below its own alone.
FLOORS = [
    ["utils"],
    ["data", "metrics"],
    ["models"],
    ["objectives", "evaluation"],
    ["benchmarks", "module", "runs"],
    ["cli", "report"],
    ["studies"],
    ["__main__"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LONGEST_FILE = 350
MOST_LINES = 17_055
"""Lower it when the package shrinks; a change that raises it says which feature the lines are for."""
SOURCES = sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def imported(file: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("simnpo_pl"):
            module = (node.module or "").removeprefix("simnpo_pl").lstrip(".")
            names |= {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.removeprefix("simnpo_pl.") for a in node.names if a.name.startswith("simnpo_pl.")}
    return names


def module_of(name: str) -> str | None:
    """The module that an imported name is, or is in."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        path = PACKAGE.joinpath(*parts[:end])
        if path.with_suffix(".py").is_file():
            return ".".join(parts[:end])
        if (path / "__init__.py").is_file():
            return ".".join([*parts[:end], "__init__"])
    return None


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_imports_point_down(file: Path):
    room = name_of(file).split(".")[0]
    if room == "__init__":
        assert not imported(file)
        return
    for other in imported(file):
        target = other.split(".")[0]
        assert target == room or FLOOR[target] < FLOOR[room], f"{name_of(file)} imports {other}"


def test_floors_and_rooms():
    """A person finds the room for a line: few rooms on few floors."""
    entries = [p.name for p in PACKAGE.iterdir() if not p.name.startswith("__")]
    assert len(entries) <= 14
    assert len(FLOORS) <= 8
    assert {p.removesuffix(".py") for p in entries} - {"py.typed"} == FLOOR.keys() - {"__main__"}


def test_no_circle_of_modules():
    """No module imports itself by way of others; what a package's __init__ collects does not count."""
    above = {name_of(f): {m for n in imported(f) if (m := module_of(n)) and "__init__" not in m} for f in SOURCES}
    done: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in above.get(module, ()):
                follow(other, (*path, module))
            done.add(module)

    for module in above:
        follow(module, ())


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_files_can_be_read_in_one_go(file: Path):
    assert len(file.read_text().splitlines()) <= LONGEST_FILE


def test_the_package_does_not_grow_unnoticed():
    assert sum(len(file.read_text().splitlines()) for file in SOURCES) <= MOST_LINES


def test_module_names_no_objective_and_no_benchmark():
    """The one objective it names is its default."""
    from simnpo_pl import benchmarks, objectives

    text = "\n".join(file.read_text() for file in (PACKAGE / "module").glob("*.py"))
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith(("#", '"""')))
    names = [c.__name__ for c in objectives.Objective.__subclasses__() if c.__module__.startswith(objectives.__name__)]
    assert len(names) >= 6
    for name in [*names, *benchmarks.__all__]:
        if name != "SimNPO":
            assert not re.search(rf"\b{name}\b", code), name


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_everything_imports(file: Path):
    importlib.import_module(f"simnpo_pl.{name_of(file)}".removesuffix(".__init__"))


def test_log_softmax_in_one_place():
    """Log-likelihoods and divergences come from one module."""
    words = re.compile(r"log_softmax|logsumexp|(F|functional)\.cross_entropy")
    using = {name_of(f) for f in SOURCES if words.search(f.read_text())}
    assert using <= {"models.head", "models.logprobs", "metrics.functional"}


def test_no_pickle_and_no_remote_code():
    for file in SOURCES:
        text = file.read_text()
        assert "trust_remote_code=True" not in text
        assert "weights_only=False" not in text
