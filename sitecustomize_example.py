"""Start openpi_lora_patch in every Python process where `.pth` files are forbidden.

How to use it:
1. Copy this file, as `sitecustomize.py`, to a directory of your own:
       mkdir -p ~/openpi_start && cp sitecustomize_example.py ~/openpi_start/sitecustomize.py
2. Put that directory first on the path and switch the patch on:
       export PYTHONPATH=~/openpi_start${PYTHONPATH:+:$PYTHONPATH} OPENPI_LORA=1

Python imports only the first `sitecustomize` on its path, so this one runs the next, if there is one, when it is done.
Where openpi_lora_patch was pip-installed normally, its own `.pth` file does this already. Both together do no harm.
"""

import importlib.machinery
import importlib.util
import os
import sys


def _run_next_sitecustomize():
    here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 (pathlib would cost each start 5 ms)
    rest = [entry for entry in sys.path if os.path.abspath(entry) != here]  # noqa: PTH100
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", rest)
    if spec is not None:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


try:
    if os.environ.get("OPENPI_LORA", "0") not in ("", "0"):
        import openpi_lora_patch.startup

        openpi_lora_patch.startup.start()
finally:
    _run_next_sitecustomize()
