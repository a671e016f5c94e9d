r"""Run the tests of others with OPENPI_LORA=1 and without, and compare what became of each.

    python tests/others.py CHECKOUT tests/models/gemma tests/models/paligemma tests/models/siglip
    python tests/others.py CHECKOUT --as hf-internal-testing/tiny-random-Gemma3ForCausalLM \
        tests/test_decoder_models.py tests/test_trainable_tokens.py tests/test_xlora.py tests/test_hub_features.py \
        -k "Gemma3 or embed_scale or scaled_embedding or custom_peft_type"

CHECKOUT is a checkout of transformers (or of PEFT) at the release that is installed, outside this project. What comes
after the test files goes to pytest. With `--as`, a small random Gemma answers to that name of the model hub, which has
nothing else: PEFT's tests know later Gemmas only, which are not patched. A test that the network, a GPU or a package is
missing for has to end equally both ways. Exits 1 on a difference, 2 where nothing was compared.
"""

from __future__ import annotations

import argparse
import collections
import http.server
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import xml.etree.ElementTree

OUTCOMES = ("failure", "error", "skipped")


def environment(*, on: bool) -> dict[str, str]:
    clean = {name: text for name, text in os.environ.items() if not name.startswith("OPENPI_LORA")}
    clean |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}
    return clean | {"OPENPI_LORA": "1" if on else "0"}


def stand_in(hub: pathlib.Path, name: str) -> None:
    """Put a small random Gemma where the hub's cache `hub` would hold the model `name`."""
    code = f"""
import pathlib, torch, transformers
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, head_dim=8, vocab_size=1024, max_position_embeddings=512)
config = transformers.GemmaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **sizes)
model = pathlib.Path({str(hub)!r}, "models--" + {name!r}.replace("/", "--"))
(model / "refs").mkdir(parents=True)
(model / "refs/main").write_text("0" * 40)
transformers.GemmaForCausalLM(config).save_pretrained(model / "snapshots" / ("0" * 40))
"""
    subprocess.run([sys.executable, "-c", code], env=environment(on=False), check=True)


class EmptyHub(http.server.BaseHTTPRequestHandler):
    """Has no file; one that cannot be reached would be asked again and again, for half a minute a test."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        pass


def active(checkout: pathlib.Path, *, on: bool) -> bool:
    """Whether a process that imports Gemma there is patched."""
    code = (
        "import transformers\n"
        "from transformers.models.gemma import modeling_gemma as gemma\n"
        "print(hasattr(gemma.GemmaForCausalLM.__init__, '__wrapped__'), transformers.__version__)"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=checkout, env=environment(on=on), capture_output=True, text=True, check=True)
    patched, release = found.stdout.split()
    print(f"transformers {release}, {'with' if patched == 'True' else 'without'} the patches", flush=True)
    return patched == "True"


def outcomes(checkout: pathlib.Path, arguments: list[str], *, on: bool) -> dict[str, str]:
    """What became of each test, by its name: passed, failure, error or skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        done = subprocess.run(command, cwd=checkout, env=environment(on=on), stdout=subprocess.DEVNULL, check=False)
        if done.returncode not in (0, 1):  # Of pytest: all was run. It also writes reports of what it broke off.
            raise SystemExit(f"{' '.join(command)} did not run all tests: it exited with {done.returncode}")
        cases = xml.etree.ElementTree.parse(report).getroot().iter("testcase")
        return {
            f"{case.get('classname')}::{case.get('name')}": next(
                (kind for kind in OUTCOMES if case.find(kind) is not None), "passed"
            )
            for case in cases
        }


def main(arguments: list[str] | None = None) -> int:
    """Compare; returns 0 where everything is equal, 1 on a difference, 2 where there was nothing to compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=pathlib.Path)
    parser.add_argument("--as", dest="name", help="a model of the hub for which a small Gemma stands in")
    parser.add_argument("tests", nargs="+", help="files, and options of pytest")
    options, more = parser.parse_known_args(arguments)
    if active(options.checkout, on=False) or not active(options.checkout, on=True):
        print("OPENPI_LORA does not switch the patches on and off here")
        return 2
    with tempfile.TemporaryDirectory() as hub:
        if options.name is not None:
            stand_in(pathlib.Path(hub), options.name)
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), EmptyHub)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            os.environ |= {"HF_HUB_CACHE": hub, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        without, patched = (outcomes(options.checkout, options.tests + more, on=on) for on in (False, True))
    print(f"{len(without)} tests without: {dict(collections.Counter(without.values()))}")
    print(f"{len(patched)} tests with: {dict(collections.Counter(patched.values()))}")
    different = [name for name in without.keys() | patched if without.get(name) != patched.get(name)]
    for name in sorted(different):
        print(f"{name}: {without.get(name)} without, {patched.get(name)} with")
    if "passed" not in without.values():
        return 2
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
