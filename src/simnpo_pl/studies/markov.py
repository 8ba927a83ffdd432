"""Mixtures of Markov chains (SimNPO paper, section 5): all methods and seeds, a table and the trade-off figure.

Three chains over ten states; a small Llama that knows them forgets two. Every method starts from the same models and
sees the same batches at the same seed. Forgetting is a distance in nats to the true chain, which is known.
"""

import statistics
import warnings
from argparse import Namespace
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import LambdaCallback

from simnpo_pl import objectives
from simnpo_pl.benchmarks import MarkovData
from simnpo_pl.benchmarks.markov import bayes_floors
from simnpo_pl.cli.summary import quiet
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.module.unlearning import UnlearningModule
from simnpo_pl.report.drawing import panels
from simnpo_pl.report.figures import GREY, color
from simnpo_pl.utils import markdown
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import read_json, write_json, write_text

METHODS: dict[str, tuple[str, dict[str, float]]] = {
    "GA": ("GradAscent", {}),
    "NPO, beta 0.2": ("NPO", {"beta": 0.2}),
    "NPO, beta 1": ("NPO", {"beta": 1.0}),
    "SimNPO, beta 4": ("SimNPO", {"beta": 4.0}),
    "NPO per token, beta 4": ("LengthNormalizedNPO", {"beta": 4.0}),
    "NPO without reference, beta 0.2": ("ReferenceFreeNPO", {"beta": 0.2}),
}
"""Name to objective and its settings; the last two are halves of the step from NPO to SimNPO."""
LENGTHS = {5: "seen", 20: "not seen"}
"""Length of forget2 sequences, and whether the start model has seen them."""
FORGET = ("forget1", "forget2")
LEVELS = (0.05, 0.10)
"""Retain distances at which methods are compared, nats."""
RANGE = 0.3
"""Retain distances drawn, nats."""
Curve = list[dict[str, float]]
"""Distance of every chain, nats, and `step`, from step 0."""


@dataclass(frozen=True)
class Setting:
    """What the runs of a study have in common: `batch` forget sequences a step, evaluated at `every` nth step.

    A run ends at the retain distance `stop`, nats.
    """

    size: Literal["small", "paper"] = "small"
    lr: float = 2e-3
    steps: int = 60
    every: int = 2
    batch: int = 4
    stop: float = 0.5


SETTINGS = {"small": Setting(), "paper": Setting("paper", lr=5e-4, steps=50, every=1)}


def run(options: Namespace) -> None:
    if len(set(options.seeds)) < len(options.seeds):
        raise UserError(f"--seeds: must be different numbers, got {options.seeds}")
    out, setting = options.out, SETTINGS[options.setting]
    asked = {"setting": asdict(setting), "seeds": options.seeds, "methods": list(METHODS)}
    file = out / "study.json"
    if not file.is_file():
        results = study(out / "models", setting, options.seeds, options.processes)
        write_json(file, {"asked": asked, "results": results})
    kept = read_json(file)
    if kept["asked"] != asked:
        raise UserError(f"--out {out} holds a study of other settings or seeds; give another folder")
    text = table(kept["results"])
    write_text(out / "table.md", text + "\n")
    figure(kept["results"], out / "trade_off.png")
    print(text)
    print(f"written: {file}, {out / 'table.md'}, {out / 'trade_off.png'}")


def study(folder: Path, setting: Setting, seeds: Sequence[int], processes: int) -> list[dict[str, Any]]:
    """Results of `compare` for each seed and length, in parallel processes."""
    tasks = [(folder, setting, length, seed) for seed in seeds for length in LENGTHS]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compare, *zip(*tasks, strict=True)))


