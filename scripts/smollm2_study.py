"""SimNPO, NPO, GradDiff and WGA on a real model: SmolLM2-135M-Instruct on TOFU forget05, tuned alike, over seeds.

    python scripts/convert_smollm2.py BASE
    python scripts/smollm2_study.py OUT --base BASE --data FOLDER          # all runs; the same command resumes
    python scripts/smollm2_study.py OUT --report --write docs/results.md   # tables, figure and findings

FOLDER holds TOFU's json files. Start and retrained models are fine-tuned, each method is tuned on the first start
model, the chosen settings run with other seeds from every start model, and these runs are attacked;
configs/study/smollm2/ has all settings. A finished run is one file of OUT/results; OUT/results.json.gz holds them all
and is what --report reads. Options that are not listed are options of every `fit`.
"""

import argparse
import gc
import gzip
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smollm2_choice import choose

from simnpo_pl.studies.plans import read_yaml, words_of
from simnpo_pl.utils.files import read_json, read_json_lines, write_json, writing

PARTS = ("models", "trials", "runs", "relearn", "quantize", "leak")
KEPT_RESULTS = (
    *("seed", "final", "counts", "unavailable", "objective", "seconds", "cpu_seconds", "peak_memory_gib", "versions"),
)
KEPT_SCORES = (
    *("probability", "truth_ratio", "rougeL_recall", "extraction_strength", "exact_memorization", "answer_nll"),
    *("mia_min_k", "answer", "generation", "degenerate"),
)
PACK_SECONDS = 10.0
"""Between two writes of results.json.gz; the last one is made at the end."""


@dataclass(frozen=True)
class Task:
    """One command.

    Args:
        name: PART/LABEL; its result is OUT/results/PART/LABEL.json.
        words: The command line, without `python -m simnpo_pl`.
        run: Folder of the run that it makes or attacks.
        needs: Names of the tasks before it.
        keeps_model: Whether the exported model is read later.
    """

    name: str
    words: tuple[str, ...]
    run: Path
    needs: tuple[str, ...] = ()
    keeps_model: bool = True

    @property
    def part(self) -> str:
        part = self.name.split("/")[0]
        return "models" if part == "train" else part


class Study:
    """What a study file says, as tasks.

    Args:
        plan: Content of the file.
        out: Folder of everything that is made.
        base: Model that all others are fine-tuned from.
        fit: Further options of every `fit`.
    """

    def __init__(self, plan: dict[str, Any], out: Path, base: str, fit: Sequence[str]) -> None:
        self.plan, self.out, self.base, self.more = plan, out, base, tuple(fit)
        self.reference = f"models/retrained-{plan['models']['retrained'][0]}"

    def tasks(self, results: dict[str, Any], tuned: bool) -> Iterator[Task]:
        """All tasks that are known: what follows the tuning is known once it is done."""
        names = [f"{kind}-{seed}" for kind, seeds in self.plan["models"].items() for seed in seeds]
        # The reference first: the others wait for it.
        names.sort(key=lambda name: f"models/{name}" != self.reference)
        for name in names:
            kind, seed = name.split("-")
            split = ("--data.train_split", self.plan["data"][kind])
            options = (*words_of(self.plan["finetune"]), *split, "--seed_everything", seed)
            yield self.fit(f"train/{name}", self.base, options)
        for name in names:
            log = "null" if f"models/{name}" == self.reference else str(self.out / self.reference)
            needs = (f"train/{name}", *(() if log == "null" else (self.reference,)))
            # No epoch: the model is measured and attacked as an unlearned one is.
            options = ("--model.objective", "FineTune", "--trainer.max_epochs", "0", "--eval.retain_log", log)
            yield self.fit(f"models/{name}", str(self.out / f"train/{name}/model"), options, needs)
        start = f"start-{self.plan['models']['start'][0]}"
        trials = self.plan["trials"]
        for number in range(max(map(len, trials.values()))):
            for method, settings in trials.items():
                if number < len(settings):
                    yield self.unlearn(f"trials/{method}-{number}", start, 0, method, settings[number], keeps=False)
        attacked: dict[str, int | None] = {f"models/{name}": None for name in names if "retrained" in name}
        if tuned:
            chosen = choose(self.plan, results)
            for seed in self.plan["seeds"]:
                for first in self.plan["models"]["start"]:
                    for method, choice in chosen.items():
                        name = f"runs/{method}-start{first}-seed{seed}"
                        attacked[name] = seed
                        yield self.unlearn(name, f"start-{first}", seed, method, trials[method][choice.number])
        for attack, settings in self.plan["attacks"].items():
            for name, own in attacked.items():
                if own in (None, *settings["seeds"]):
                    words = (attack, str(self.out / name), *words_of(settings["options"]))
                    yield Task(f"{attack}/{name.split('/')[1]}", words, self.out / name, (name,))

    def unlearn(self, name: str, start: str, seed: int, method: str, settings: str, keeps: bool = True) -> Task:
        options = ("--model.objective", method, *words_of(settings), "--seed_everything", str(seed))
        options += ("--eval.retain_log", str(self.out / self.reference))
        return self.fit(
            name, str(self.out / f"train/{start}/model"), options, (f"train/{start}", self.reference), keeps
        )

    def fit(
        self, name: str, model: str, options: Sequence[str], needs: tuple[str, ...] = (), keeps: bool = True
    ) -> Task:
        own = ("--model.name", model, "--run_dir", str(self.out / name), "--trainer.enable_progress_bar", "false")
        return Task(
            name, ("fit", "--config", self.plan["fit"], *self.more, *options, *own), self.out / name, needs, keeps
        )


