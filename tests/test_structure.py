"""The structure: imports point one way, everything imports, the module names no objective and no benchmark."""

import ast
import importlib
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "simnpo_pl"

# Lower layers first; a file may import from its own layer and those below.
LAYERS = [
    ["errors"],
    ["files", "markdown", "stopping", "packing", "head", "layers", "optimization", "weight_files"],
    ["sharding"],
    ["forward"],
    ["checkpoints", "logprobs", "lora", "memory", "models", "generation", "data", "metrics", "markov"],
    ["objectives", "retain", "reference", "evaluation", "demo"],
    ["policy", "losses", "benchmarks", "callbacks", "summary", "arguments", "report"],
    ["module"],
    ["cli", "help"],
    ["finished", "fit_once"],
    ["robustness", "harness", "forget_series", "sweeps", "tuning", "analysis"],
    ["commands"],
    ["__main__"],
]
SOURCES = sorted(PACKAGE.rglob("*.py"))


def layer(module: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if module.split(".")[0] in names)


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__") or "__init__"


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("simnpo_pl"):
            own = node.module.removeprefix("simnpo_pl").lstrip(".")
            names |= {own} if own else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.removeprefix("simnpo_pl.") for a in node.names if a.name.startswith("simnpo_pl.")}
    return names


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_imports_point_down(file: Path):
    if name_of(file) == "__init__":
        assert not imported(file)
        return
    for other in imported(file):
        assert layer(other) <= layer(name_of(file)), f"{name_of(file)} imports {other}"


@pytest.mark.parametrize("lower", ["objectives", "policy", "module", "metrics"])
def test_no_benchmark_below(lower: str):
    files = [f for f in SOURCES if name_of(f).split(".")[0] == lower]
    assert files
    for file in files:
        assert not {name for name in imported(file) if name.split(".")[0] in ("benchmarks", "callbacks", "cli")}


@pytest.mark.parametrize("file", ["module", "losses"])
def test_module_names_no_objective_and_no_benchmark(file: str):
    """The one objective it names is its default."""
    from simnpo_pl import benchmarks, objectives

    text = (PACKAGE / f"{file}.py").read_text()
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith(("#", '"""')))
    names = [c.__name__ for c in objectives.Objective.__subclasses__() if c.__module__.startswith(objectives.__name__)]
    assert len(names) >= 6
    for name in [*names, *benchmarks.__all__]:
        if name != "SimNPO":
            assert not re.search(rf"\b{name}\b", code), name


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_everything_imports(file: Path):
    name = name_of(file)
    importlib.import_module("simnpo_pl" if name == "__init__" else f"simnpo_pl.{name}")


def test_log_softmax_in_one_place():
    """Log-likelihoods and divergences come from one module."""
    words = re.compile(r"log_softmax|logsumexp|(F|functional)\.cross_entropy")
    using = {name_of(f) for f in SOURCES if words.search(f.read_text())}
    assert using <= {"head", "logprobs", "metrics.functional"}


def test_no_pickle_and_no_remote_code():
    for file in SOURCES:
        text = file.read_text()
        assert "trust_remote_code=True" not in text
        assert "weights_only=False" not in text