def compare(folder: Path, setting: Setting, length: int, seed: int) -> dict[str, Any]:
    """`length`, `seed`, distances of the `start` and `retrained` models, and the curves of all `methods`."""
    torch.set_num_threads(1)
    quiet()
    warnings.filterwarnings("ignore")
    path = folder / f"length{length}-seed{seed}"

    def data() -> MarkovData:
        return MarkovData(
            str(path),
            forget2_length=length,
            size=setting.size,
            effective_batch=setting.batch,
            per_device_batch=setting.batch,
            seed=seed,
            eval=EvalOptions(tokens_per_batch=16384),
        )

    data().prepare_data()
    methods = {name: unlearn(str(path / "start"), data(), setting, *method) for name, method in METHODS.items()}
    models = {model: measure_once(str(path / model), data()) for model in ("start", "retrained")}
    print(f"forget2 of length {length}, seed {seed}: {len(methods)} methods", flush=True)
    return {"length": length, "seed": seed, **models, "methods": methods}


def unlearn(name: str, data: MarkovData, setting: Setting, objective: str, settings: dict[str, float]) -> Curve:
    """Unlearn from a start model with a class of `simnpo_pl.objectives`, evaluating every few steps."""
    loss = getattr(objectives, objective)(**settings)
    options: dict[str, Any] = {"lr": setting.lr, "weight_decay": 0.0, "warmup_epochs": 0, "schedule": "constant"}
    module = UnlearningModule(name, objective=loss, retain_loss=None, forget_weight=1.0, **options)
    curve: Curve = []
    batches: list[Any] = []

    def measure(trainer: Any, *_: Any) -> None:
        if trainer.global_step % setting.every == 0:
            batches.extend([] if batches else data.val_dataloader())
            curve.append({"step": trainer.global_step, **_distances(module, data, batches)})
            trainer.should_stop = trainer.global_step > 0 and curve[-1]["retain"] > setting.stop

    # Between steps, since a validation loop of the Trainer would take longer than the steps.
    callback = LambdaCallback(on_train_start=measure, on_train_batch_end=measure)
    _trainer(max_epochs=-1, max_steps=setting.steps, callbacks=[callback]).fit(module, data)
    return curve


def measure_once(name: str, data: MarkovData) -> dict[str, float]:
    """Distances of a model as it is."""
    module = UnlearningModule(name)
    module.configure_model()
    data.trainer = _trainer()
    return {"step": 0, **_distances(module, data, data.val_dataloader())}


def _distances(module: Any, data: MarkovData, batches: Iterable[Any]) -> dict[str, float]:
    evaluation = data.evaluation()
    evaluation.reset()
    module.policy.eval()
    with torch.no_grad():
        for batch in batches:
            evaluation.add_scores(batch, evaluation.score(module._scorer()({"rows": batch})["rows"], batch))
    module.policy.train()
    return {name.removesuffix("/distance"): value for name, value in evaluation.compute().values.items()}


def _trainer(**options: Any) -> Any:
    return pl.Trainer(accelerator="cpu", barebones=True, limit_val_batches=0, use_distributed_sampler=False, **options)


def floors(length: int) -> dict[str, float]:
    """Smallest distances that a start model of this setting can reach, nats."""
    return bayes_floors(np.array([2.0, 1.0, 1.0 if LENGTHS[length] == "seen" else 0.0]), length, count=20000)


def at_level(curve: Curve, level: float) -> dict[str, float] | None:
    """Forget distances where the retain distance first reaches a level, nats; None if it never does."""
    for before, after in pairwise(curve):
        low, high = before["retain"], after["retain"]
        # A curve may end at the level.
        if low <= level <= high and low < high:
            share = (level - low) / (high - low)
            return {name: before[name] + share * (after[name] - before[name]) for name in FORGET}
    return None


