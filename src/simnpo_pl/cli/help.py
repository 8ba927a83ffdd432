"""`fit --help`: options with their defaults, read from the sources' signatures and docstrings.

Importing what the options belong to (torch, transformers, Lightning) takes seconds; reading its text takes none. What
the parser itself has to say is under `--help_all`.
"""

import ast
import inspect
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from simnpo_pl.cli.arguments import RUN_OPTIONS, TRAINER_DEFAULTS

PACKAGE = Path(__file__).parents[1]
SHARED = ("PairedData", "UnlearningData")
"""Data modules that are no benchmark themselves: their settings are those of all."""
USAGE = """usage: python -m simnpo_pl {command} --config FILE [--config OVERLAY ...] [--OPTION VALUE ...]

{what}. What comes later on the line wins over what came
before it; null is a value. Every option can stand in a config file, --print_config shows all of them together.
"""
MORE = """
more:
  --model.objective.help NPO   one objective in full; --data.help MuseData one benchmark
  --help_all                   everything the parser knows, every class of Lightning too
  --print_config               the configuration that these options make
  --debug                      the traceback of an error
"""


@dataclass
class Setting:
    """One argument of a class or function: name, type as text, default as text or None where there is none."""

    name: str
    kind: str
    default: str | None
    text: str


@dataclass
class Described:
    """A class: its bases' names, the first sentence about it, its settings."""

    bases: list[str]
    text: str
    settings: list[Setting]


def options_help(command: str, what: str) -> str:
    """Help over a command's options.

    Args:
        command: fit, validate, test or predict.
        what: What it does.
    """
    width = min(shutil.get_terminal_size().columns, 120)
    run = [Setting(name, kind, _shown(default), text) for name, (kind, default, text) in RUN_OPTIONS.items()]
    modules = read_classes("benchmarks")
    lines = [USAGE.format(command=command, what=what[0].upper() + what[1:])]
    lines += _group("run", "", run, width)
    lines += _group("model", "model.", read_classes("module/unlearning.py")["UnlearningModule"].settings, width)
    lines += _group("low-rank adapter", "model.lora.", read_classes("models/lora.py")["LoraOptions"].settings, width)
    objectives = _descendants("Objective", read_classes("objectives"))
    lines += _classes("--model.objective NAME, and --model.objective.SETTING", objectives, width)
    retain = _descendants("RetainLoss", read_classes("objectives/retain.py"))
    lines += _classes("--model.retain_loss NAME", retain, width)
    benchmarks = {name: one for name, one in _descendants(SHARED[0], modules).items() if name not in SHARED}
    lines += _classes("--data NAME, and --data.SETTING", benchmarks, width)
    # What the command line sets itself is not for the user to set.
    common = [s for name in SHARED for s in modules[name].settings if s.name not in ("seed", "eval", "model")]
    lines += _group("data of any benchmark (those of text from `tokenizer` on)", "data.", common, width)
    lines += _group("eval", "eval.", read_classes("evaluation/options.py")["EvalOptions"].settings, width)
    if command == "fit":
        lines += _group("export", "export.", read_classes("runs/export.py")["ExportOptions"].settings, width)
        state = read_classes("runs/checkpoint.py")["CheckpointOptions"].settings
        lines += _group("checkpoint", "checkpoint.", state, width)
    lines += _group("Lightning's Trainer", "trainer.", trainer_settings(), width)
    return "\n".join(lines) + "\n" + MORE


def trainer_settings() -> list[Setting]:
    """Options of Lightning's Trainer, with this project's defaults."""
    spec = find_spec("lightning")
    source = Path(str(spec and spec.origin)).parent / "pytorch" / "trainer" / "trainer.py"
    settings = _read(ast.parse(source.read_text()))["Trainer"].settings
    for setting in settings:
        setting.text = (
            setting.text.split(". ")[0]
            .split(" Default: ")[0]
            .replace("``", "`")
            .replace(":func:", "")
            .replace(":class:", "")
        )
        setting.text = setting.text.rstrip(".") + "."
        if setting.name in TRAINER_DEFAULTS:
            setting.default = _shown(TRAINER_DEFAULTS[setting.name])
    return settings


@cache
def read_classes(place: str) -> dict[str, Described]:
    """Classes of a module, or of all modules of a folder, of this package.

    Args:
        place: File or folder, from the package's own.
    """
    path = PACKAGE / place
    found: dict[str, Described] = {}
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        found |= _read(ast.parse(file.read_text()))
    return found


