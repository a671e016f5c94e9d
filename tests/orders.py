"""A program: every order of the steps that a process can take with us, transformers and openpi, each in its own.

    python tests/orders.py

A process that ran an order forks one process for each step that may come next, so that no order shares its imports of
transformers with one that is not its beginning, and none is repeated. After each step the process has to be wholly
patched, or to hold no object of ours; a step that we refuse has to say why.

Prints, as JSON lines, each order, how Gemma was imported, and the verdict: "patched", "off" (never activated, or
deactivated), "refused: " and why, or a traceback. Returns 1 where one is a traceback, or an order is missing.
"""

import argparse
import collections
import contextlib
import gc
import importlib
import itertools
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

GEMMA = "transformers.models.gemma.modeling_gemma"
PALIGEMMA = "transformers.models.paligemma.modeling_paligemma"
SPELLINGS = {
    "attribute": "import transformers; GemmaForCausalLM = transformers.GemmaForCausalLM",
    "from": "from transformers.models.gemma import GemmaForCausalLM",
    "importlib": f"import importlib; GemmaForCausalLM = importlib.import_module('{GEMMA}').GemmaForCausalLM",
}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_hidden_layers": 1,
    "vocab_size": 8,
}
# What stands for openpi: the names that are patched, and transformers' classes bound as openpi binds them.
STANDIN = {
    "models/gemma": """
import types
lora = types.SimpleNamespace(LoRAConfig=dict)
def get_config(): pass
""",
    "models/model": """
class BaseModelConfig:
    def load_pytorch(self): pass
""",
    "policies/policy": """
class Policy:
    def infer(self): pass
""",
    "training/config": """
import dataclasses, types
@dataclasses.dataclass(frozen=True)
class FakeDataConfig: pass
@dataclasses.dataclass(frozen=True)
class Pi0Config:
    paligemma_variant: str = "dummy"
    action_expert_variant: str = "dummy"
named = [(name, object, None) for name in (
    "data", "exp_name", "overwrite", "num_workers", "batch_size", "lr_schedule", "ema_decay", "pytorch_weight_path")]
fields = ["name", ("model", Pi0Config, Pi0Config()), *named]
TrainConfig = dataclasses.make_dataclass("TrainConfig", fields, frozen=True)
pi0_config = types.SimpleNamespace(Pi0Config=Pi0Config)
_optimizer = types.SimpleNamespace(CosineDecaySchedule=object)
tyro = types.SimpleNamespace(MISSING=None)
_CONFIGS = [TrainConfig(name) for name in ("pi0_libero", "pi05_libero", "debug")]
_CONFIGS_DICT = {config.name: config for config in _CONFIGS}
def get_config(name): return _CONFIGS_DICT[name]
def cli(): pass
""",
    "models_pytorch/gemma_pytorch": """
from transformers import GemmaForCausalLM, PaliGemmaForConditionalGeneration
class PaliGemmaWithExpertModel:
    def embed_image(self): pass
    def forward(self): pass
""",
    "models_pytorch/pi0_pytorch": """
from openpi.models_pytorch.gemma_pytorch import PaliGemmaWithExpertModel
_preprocessing = None
def make_att_2d_masks(): pass
class PI0Pytorch:
    def __init__(self): pass
    def _preprocess_observation(self): pass
    def load_state_dict(self): pass
    def sample_actions(self): pass
    def embed_prefix(self): pass
    def embed_suffix(self): pass
    def _apply_checkpoint(self): pass
""",
}
OPENPI = ["openpi." + name.replace("/", ".") for name in STANDIN]
# What each order imports for itself; all else is imported once, before the first.
UNSHARED = {"openpi_lora_patch", "transformers", "openpi"}
BINDING = "openpi.models_pytorch.gemma_pytorch"  # Binds transformers' classes, and is not patched.
PATCHED = {GEMMA, PALIGEMMA, *OPENPI} - {BINDING}
BUILT_BEFORE = "openpi models were built before openpi_lora_patch was activated."
HALF_IMPORTED = f"{GEMMA} is being imported at this moment."


