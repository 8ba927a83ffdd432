"""The demo on several seeds, each with its own data, models and unlearning; prints a table.

python scripts/demo_seeds.py --seeds 0 1 2 3 4
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from simnpo_pl.metrics.titles import title_of

ROLES = ("start", "retrained", "final")
COLUMNS = ("forget/probability", "forget/rouge", "forget/truth_ratio", "retain/probability", "model_utility")


def run(seed: int, folder: Path) -> dict[str, Any]:
    """Results of one seed, which runs if they are missing."""
    data, target = folder / f"data-{seed}", folder / f"run-{seed}"
    if not (target / "results.json").is_file():
        command = [sys.executable, "-m", "simnpo_pl", "fit", "--config", "configs/demo.yaml"]
        command += ["--seed_everything", str(seed), "--run_dir", str(target), "--data.path", str(data)]
        command += ["--model.name", str(data / "start"), "--eval.retrained", str(data / "retrained")]
        subprocess.run([*command, "--trainer.enable_progress_bar", "false"], check=True, stdout=subprocess.DEVNULL)
    return json.loads((target / "results.json").read_text())


def passes(record: dict[str, Any]) -> bool:
    """Whether the run shows what the demo is meant to show."""
    start, retrained, final = (record[role]["metrics"] for role in ROLES)
    return (
        start["forget/probability"] > 0.9
        and abs(final["forget/probability"] - retrained["forget/probability"]) < 0.15
        and start["forget_quality"] < 1e-6
        and final["forget_quality"] > 0.05
        and final["retain/probability"] >= 0.9
        and final["model_utility"] >= 0.9 * start["model_utility"]
    )


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--folder", type=Path, default=Path("runs/demo-seeds"), help="where data and runs go")
    arguments = parser.parse_args()
    print("Each cell: start / retrained / unlearned.\n")
    print("| seed | forget quality | " + " | ".join(title_of(name).short for name in COLUMNS) + " | shown |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    for seed in arguments.seeds:
        record = run(seed, arguments.folder)
        quality = [record[role]["metrics"].get("forget_quality") for role in ("start", "final")]
        cells = [f"{quality[0]:.0e} / - / {quality[1]:.3f}"]
        for name in COLUMNS:
            cells.append(" / ".join(f"{record[role]['metrics'][name]:.3f}" for role in ROLES))
        print(f"| {seed} | " + " | ".join(cells) + f" | {'yes' if passes(record) else 'no'} |", flush=True)


if __name__ == "__main__":
    main()