def _read(tree: ast.Module) -> dict[str, Described]:
    found = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        init = next((m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"), None)
        documents = [ast.get_docstring(node) or "", (init and ast.get_docstring(init)) or ""]
        texts = {name: text for document in documents for name, text in _arguments(document)}
        fields = _parameters(init.args) if init else _fields(node)
        settings = [
            Setting(name, _kind(_resolved(kind, tree)), _value(_resolved(default, tree)), texts.get(name, ""))
            for name, kind, default in fields
            if name != "kwargs"
        ]
        bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
        found[node.name] = Described(bases, documents[0].split("\n\n")[0].replace("\n", " "), settings)
    return found


def _resolved(expression: ast.expr | None, tree: ast.Module) -> ast.expr | None:
    """What a constant's name stands for, here or in the module of this package that it comes from."""
    if not isinstance(expression, ast.Name):
        return expression
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == expression.id for target in node.targets):
            return node.value
        if isinstance(node, ast.ImportFrom) and any(one.name == expression.id for one in node.names):
            words = (node.module or "").split(".")
            if words[0] == PACKAGE.name:
                file = PACKAGE.joinpath(*words[1:]).with_suffix(".py")
                return _resolved(expression, ast.parse(file.read_text())) if file.is_file() else expression
    return expression


def _parameters(arguments: ast.arguments) -> Iterator[tuple[str, ast.expr | None, ast.expr | None]]:
    names = [a for a in arguments.args if a.arg != "self"]
    defaults: list[ast.expr | None] = [None] * (len(names) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = [*zip(names, defaults, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    for argument, default in pairs:
        yield argument.arg, argument.annotation, default


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr | None, ast.expr | None]]:
    """Of a dataclass."""
    if node.decorator_list:
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                yield field.target.id, field.annotation, field.value


def _kind(annotation: ast.expr | None) -> str:
    """Type as a user would write it: choices, or a word."""
    text = "" if annotation is None else ast.unparse(annotation)
    text = text.removeprefix("Optional[") if text.startswith("Optional[") else text
    if "Literal[" in text:
        inside = text.split("Literal[", 1)[1].split("]", 1)[0]
        return "|".join(word.strip(" '\"") for word in inside.split(","))
    first = text.split(" | ")[0].strip("]")
    return {"str": "TEXT", "int": "N", "float": "NUMBER", "bool": "true|false"}.get(first, "VALUE")


def _value(default: ast.expr | None) -> str | None:
    if default is None:
        return None
    try:
        return _shown(ast.literal_eval(default))
    except ValueError:
        # An object: lazy_instance(NLL), Losses().
        called = [*default.args, default.func][0] if isinstance(default, ast.Call) else default
        return ast.unparse(called)


def _shown(value: object) -> str:
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def _arguments(document: str) -> Iterator[tuple[str, str]]:
    """Names and texts under `Args:` of a docstring."""
    lines = inspect.cleandoc(document).split("\n")
    if "Args:" not in lines:
        return
    name, words = "", [""]
    for line in lines[lines.index("Args:") + 1 :]:
        if line and not line.startswith("    "):
            break
        inner = line[4:]
        head, colon, rest = inner.partition(":")
        if colon and head.isidentifier():
            if name:
                yield name, " ".join(words)
            name, words = head, [rest.strip()]
        elif inner.strip():
            words.append(inner.strip())
    if name:
        yield name, " ".join(words).strip()


def _descendants(base: str, classes: dict[str, Described]) -> dict[str, Described]:
    """Classes below one of this name, with the settings of those they are built on, in order of the alphabet."""
    found: dict[str, Described] = {}
    below = {base}
    while new := {name for name, one in classes.items() if below & set(one.bases)} - set(found):
        found |= {name: classes[name] for name in new}
        below |= new
    return {name: found[name] for name in sorted(found)}


def _group(title: str, prefix: str, settings: Iterable[Setting], width: int) -> list[str]:
    lines = ["", f"{title}:"]
    for setting in settings:
        default = "required" if setting.default is None else f"default: {setting.default or repr('')}"
        lines.append(f"  --{prefix}{setting.name} {setting.kind}")
        lines += _wrapped(f"{setting.text} ({default})".strip(), width)
    return lines


def _classes(title: str, classes: dict[str, Described], width: int) -> list[str]:
    lines = ["", f"{title}:"]
    for name, one in classes.items():
        settings = " ".join(s.name if s.default is None else f"{s.name}={s.default}" for s in one.settings)
        lines += textwrap.wrap(f"  {name}  {settings}", width, subsequent_indent=" " * 8)
        lines += _wrapped(one.text, width)
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