class Watch:
    """A finder that takes a snapshot of each module to be patched when its own code has run, before any hook does."""

    def __init__(self):
        self.original = {}
        self.stock = {}  # The names that transformers itself changes, by module: caches, filled as models are built.
        self.within = None  # Called in the middle of the import of Gemma.

    def find_spec(self, name, path, target=None):
        if name not in PATCHED:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and not of_ours(type(finder))]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None:
            spec.loader.exec_module = self.executing(spec.loader.exec_module)
        return spec

    def executing(self, execute):
        def exec_module(module):
            execute(module)
            self.original[module.__name__] = snapshot(module)
            if module.__name__ == GEMMA and self.within is not None:
                self.within()

        return exec_module

    def changed(self):
        """What is no longer the object that it was: its names, by module."""
        names = {}
        for name, before in self.original.items():
            now = snapshot(sys.modules[name])
            differ = {".".join(key) for key in before.keys() | now.keys() if before.get(key) is not now.get(key)}
            names[name] = sorted(differ.difference(self.stock.get(name, ())))
        return names


class Process:
    """What a process did, and what is expected of it.

    Args:
        spelling: how it imports Gemma.
        watch: its finder.
        patched: the names that patching changes, by module.
    """

    def __init__(self, spelling, watch, patched):
        self.spelling, self.watch, self.patched = spelling, watch, patched
        self.active = False
        self.refusal = None  # Of the last attempt to activate.
        self.models = []  # Each with whether it was built converted.
        self.finders = list(sys.meta_path)

    # The steps.
    def us(self):
        if "openpi_lora_patch" not in sys.modules:
            self.attempt(lambda: importlib.import_module("openpi_lora_patch"))

    def activate(self):
        self.us()
        if "openpi_lora_patch" in sys.modules:
            self.attempt(sys.modules["openpi_lora_patch"].activate)

    again = activate

    def deactivate(self):
        self.us()
        if "openpi_lora_patch" in sys.modules:
            sys.modules["openpi_lora_patch"].deactivate()
            self.active, self.refusal = False, None

    def transformers(self):
        importlib.import_module("transformers")

    def gemma(self):
        self.cls()

    def within(self):
        """Import Gemma, and activate in the middle of it."""
        self.watch.within = self.activate
        self.cls()
        self.watch.within = None

    def openpi(self):
        for name in OPENPI:
            importlib.import_module(name)

    def build(self):
        self.models.append((self.built(use_adarms=True), self.active))

    # What is expected.
    def attempt(self, activate):
        """It succeeds, or is refused where, and only where, it comes too late or in the middle."""
        expected = None
        if not self.active and not all(was for _, was in self.models):
            expected = BUILT_BEFORE
        elif not self.active and self.initializing():
            expected = HALF_IMPORTED
        refused = None
        try:
            activate()
        except Exception as error:
            refused = error
        if refused is not None:
            assert type(refused).__name__ == "ActivationError", repr(refused)
            assert "\n  to do: " in str(refused)
        self.refusal = str(refused).splitlines()[0] if refused is not None else None
        assert self.refusal == expected
        self.active = expected is None

    def check(self):
        """Wholly patched, or nothing of ours left and each object the one it was; models stay what they were."""
        ours, changed = sys.modules.get("openpi_lora_patch"), self.watch.changed()
        assert [converted(model) for model, _ in self.models] == [was for _, was in self.models]
        if self.active:
            status = ours.status()
            assert status.active
            assert changed == {name: self.patched[name] for name in changed}
            modules = {name: "patched" if name in changed else "waiting" for name in status.modules}
            assert status.modules == modules
        else:
            assert ours is None or not ours.status().active
            assert not any(changed.values()), changed
            assert "transformers.models.siglip.check" not in sys.modules
            # wrapt's own stays once wrapt is used: others that registered with it since would wait in vain. The other
            # is transformers', from 5.23.0 on.
            theirs = ("wrapt.importer", "transformers.utils.import_utils")
            assert [finder for finder in sys.meta_path if type(finder).__module__ not in theirs] == self.finders
        if GEMMA in changed:
            binding = sys.modules.get(BINDING, sys.modules[GEMMA])
            assert binding.GemmaForCausalLM is self.cls() is sys.modules[GEMMA].GemmaForCausalLM
            assert converted(self.built(use_adarms=True)) == self.active
            assert not converted(self.built())

    def verdict(self):
        return "patched" if self.active else f"refused: {self.refusal}" if self.refusal else "off"

    def initializing(self):
        return self.watch.within is not None and sys.modules[GEMMA].__spec__._initializing

    def cls(self):
        names = {}
        exec(SPELLINGS[self.spelling], names)
        return names["GemmaForCausalLM"]

    def built(self, **marks):
        cls = self.cls()
        return cls(sys.modules["transformers"].GemmaConfig(**SIZES, **marks))