# -- workers -------------------------------------------------------------------------------------------------


def start_worker(logs: Path) -> None:
    """Import once what every task needs; what a worker prints goes to a file."""
    logs.mkdir(parents=True, exist_ok=True)
    log = os.open(logs / f"{os.getpid()}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    import torch

    import simnpo_pl.cli.main
    import simnpo_pl.studies.leak
    import simnpo_pl.studies.quantize
    import simnpo_pl.studies.relearn  # noqa: F401

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def perform(task: Task) -> dict[str, Any]:
    """Run a task in this worker; its result, or `error`."""
    import torch

    from simnpo_pl.__main__ import main, user_message

    started = time.monotonic()
    print(f"\n=== {task.name}: {' '.join(task.words)}", flush=True)
    try:
        if task.words[0] == "fit":
            # Of an earlier call that was interrupted.
            shutil.rmtree(task.run, ignore_errors=True)
        main([*task.words, "--debug"])
        result = collect(task)
    except (Exception, SystemExit) as error:
        result = {"error": user_message(error) or repr(error)}
        if isinstance(error, Exception):
            sys.excepthook(type(error), error, error.__traceback__)
    finally:
        if not task.keeps_model:
            shutil.rmtree(task.run / "model", ignore_errors=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    seconds = round(time.monotonic() - started, 1)
    return {**result, "name": task.name, "words": list(task.words), "device": device, "wall_seconds": seconds}


def collect(task: Task) -> dict[str, Any]:
    """What is kept of a task: results, and scores and answers by split and row."""
    record = read_json(task.run / "results.json")
    group = {"relearn": "relearn", "quantize": "quantized", "leak": "leak"}.get(task.words[0])
    if group is not None:
        # The newest alone: an attack that was made again has a file of its own.
        files = sorted(task.run.glob("leak_*.jsonl"), key=lambda file: file.stat().st_mtime)[-1:]
        rows_of = [row for file in files for row in read_json_lines(file)]
        asked = [row["samples"] for row in rows_of if row["prompt"] == "question"]
        best = {"best": [max(one["rougeL_recall"] for one in row) for row in asked]} if group == "leak" else {}
        return {"found": record[group], **best}
    rows: dict[str, dict[str, list[Any]]] = {}
    if (task.run / "rows.jsonl").is_file():
        for row in read_json_lines(task.run / "rows.jsonl"):
            columns = rows.setdefault(row["split"], {})
            for name in KEPT_SCORES:
                # Texts are read of forget rows alone.
                if name in row and (row["split"] == "forget" or not isinstance(row[name], str)):
                    value = row[name]
                    columns.setdefault(name, []).append(float(f"{value:.6g}") if isinstance(value, float) else value)
    return {"results": {name: record[name] for name in KEPT_RESULTS if name in record}, "rows": rows}


# -- the order of a study ------------------------------------------------------------------------------------


def run_study(study: Study, jobs: int, parts: Sequence[str], deadline: float) -> None:
    """Run what is missing, several tasks at a time, in the order of `Study.tasks`; none starts after the deadline."""
    results = read_results(study.out)
    failed: set[str] = set()
    try:
        perform_all(study, jobs, parts, deadline, results, failed)
    finally:
        pack(study.out, results)
    left = [task.name for task in study.tasks(results, is_tuned(study, results, failed)) if task.name not in results]
    print(f"{len(results)} tasks finished, {len(failed)} failed, {len(left)} known ones left", flush=True)


def perform_all(
    study: Study, jobs: int, parts: Sequence[str], deadline: float, results: dict[str, Any], failed: set[str]
) -> None:
    """Add to `results` and `failed` what comes of all tasks."""
    started = packed = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, start_worker, (study.out / "logs",)) as pool:
        for _ in range(jobs):
            # All workers import at once, also those that the first tasks do not need.
            pool.submit(os.getpid)
        running: dict[Future[dict[str, Any]], Task] = {}
        while True:
            waiting = list(pending(study, results, failed, parts, [task.name for task in running.values()]))
            for task in waiting[: jobs - len(running)] if time.monotonic() < deadline else []:
                running[pool.submit(perform, task)] = task
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task, result = running.pop(future), future.result()
                print(f"{time.monotonic() - started:.0f} s: {line_of(result)}", flush=True)
                if "error" in result:
                    failed.add(task.name)
                else:
                    file = study.out / "results" / f"{task.name}.json"
                    write_json(file, result)
                    results[task.name] = read_json(file)
            if time.monotonic() - packed > PACK_SECONDS:
                pack(study.out, results)
                packed = time.monotonic()


def is_tuned(study: Study, results: dict[str, Any], failed: set[str]) -> bool:
    """Whether every trial is finished or failed, and every method and model has one to choose from."""
    trials = [task.name for task in study.tasks(results, tuned=False) if task.part == "trials"]
    models = [f"models/start-{study.plan['models']['start'][0]}", study.reference]
    return all(name in results or name in failed for name in trials) and all(name in results for name in models)


def pending(
    study: Study, results: dict[str, Any], failed: set[str], parts: Sequence[str], running: Sequence[str]
) -> Iterator[Task]:
    """Tasks that can start."""
    for task in study.tasks(results, is_tuned(study, results, failed)):
        earlier = results.get(task.name)
        if earlier is not None and earlier["words"] != list(task.words):
            sys.exit(
                f"{task.name} in {study.out} was made with other settings: give another folder, or remove its file"
            )
        if earlier is not None or task.part not in parts or task.name in (*failed, *running):
            continue
        if all(name in results for name in task.needs):
            yield task


def line_of(result: dict[str, Any]) -> str:
    """How a task went, in one line."""
    if "error" in result:
        return f"{result['name']}: {result['wall_seconds']} s, FAILED: {result['error']}"
    found = result.get("results", {})
    metrics = found.get("final", {}).get("metrics", {})
    shown = {
        "forget prob.": metrics.get("forget/probability"),
        "forget quality": metrics.get("forget_quality"),
        "utility": metrics.get("model_utility"),
    }
    values = ", ".join(f"{name} {value:.3g}" for name, value in shown.items() if value is not None)
    phases = ", ".join(f"{name} {value}" for name, value in found.get("seconds", {}).items())
    memory = found.get("peak_memory_gib", {})
    return f"{result['name']}: {result['wall_seconds']} s ({phases or 'attack'}); {memory}; {values}"


def read_results(out: Path) -> dict[str, Any]:
    """Results of finished tasks by name."""
    files = sorted((out / "results").rglob("*.json"))
    return {str(file.relative_to(out / "results").with_suffix("")): read_json(file) for file in files}


def pack(out: Path, results: dict[str, Any]) -> None:
    """All results in one compressed file."""
    with writing(out / "results.json.gz") as file, gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as packed:
        packed.write(json.dumps(results, separators=(",", ":")).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of models, runs and results")
    parser.add_argument("--base", metavar="FOLDER", help="the model to fine-tune, see convert_smollm2.py")
    parser.add_argument("--data", metavar="FOLDER", help="TOFU's json files")
    parser.add_argument("--study", type=Path, default=Path("configs/study/smollm2/study.yaml"), metavar="FILE")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="parts to do")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes; each takes up to 8 GiB")
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="M", help="after which nothing starts")
    parser.add_argument("--report", action="store_true", help="print tables and findings; make no run")
    parser.add_argument("--write", type=Path, nargs="+", default=[], metavar="PAGE", help="fill these pages, too")
    options, fit = parser.parse_known_args()
    plan = read_yaml(options.study)
    if options.report:
        from smollm2_report import report

        report(plan, options.out / "results.json.gz", options.write)
        return
    if not (options.base and options.data):
        parser.error("give --base and --data, or --report")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    deadline = time.monotonic() + 60 * options.minutes
    study = Study(plan, options.out.resolve(), str(Path(options.base).resolve()), ["--data.path", options.data, *fit])
    run_study(study, options.jobs, options.parts, deadline)


if __name__ == "__main__":
    main()
