"""Runs every small command of docs/reproducing.md in order, and sees that each left what it says.

    python scripts/reproduce_tiny.py                 # about half an hour on two cores
    python scripts/reproduce_tiny.py "Table A2"      # the sections whose title has these words

Finished runs are skipped, so an interrupted call can be repeated.
"""

import argparse
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "reproducing.md"
MARK = "# at the scale of the demo"


def sections(text: str) -> dict[str, tuple[list[str], list[str]]]:
    """Title of a section to its commands at the paper's size and at the demo's."""
    found = {}
    for part in re.split(r"^## ", text, flags=re.M)[1:]:
        title, _, body = part.partition("\n")
        full: list[str] = []
        small: list[str] = []
        for block in re.findall(r"```bash\n(.*?)```", body, flags=re.S):
            lines = block.replace("\\\n", " ").splitlines()
            commands = [line for line in lines if line.strip() and not line.startswith("#")]
            (small if MARK in lines else full).extend(commands)
        if small:
            found[title] = (full, small)
    return found


def targets(words: list[str]) -> list[Path]:
    """Files and folders that a command leaves."""
    named = [Path(words[i + 1]) for i, word in enumerate(words) if word in ("-o", "--out", "--run_dir", "--folder")]
    return named or [Path(words[4])]


def run(command: str, log: Path) -> None:
    """One command; stops the script where it fails or leaves nothing."""
    words = [sys.executable, *shlex.split(command)[1:]]
    left = targets(words)
    if "fit" in words[:4]:
        if all((folder / "model").is_dir() for folder in left):
            print(f"finished before: {command}")
            return
        words += ["--ckpt_path", "last"]
    began = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        code = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    missing = [str(path) for path in left if not path.exists()]
    if code or missing:
        sys.exit(f"{command}\nended with exit code {code}, missing are {missing or 'none'}; its output is in {log}")
    print(f"{time.monotonic() - began:5.0f} s  {command}", flush=True)


def main() -> None:
    """Run the sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("titles", nargs="*", help="words of the sections to run (default: all)")
    wanted = parser.parse_args().titles
    for title, (_, small) in sections(PAGE.read_text()).items():
        if not wanted or any(word in title for word in wanted):
            print(f"\n{title}", flush=True)
            for command in small:
                run(command, Path("runs/tiny/logs") / f"{re.sub(r'[^a-z0-9]+', '-', title.lower())}.txt")


if __name__ == "__main__":
    main()
