"""Activation as users meet it: in processes of their own."""

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GEMMA = "transformers.models.gemma.modeling_gemma"
MARKED = """
from transformers import GemmaConfig, GemmaForCausalLM
sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
def build():
    config = GemmaConfig(**sizes, num_hidden_layers=1, vocab_size=16, use_adarms=True)
    return GemmaForCausalLM(config)
"""


def ok(result):
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def loaded(*names):
    return f"import sys; print([name for name in {names!r} if name in sys.modules])"


def test_unset_a_start_imports_nothing_of_ours(child):
    result = child("-X", "importtime", "-c", "pass")
    assert ok(result) == ""
    for name in ("openpi_lora_patch", "wrapt", "torch", "transformers"):
        assert name not in result.stderr


@pytest.mark.parametrize("switch", ["", "0"])
def test_switched_off_a_start_imports_nothing_of_ours(child, switch):
    assert ok(child("-c", loaded("openpi_lora_patch", "wrapt", "torch"), OPENPI_LORA=switch)) == "[]"


def test_switched_on_a_start_imports_neither_wrapt_nor_torch(child):
    names = ("openpi_lora_patch", "wrapt", "torch", "transformers")
    assert ok(child("-c", loaded(*names), OPENPI_LORA="1")) == "['openpi_lora_patch']"


def test_importing_the_package_imports_neither_wrapt_nor_torch(child):
    code = "import openpi_lora_patch as o; assert o.status().active;" + loaded("wrapt", "torch", "transformers")
    assert ok(child("-c", code)) == "[]"


def test_0_forbids_what_an_import_would_do_and_activate_still_does(child):
    code = "import openpi_lora_patch as o; print(o.status().active); o.activate(); print(o.status().active)"
    assert ok(child("-c", code, OPENPI_LORA="0")).split() == ["False", "True"]


@pytest.mark.parametrize(
    "statement",
    [
        "from transformers import GemmaForCausalLM",
        "import transformers; transformers.GemmaForCausalLM",
        "from transformers.models.gemma import modeling_gemma",
        "from transformers.models.gemma import GemmaModel",
        "import transformers.models.gemma.modeling_gemma",
        "import importlib; importlib.import_module('transformers.models.gemma.modeling_gemma')",
        "from transformers import PaliGemmaForConditionalGeneration",
    ],
)
def test_however_gemma_is_imported_it_is_patched(child, statement):
    code = f"""
{statement}
{MARKED}
print(type(build().model).__module__)
import openpi_lora_patch
print(openpi_lora_patch.status().modules['{GEMMA}'])
"""
    assert ok(child("-c", code, OPENPI_LORA="1")).split() == ["openpi_lora_patch.models.gemma", "patched"]


@pytest.mark.parametrize("variable", ["OPENPI_LORA", "OPENPI_LORA_FREEZE", "OPENPI_LORA_FREZE"])
def test_a_wrong_setting_refuses_gemma_every_time(child, variable):
    code = f"""
import importlib
for _ in range(3):
    try:
        importlib.import_module("{GEMMA}")
    except Exception as error:
        print(type(error).__name__, "{variable}" in str(error))
"""
    result = child("-c", code, **{"OPENPI_LORA": "1", variable: "yes"})
    assert ok(result).split() == ["SettingsError", "True"] * 3


def test_transformers_lazy_import_does_not_swallow_a_refusal(child):
    code = "try:\n    from transformers import GemmaForCausalLM\nexcept ImportError:\n    print('swallowed')"
    result = child("-c", code, OPENPI_LORA="nonsense")
    assert result.returncode == 1
    assert "swallowed" not in result.stdout
    assert result.stderr.rstrip().splitlines()[-1].strip().startswith(("to do", "openpi_lora_patch"))


