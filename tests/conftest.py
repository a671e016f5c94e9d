"""Before torch loads: one thread, and bfloat16 kernels of the kind that made the golden data (no AMX)."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
os.environ["OMP_NUM_THREADS"] = "1"

import openpi_lora_patch  # noqa: F401, I001 (the first import, as for every user)
import golden
import pytest
import torch

torch.set_num_threads(1)

Child = Callable[..., subprocess.CompletedProcess[str]]
# What a matrix run on a release that is not in the table yet needs in child processes too.
UNTESTED = "OPENPI_LORA_ALLOW_UNTESTED"


@pytest.fixture
def child(tmp_path: Path) -> Child:
    """Run Python code or arguments in a process of its own, with none of our variables but those given."""

    def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        clean = {name: text for name, text in os.environ.items() if not name.startswith("OPENPI_LORA")}
        clean |= {UNTESTED: os.environ[UNTESTED]} if UNTESTED in os.environ else {}
        return subprocess.run(
            [sys.executable, *arguments],
            env=clean | environ,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", type=Path, help="write counts and the worst difference to this file, as JSON")
    parser.addoption("--long", action="store_true", help="20 times the damaged inputs")
    parser.addoption("--break", dest="broken", choices=sorted(BREAKS), help="break a patch on purpose")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.broken:
        BREAKS[config.option.broken]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.option.report:
        stats = terminalreporter.stats
        counts = {kind: len(stats.get(kind, [])) for kind in ("passed", "failed", "skipped")}
        counts["failed"] += len(stats.get("error", []))
        config.option.report.write_text(json.dumps(counts | {"worst": max(golden.DISTANCES, default=None)}))


def _ignore_the_condition() -> None:
    from openpi_lora_patch.models.gemma import AdaptiveNorm

    right = AdaptiveNorm.forward
    AdaptiveNorm.forward = lambda self, x, cond=None: right(self, x, None if cond is None else torch.zeros_like(cond))


def _grow_the_cache() -> None:
    from openpi_lora_patch.models.gemma import GemmaAttention

    right = GemmaAttention.forward
    GemmaAttention.forward = lambda self, x, rotary, mask, cache=None, use_cache=False: right(
        self, x, rotary, mask, cache, cache is not None
    )


def _scale_images() -> None:
    from openpi_lora_patch.models.paligemma import PaliGemmaModel

    right = PaliGemmaModel.get_image_features
    PaliGemmaModel.get_image_features = lambda self, images: right(self, images) / 8


# The failures that stock releases show without an error; each has to be seen by a test.
BREAKS = {"adarms": _ignore_the_condition, "cache": _grow_the_cache, "images": _scale_images}
