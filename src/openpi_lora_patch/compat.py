"""Which transformers releases were tested, and whether the installed one is what it says it is.

`tested_releases.json` beside this file is written by the test matrix (`tests/matrix.py`): a release is in it because
every test passed on it. With it come fingerprints of the functions this package builds on, so that a release that was
altered, or that openpi's files were copied into, is told apart from the one that was tested.

    python -m openpi_lora_patch.compat check 5.24.0

runs the matrix on a release, in a checkout of this package.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import pathlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from .errors import CompatibilityError

MATRIX = pathlib.Path(__file__).parents[2] / "tests/matrix.py"
TABLE = pathlib.Path(__file__).with_name("tested_releases.json")
GEMMA = "models/gemma/modeling_gemma.py"
# What the converted models call or inherit, by file of the transformers package; a class stands for its whole body.
RELIED_ON = {
    GEMMA: (
        "GemmaRMSNorm",
        "GemmaMLP",
        "GemmaRotaryEmbedding",
        "rotate_half",
        "apply_rotary_pos_emb",
        "repeat_kv",
        "eager_attention_forward",
        "GemmaAttention.__init__",
        "GemmaDecoderLayer.__init__",
        "GemmaPreTrainedModel._init_weights",
        "GemmaModel.__init__",
        "GemmaForCausalLM.__init__",
        "GemmaForCausalLM.forward",
    ),
    "models/paligemma/modeling_paligemma.py": (
        "PaliGemmaMultiModalProjector",
        "PaliGemmaPreTrainedModel._init_weights",
        "PaliGemmaModel.__init__",
        "PaliGemmaForConditionalGeneration.__init__",
    ),
    "models/siglip/modeling_siglip.py": (
        "SiglipVisionEmbeddings",
        "SiglipAttention",
        "SiglipMLP",
        "SiglipEncoderLayer",
        "SiglipEncoder",
        "SiglipVisionTransformer.__init__",
        "SiglipVisionModel.__init__",
        "SiglipVisionModel.forward",
    ),
    "activations.py": ("PytorchGELUTanh", "GELUTanh"),
    "cache_utils.py": (
        "DynamicLayer.update",
        "DynamicLayer.lazy_initialization",
        "DynamicLayer.get_seq_length",
        "DynamicCache.__init__",
        "DynamicCache.__getitem__",
        "DynamicCache.get_seq_length",
        "DynamicCache.update",
        "Cache.update",
        "Cache.get_seq_length",
    ),
    "integrations/sdpa_attention.py": ("repeat_kv", "use_gqa_in_sdpa", "sdpa_attention_forward"),
    "modeling_rope_utils.py": ("_compute_default_rope_parameters", "dynamic_rope_update"),
    "modeling_layers.py": ("GradientCheckpointingLayer",),
}
ABSENT = "absent"


def check(module: ModuleType, *, allow_untested: bool) -> str:
    """The release that `module`, of the transformers package, belongs to, if it may be patched.

    Args:
        module: `transformers.models.gemma.modeling_gemma` or a sibling, just loaded.
        allow_untested: warn where a release was not tested or differs from the tested one, in place of raising.

    Raises:
        CompatibilityError: an untested release; a tested one with altered functions; openpi's files copied into it;
            or a package whose version is not the installed one.
    """
    package = pathlib.Path(str(module.__spec__ and module.__spec__.origin)).parents[2]
    release = _release()
    _refuse_copied_files(package, release)
    problem = _problem(package, release)
    if problem is None:
        return release
    if not allow_untested:
        raise problem
    warnings.warn(f"openpi_lora_patch goes on, as OPENPI_LORA_ALLOW_UNTESTED says. {problem}", stacklevel=2)
    return release


@functools.cache
def table() -> dict[str, Any]:
    """`tested_releases.json`: "runs" by release, and "fingerprints": function, then fingerprint, then releases.

    Raises:
        CompatibilityError: it is damaged.
    """
    try:
        content: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
        return {"runs": dict(content["runs"]), "fingerprints": dict(content["fingerprints"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CompatibilityError(
            "The table of tested releases cannot be read.", found=f"{TABLE}: {error!r}", fix="reinstall this package"
        ) from None


@functools.cache
def fingerprints(package: pathlib.Path) -> dict[str, str]:
    """A fingerprint of each relied-on function, by "file:name", read from the source files below `package`.

    The source is read, not the live objects, which others may have replaced. Docstrings, comments and layout do not
    count, and neither does the version of Python. What a release does not have, be it the whole file, is absent.

    Raises:
        FileNotFoundError: `package` is no transformers package with its source.
    """
    found = {}
    for file, names in RELIED_ON.items():
        path = package / file
        # Without Gemma it is no transformers package, and reading raises.
        tree = ast.parse(path.read_text(encoding="utf-8") if file == GEMMA or path.exists() else "")
        for name in names:
            node = _find(tree, name.split("."))
            found[f"{file}:{name}"] = ABSENT if node is None else _digest(node)
    return found


def tested(release: str) -> dict[str, str]:
    """The fingerprints that `release` was tested with; empty where it was not."""
    return {
        name: fingerprint
        for name, releases_by_fingerprint in table()["fingerprints"].items()
        for fingerprint, releases in releases_by_fingerprint.items()
        if release in releases
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the test matrix on releases; those on which every test passes enter the table. Returns 0 if all did."""
    parser = argparse.ArgumentParser(prog="python -m openpi_lora_patch.compat", description=main.__doc__)
    parser.add_argument("command", choices=["check"])
    parser.add_argument("releases", nargs="+", metavar="release", help="of transformers, such as 5.24.0")
    options = parser.parse_args(arguments)
    if not MATRIX.exists():
        parser.error("the tests are in a checkout of openpi_lora_patch, and this one was installed without them")
    return subprocess.call([sys.executable, str(MATRIX), *options.releases])