STEPS = ["us", "activate", "transformers", "gemma", "within", "openpi", "build", "deactivate", "again"]


def orders(longest):
    """Every order of up to `longest` steps."""
    return [order for length in range(1, longest + 1) for order in itertools.permutations(STEPS, length)]


def of_ours(cls):
    return cls.__module__.partition(".")[0] == "openpi_lora_patch"


def converted(model):
    kinds = {of_ours(type(part)) for part in (model, model.model, model.model.norm, *model.model.layers)}
    assert len(kinds) == 1, "half converted"
    return kinds.pop()


def snapshot(module):
    """What the module holds, what its classes do and its lists and dicts hold, by owner and name."""
    names = {key: value for key, value in vars(module).items() if key != "__builtins__"}
    held = {(key,): value for key, value in names.items()}
    for name, value in names.items():
        if isinstance(value, type) and value.__module__ == module.__name__:
            held |= {(name, key): v for key, v in vars(value).items() if key != "__abstractmethods__"}
        elif isinstance(value, list | dict):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            held |= {(name, str(key)): v for key, v in items}
    return held


def explore(process, order, longest, write):
    """Run each order of up to `longest` steps that begins with `order`, which this process has run."""
    for step in STEPS if len(order) < longest else ():
        if step not in order:
            forked(lambda grown=(*order, step): take(process, grown, longest, write))


def take(process, order, longest, write):
    try:
        getattr(process, order[-1])()
        process.check()
        verdict = process.verdict()
    except BaseException:
        verdict = traceback.format_exc()
    write({"order": order, "spelling": process.spelling, "verdict": verdict})
    explore(process, order, longest, write)


def forked(function, wait=True):
    """Run `function()` in a process of its own; without `wait`, returns that process's id at once."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0) if wait else child
    try:
        function()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def scout(watch, write):
    """All modules that are patched, and us last. Says what changed before and then, and what else was imported."""
    process = Process("from", watch, {})
    for name in PATCHED:
        importlib.import_module(name)
    process.built()
    watch.stock = watch.changed()
    process.us()
    process.built(use_adarms=True)
    shared = [name for name in sys.modules if name.partition(".")[0] not in UNSHARED]
    write({"stock": watch.stock, "patched": watch.changed(), "shared": shared})


def walk(spellings, longest):
    """The results, in the order in which the processes wrote them."""
    with tempfile.TemporaryFile("a+") as log:

        def write(result):
            os.write(log.fileno(), (json.dumps(result) + "\n").encode())

        def written():
            log.seek(0)
            return [json.loads(line) for line in log]

        watch = Watch()
        sys.meta_path.insert(0, watch)
        forked(lambda: scout(watch, write))
        found = written()[0]
        assert found["patched"].keys() == PATCHED, found["patched"]
        assert all(found["patched"].values()), found["patched"]
        watch.stock = found["stock"]
        for name in found["shared"]:
            with contextlib.suppress(ImportError):  # Some are no files of their own.
                importlib.import_module(name)
        assert not UNSHARED & sys.modules.keys()
        gc.freeze()  # Each process would copy what it collects.
        children = [
            forked(lambda s=s: explore(Process(s, watch, found["patched"]), (), longest, write), wait=False)
            for s in spellings
        ]
        for child in children:
            os.waitpid(child, 0)
        return written()[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="of the longest orders (4)")
    parser.add_argument("--spelling", choices=SPELLINGS, action="append", help="how Gemma is imported (all ways)")
    parser.add_argument("--openpi", action="store_true", help="with the openpi that is importable, not a stand-in")
    options = parser.parse_args()
    spellings, began = options.spelling or list(SPELLINGS), time.monotonic()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name, code in STANDIN.items():
            path = Path(folder) / "openpi" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(code)
        if not options.openpi:
            sys.path.insert(0, folder)
        results = walk(spellings, options.steps)
    for result in results:
        print(json.dumps(result))
    wanted = set(itertools.product(spellings, orders(options.steps)))
    missing = wanted - {(result["spelling"], tuple(result["order"])) for result in results}
    kinds = collections.Counter(r["verdict"] if "Traceback" not in r["verdict"] else "half" for r in results)
    print(f"{len(results)} orders of {len(wanted)} in {time.monotonic() - began:.0f} s: {dict(kinds)}", file=sys.stderr)
    return int(bool(missing or kinds["half"]))


if __name__ == "__main__":
    sys.exit(main())