def table(results: Sequence[dict[str, Any]]) -> str:
    """Forget distances at two retain distances as mean and deviation over seeds, and seeds won by SimNPO."""
    seeds, (low, high) = {result["seed"] for result in results}, LEVELS
    parts = [f"KL(true chain || model) in nats where the retain distance is {low} and {high}; {len(seeds)} seeds."]
    columns = [(name, level) for name in FORGET for level in LEVELS]
    for length, seen in LENGTHS.items():
        group = [result for result in results if result["length"] == length]
        rows = []
        for method in METHODS:
            curves = [result["methods"][method] for result in group]
            levels = {level: [found for curve in curves if (found := at_level(curve, level))] for level in LEVELS}
            cells = [_spread([found[name] for found in levels[level]], len(group)) for name, level in columns]
            rows.append([method, *cells])
        parts += [f"forget2 of length {length}, {seen} by the start model:"]
        parts += [markdown.table(["method", *(f"{name} @{level:.2f}" for name, level in columns)], rows)]
        for model in ("start", "retrained"):
            shown = [f"{name} {_spread([r[model][name] for r in group], len(group))}" for name in ("retain", *FORGET)]
            parts += [f"{model}: {', '.join(shown)}"]
        shown = [f"{name} {value:.4f}" for name, value in floors(length).items()]
        parts += [f"Bayes floors of the start model: {', '.join(shown)}"]
        what = f"distance at {high:.2f} than GA and both NPO"
        parts += [f"SimNPO has the larger {name} {what} {won(group, name)}" for name in FORGET]
    return "\n\n".join(parts)


def won(group: Sequence[dict[str, Any]], name: str) -> str:
    """On how many seeds SimNPO beats the best other method, at the larger retain distance."""
    wins = []
    for result in group:
        found = {method: at_level(curve, LEVELS[1]) for method, curve in result["methods"].items()}
        ours = found["SimNPO, beta 4"]
        others = [point[name] for method in ("GA", "NPO, beta 0.2", "NPO, beta 1") if (point := found[method])]
        if ours and others:
            wins.append(ours[name] > max(others))
    return f"on {sum(wins)} of {len(wins)} seeds."


def _spread(values: Sequence[float], seeds: int) -> str:
    if not values:
        return "-"
    known = f" ({len(values)} of {seeds})" if len(values) < seeds else ""
    if max(values) < 0.1:
        return f"{statistics.fmean(values):.3f}{known}"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.2f}{known}"


def figure(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Forget distance against retain distance, a row of panels for each length of forget2, seeds as bands."""
    with panels(file, len(LENGTHS), len(FORGET), (4.5, 3.5), sharex=True) as (sheet, axes):
        for row, (length, seen) in zip(axes, LENGTHS.items(), strict=True):
            group = [result for result in results if result["length"] == length]
            floor = floors(length)
            for axis, name in zip(row, FORGET, strict=True):
                for number, method in enumerate(METHODS):
                    _draw(axis, [result["methods"][method] for result in group], name, method, color(number))
                for model, marker in (("start", "s"), ("retrained", "*")):
                    x, y = ([result[model][key] for result in group] for key in ("retain", name))
                    style = {"color": GREY, "edgecolor": "black", "linewidth": 0.5, "zorder": 4}
                    axis.scatter(x, y, marker=marker, s=60, label=f"{model} model", **style)
                label = "Bayes floor of the start model"
                axis.plot(floor["retain"], floor[name], "x", color="black", label=label, zorder=5)
                which = f"forget2, {seen} by the start model" if name == "forget2" else "forget1"
                axis.set_title(f"{which} (forget2 of length {length})")
                axis.set(xlim=(0, RANGE), ylim=(0, 1.5), ylabel="forget distance, nats")
        for axis in axes[-1]:
            axis.set_xlabel("retain distance, nats")
        sheet.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def _draw(axis: Any, curves: Sequence[Curve], name: str, label: str, shade: str) -> None:
    """Mean over seeds with the range of the seeds as a band, over the retain distances that every seed reaches."""
    first = max(curve[0]["retain"] for curve in curves)
    last = min(RANGE, *(max(point["retain"] for point in curve) for curve in curves))
    if last > first:
        grid = np.linspace(first, last, 60)
        values = np.array([[point[name] for x in grid if (point := at_level(curve, x))] for curve in curves])
        axis.plot(grid, values.mean(axis=0), color=shade, label=label, linewidth=1.6)
        axis.fill_between(grid, values.min(axis=0), values.max(axis=0), color=shade, alpha=0.12, linewidth=0)
