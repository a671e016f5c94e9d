"""Run the tests of clients and neighbours, each beside the packages that it is about.

    python tests/clients.py                     all of them
    python tests/clients.py lerobot-0.4.4       these

Each gets an environment of its own under `.matrix/`, with the torch that `tests/matrix.py` shares among them. lerobot
comes without its dependencies but for those that its pi0 and pi0.5 import, within lerobot's own pins (torch apart).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import matrix

# What importing lerobot's pi0 asks for. numpy for datasets' pyarrow, as torch is shared with environments below 2.
_LEROBOT = (
    "accelerate>=1.10,<2", "av>=15,<16", "datasets>=4,<4.2", "deepdiff>=7,<9", "diffusers>=0.27.2,<0.36",
    "draccus==0.10.0", "einops", "huggingface-hub>=0.34.2,<0.36", "imageio", "numpy>=2", "packaging>=24.2,<26",
    "peft>=0.18,<1", "pyserial",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Environment:
    """A test file and what it is run beside; `bare` is installed without dependencies."""

    test: str
    packages: tuple[str, ...]
    bare: tuple[str, ...] = ()


def _lerobot(release: str, transformers: str, torchvision: str) -> Environment:
    bare = (f"lerobot=={release}", f"torchvision=={torchvision}")
    return Environment("test_lerobot.py", (*_LEROBOT, f"transformers=={transformers}"), bare)


ENVIRONMENTS = {
    "lerobot-0.4.0": _lerobot("0.4.0", "4.53.2", "0.22.1"),
    "lerobot-0.4.1": _lerobot("0.4.1", "4.55.4", "0.22.1"),
    "lerobot-0.4.2": _lerobot("0.4.2", "4.56.2", "0.22.1"),
    "lerobot-0.4.3": _lerobot("0.4.3", "4.57.1", "0.22.1"),
    "lerobot-0.4.4": _lerobot("0.4.4", "4.57.6", "0.25.0"),
    "neighbours-4.57.6": Environment("test_neighbours.py", ("transformers==4.57.6", "accelerate", "peft")),
    "neighbours-5.23.0": Environment(
        "test_neighbours.py", ("transformers==5.23.0", "accelerate", "peft", "triton"), ("liger-kernel==0.8.5",)
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(ENVIRONMENTS))
    names = parser.parse_args().names or list(ENVIRONMENTS)
    failed = [name for name in names if not passes(name)]
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return int(bool(failed))


def passes(name: str) -> bool:
    """Build the environment where it is not there yet, and run its test in it."""
    wanted, tests = ENVIRONMENTS[name], matrix.ROOT / "tests"
    shared = matrix.shared_environment("3.11", "2.13.0")
    python = _environment(name, wanted, shared)
    print(f"== {name}", flush=True)
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tests)}
    environ.pop("OPENPI_LORA", None)
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests / wanted.test)]
    if wanted.test == "test_lerobot.py" and not _runs(python, "import torchvision"):
        command += ["-p", "cpu_torchvision"]
    return subprocess.run(command, cwd=matrix.ROOT, env=environ).returncode == 0


def _environment(name: str, wanted: Environment, shared: Path) -> str:
    folder = matrix._make(matrix.FOLDER / f"{name}-{shared.name}", str(shared / "bin/python"), wanted.packages, shared)
    python = str(folder / "bin/python")
    if wanted.bare:
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *wanted.bare], check=True)
    return python


def _runs(python: str, code: str) -> bool:
    return subprocess.run([python, "-c", code], capture_output=True).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
