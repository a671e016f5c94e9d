"""What a start of Python costs with this package installed: instructions (callgrind's) and milliseconds.

    python benchmarks/startup.py --json benchmarks/results/startup.json

Each start runs in a virtual environment of its own that holds nothing, this package, or another `.pth` file. The
instructions are those of the whole process and need valgrind; hash seed and address layout are fixed, so they repeat to
a few in a million. Milliseconds are the median of `--starts`, the ways by turns, in random order.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src/openpi_lora_patch"
PTH = "openpi_lora_patch.pth"
SET = {"OPENPI_LORA": "1"}
# Of each start: which environment, the variables set, the program.
WAYS: dict[str, tuple[str, dict[str, str], str]] = {
    "without this package": ("nothing", {}, "pass"),
    "an empty `.pth` file in its place": ("an empty .pth", {}, "pass"),
    "one with `import os`": ("a .pth with a line", {}, "pass"),
    "installed, `OPENPI_LORA` unset": ("this package", {}, "pass"),
    "`OPENPI_LORA=1`": ("this package", SET, "pass"),
    "`OPENPI_LORA=1`, activated": ("this package", SET, "import openpi_lora_patch as o; o.status()"),
}
BASE = next(iter(WAYS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=200, help="of each way, for the milliseconds")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        interpreters = {kind: make(Path(folder), kind) for kind in {kind for kind, _, _ in WAYS.values()}}
        commands = {way: ([interpreters[kind], "-c", code], set_) for way, (kind, set_, code) in WAYS.items()}
        figures = {"instructions": instructions(commands), "milliseconds": milliseconds(commands, options.starts)}
    print(table(figures))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def make(folder: Path, kind: str) -> str:
    """The interpreter of a virtual environment whose path is as long as that of every other kind."""
    home = folder / str(len(list(folder.iterdir())))
    venv.create(home, symlinks=True, with_pip=False)
    packages = home / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    if kind == "this package":
        shutil.copytree(PACKAGE, packages / PACKAGE.name, ignore=shutil.ignore_patterns("*.pth"))
        shutil.copy(PACKAGE / PTH, packages)
    elif kind != "nothing":
        (packages / PTH).write_text("" if kind == "an empty .pth" else "import os\n")
    return str(home / "bin/python")


def run(command: list[str], variables: dict[str, str]) -> str:
    """What it prints on stderr."""
    fixed = {
        "PATH": os.environ["PATH"],
        "PYTHONHASHSEED": "0",
        "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
    }
    return subprocess.run(command, env=fixed | variables, check=True, capture_output=True, text=True).stderr


def instructions(commands: dict[str, tuple[list[str], dict[str, str]]]) -> dict[str, int]:
    """Instructions that each start executes, nothing where valgrind is missing; the first, unseen, compiles to .pyc."""
    if shutil.which("valgrind") is None or shutil.which("setarch") is None:
        return {}
    found = {}
    for way, (command, variables) in commands.items():
        run(command, variables)
        counting = ["setarch", "-R", "valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", *command]
        counted = re.search(r"Collected : (\d+)", run(counting, variables))
        assert counted is not None
        found[way] = int(counted[1])
    return found


def milliseconds(commands: dict[str, tuple[list[str], dict[str, str]]], starts: int) -> dict[str, float]:
    """The median of each start's."""
    found: dict[str, list[float]] = {way: [] for way in commands}
    draw = random.Random(0)
    for _ in range(starts):
        for way in draw.sample(list(commands), len(commands)):  # What comes after the longest is slower.
            command, variables = commands[way]
            began = time.perf_counter()
            run(command, variables)
            found[way].append(1000 * (time.perf_counter() - began))
    return {way: statistics.median(times) for way, times in found.items()}


def table(figures: dict[str, dict[str, float]]) -> str:
    """A table for the README: each start, and how much more than the first it takes."""
    units = {"instructions": ("million instructions", 1e6), "milliseconds": ("ms", 1.0)}
    shown = [(*units[name], values) for name, values in figures.items() if values]
    lines = ["| start | " + " | ".join(f"{unit} | more" for unit, _, _ in shown) + " |"]
    lines.append("| --- |" + " --- | --- |" * len(shown))
    for way in WAYS:
        cells = [f"{v[way] / one:.2f} | {(v[way] - v[BASE]) / one:+.3f}" for _, one, v in shown]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