def _release() -> str:
    import importlib_metadata

    loaded = str(sys.modules["transformers"].__version__)
    try:
        installed = importlib_metadata.version("transformers")
    except importlib_metadata.PackageNotFoundError:
        installed = "none"
    if loaded != installed:
        raise CompatibilityError(
            "The transformers that is loaded is not the one that is installed.",
            found=f"loaded {loaded}, installed {installed}",
            expected="one and the same release",
            fix="remove the other copy from the path, or reinstall: pip install --force-reinstall transformers",
        )
    return loaded


def _refuse_copied_files(package: pathlib.Path, release: str) -> None:
    copied = [file for file in ("models/siglip/check.py",) if (package / file).exists()]
    if "_gated_residual" in (package / GEMMA).read_text(encoding="utf-8"):
        copied.append(GEMMA)
    if copied:
        raise CompatibilityError(
            "openpi's files were copied into this transformers, which changes every Gemma model in the environment.",
            found=", ".join(str(package / file) for file in copied),
            expected="transformers as PyPI has it; openpi_lora_patch makes the changes at run time",
            fix=f"pip install --force-reinstall --no-deps transformers=={release}; "
            "under uv first `uv cache clean transformers`, because the copy went through hard links into its cache; "
            f"then delete {package / 'models/siglip/check.py'} if it is still there",
        )


def _problem(package: pathlib.Path, release: str) -> CompatibilityError | None:
    expected = tested(release)
    if not expected:
        return CompatibilityError(
            f"transformers {release} was not tested with openpi_lora_patch.",
            found=f"transformers {release}",
            expected=f"one of {', '.join(table()['runs'])}",
            fix="pip install a tested release; or set OPENPI_LORA_ALLOW_UNTESTED=1 and run "
            "`python -m openpi_lora_patch.verify`; or test it, in a checkout: "
            f"`python -m openpi_lora_patch.compat check {release}`",
        )
    found = fingerprints(package)
    altered = [name for name, fingerprint in expected.items() if found.get(name) != fingerprint]
    if altered:
        return CompatibilityError(
            f"This transformers {release} is not the one that was tested: its source was altered.",
            found="; ".join(f"{name.partition(':')[2]} in {package / name.partition(':')[0]}" for name in altered),
            expected="these functions as PyPI has them",
            fix=f"pip install --force-reinstall --no-deps transformers=={release}",
        )
    return None


def _find(tree: ast.AST, path: list[str]) -> ast.AST | None:
    for name in path:
        definitions = [
            node
            for node in ast.iter_child_nodes(tree)
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name
        ]
        if not definitions:
            return None
        tree = definitions[-1]
    return tree


def _digest(node: ast.AST) -> str:
    return hashlib.sha256("".join(_serialise(node)).encode()).hexdigest()[:16]


def _serialise(node: Any) -> Iterator[str]:
    """Our own, because `ast.dump` gives other text on each of Python 3.11, 3.12 and 3.13 for the same source."""
    if isinstance(node, ast.AST):
        yield f"{type(node).__name__}("
        for field, value in ast.iter_fields(node):
            if field in ("ctx", "kind", "type_comment", "type_params") or value is None or value == []:
                continue
            yield f"{field}="
            yield from _serialise(_without_docstring(node, value) if field == "body" else value)
        yield ")"
    elif isinstance(node, list):
        yield "["
        for item in node:
            yield from _serialise(item)
        yield "]"
    else:
        yield f"{node!r},"


def _without_docstring(node: ast.AST, body: Any) -> Any:
    if not isinstance(node, ast.ClassDef | ast.FunctionDef):
        return body
    first = body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return body[1:] if documented and isinstance(first.value.value, str) else body


if __name__ == "__main__":
    sys.exit(main())