def test_without_wrapt_gemma_is_refused(child, tmp_path):
    (tmp_path / "wrapt.py").write_text("raise ImportError('no wrapt here')")
    result = child("-c", f"import openpi_lora_patch, {GEMMA}", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "ActivationError: wrapt cannot be imported" in result.stderr


@pytest.mark.parametrize("ours_first", [True, False])
def test_another_packages_wrapt_hook_on_gemma_still_runs(child, ours_first):
    theirs = f"import wrapt; wrapt.register_post_import_hook(lambda module: print(module.__name__), {GEMMA!r})"
    hooks = ["import openpi_lora_patch", theirs] if ours_first else [theirs, "import openpi_lora_patch"]
    code = "; ".join([*hooks, f"import {GEMMA}", "print(openpi_lora_patch.status().active)"])
    assert ok(child("-c", code)).split() == [GEMMA, "True"]


def test_sitecustomize_example_activates_and_runs_the_next_one(child, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    shutil.copy(ROOT / "sitecustomize_example.py", first / "sitecustomize.py")
    (second / "sitecustomize.py").write_text("print('next')")
    path = os.pathsep.join(map(str, (first, second)))
    code = "import sys; print('openpi_lora_patch' in sys.modules)"
    assert ok(child("-c", code, PYTHONPATH=path, OPENPI_LORA="1")).split() == ["next", "True"]
    assert ok(child("-c", code, PYTHONPATH=path)).split() == ["next", "False"]


def test_late_activation_patches_what_is_loaded_already(child):
    code = f"""
from transformers.models.gemma import modeling_gemma
from transformers import GemmaForCausalLM
held = GemmaForCausalLM
import openpi_lora_patch
{MARKED}
assert held is GemmaForCausalLM
print(type(build().model).__module__)
"""
    assert ok(child("-c", code)) == "openpi_lora_patch.models.gemma"


def test_activation_after_an_openpi_model_was_built_is_refused(child):
    code = f"""
{MARKED}
model = build()
import openpi_lora_patch
"""
    result = child("-c", code)
    assert result.returncode == 1
    assert "ActivationError: openpi models were built before" in result.stderr
    assert "1 unpatched GemmaModel" in result.stderr


def test_deactivate_restores_every_object(child):
    code = f"""
import sys
import importlib_metadata  # The guard reads versions with it; it adds a finder of its own, for good.
import openpi_lora_patch
openpi_lora_patch.deactivate()
from transformers.models.gemma import modeling_gemma
from transformers.models.paligemma import modeling_paligemma
from transformers.models.siglip import modeling_siglip

modules = (modeling_gemma, modeling_paligemma, modeling_siglip)

def snapshot():
    objects = {{(m.__name__, n): v for m in modules for n, v in vars(m).items() if n != "__builtins__"}}
    classes = [v for (m, _), v in objects.items() if isinstance(v, type) and v.__module__ == m]
    return objects | {{(c, n): v for c in classes for n, v in vars(c).items() if n != "__abstractmethods__"}}

def differences(before, after):
    return [key for key in before.keys() | after.keys() if before.get(key) is not after.get(key)]

before, path = snapshot(), list(sys.meta_path)
for _ in range(2):
    openpi_lora_patch.activate()
    from transformers.models.siglip import check
    assert check.check_whether_transformers_replace_is_installed_correctly()
    assert len(differences(before, snapshot())) == 7, differences(before, snapshot())
    openpi_lora_patch.deactivate()
    assert differences(before, snapshot()) == []
    assert sys.meta_path == path
    assert "transformers.models.siglip.check" not in sys.modules
{MARKED}
print(type(build().model).__module__)
"""
    assert ok(child("-c", code)) == GEMMA


def test_a_second_activation_is_the_same_or_refused(child):
    code = """
import openpi_lora_patch as o
o.activate()
try:
    o.activate(freeze="jax")
except o.ActivationError as error:
    print("freeze='jax'" in str(error))
o.deactivate()
o.activate(freeze="jax")
print(o.status().settings.freeze)
"""
    assert ok(child("-c", code)).split() == ["True", "jax"]


@pytest.mark.parametrize(
    "statement",
    [
        "from transformers.models.siglip import check",
        "import transformers.models.siglip.check as check",
        "import transformers.models.siglip.check; check = transformers.models.siglip.check",
        "import importlib; check = importlib.import_module('transformers.models.siglip.check')",
    ],
)
def test_the_module_openpi_asks_for_is_there(child, statement):
    code = f"{statement}\nprint(check.check_whether_transformers_replace_is_installed_correctly())"
    assert ok(child("-c", code, OPENPI_LORA="1")) == "True"
    assert child("-c", code).returncode == 1


def test_a_module_dropped_and_imported_again_is_patched_again(child):
    code = f"""
import sys, importlib
import openpi_lora_patch
first = importlib.import_module("{GEMMA}")
del sys.modules["{GEMMA}"]
second = importlib.import_module("{GEMMA}")
print(first is not second, hasattr(second, "_gated_residual"))
"""
    assert ok(child("-c", code)).split() == ["True", "True"]


def test_a_lerobot_that_needs_nothing_is_said_to_be_left_alone(child, tmp_path):
    folder = tmp_path / "lerobot/policies/pi0"
    folder.mkdir(parents=True)
    (folder / "modeling_pi0.py").write_text("class PI0Policy: pass")
    code = "from lerobot.policies.pi0 import modeling_pi0 as m; import openpi_lora_patch as o;"
    code += "print(o.status().modules[m.__name__])"
    assert ok(child("-c", code)).startswith("left alone: this lerobot builds its pi0 from classes of its own")


@pytest.mark.parametrize(("corrected", "patched"), [("1", "True"), ("0", "False")])
def test_a_setting_corrected_in_the_process_ends_the_refusal(child, corrected, patched):
    code = f"""
import importlib, os
import openpi_lora_patch
try:
    importlib.import_module("{GEMMA}")
except Exception as error:
    print(type(error).__name__)
os.environ["OPENPI_LORA"] = "{corrected}"
print(hasattr(importlib.import_module("{GEMMA}"), "_gated_residual"))
"""
    assert ok(child("-c", code, OPENPI_LORA="yes")).split() == ["SettingsError", patched]
