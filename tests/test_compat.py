"""The guard against real and altered copies of the installed transformers, and the table it reads."""

import ast
import json
import os
import pathlib
import re
import shutil
import subprocess
import types

import importlib_metadata
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import matrix
from openpi_lora_patch import CompatibilityError, compat

PACKAGE = pathlib.Path(transformers.__file__).parent
RELEASE = transformers.__version__
COMMAND = f"python -m openpi_lora_patch.compat check {RELEASE}"
NAMES = [(file, name) for file, names in compat.RELIED_ON.items() for name in names]


@pytest.fixture(scope="session")
def copy(tmp_path_factory):
    """The source files the guard reads, in a package of their own."""
    package = tmp_path_factory.mktemp("copy") / "transformers"
    for file in compat.RELIED_ON:
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / file, package / file)
    return package


def check(package, *, allow_untested=False):
    compat.fingerprints.cache_clear()
    module = types.ModuleType("transformers.models.gemma.modeling_gemma")
    module.__spec__ = types.SimpleNamespace(origin=str(package / compat.GEMMA))
    return compat.check(module, allow_untested=allow_untested)


@pytest.fixture
def table(monkeypatch):
    """A table in which the installed release was tested, whether it was or not."""
    entry = {
        "runs": {RELEASE: []},
        "fingerprints": {n: {f: [RELEASE]} for n, f in compat.fingerprints(PACKAGE).items()},
    }
    monkeypatch.setattr(compat, "table", lambda: entry)
    return entry


def test_a_tested_release_passes(table, copy):
    assert check(PACKAGE) == RELEASE
    assert check(copy) == RELEASE


@pytest.mark.parametrize(("file", "name"), NAMES)
def test_an_altered_function_is_refused_by_name_and_file(table, copy, file, name):
    node = compat._find(ast.parse((copy / file).read_text()), name.split("."))
    if node is None:
        assert compat.fingerprints(PACKAGE)[f"{file}:{name}"] == compat.ABSENT
        return
    source = (copy / file).read_text()
    lines = source.splitlines(keepends=True)
    body = node.body[-1]
    first = min([body.lineno, *(decorator.lineno for decorator in getattr(body, "decorator_list", []))])
    lines.insert(first - 1, " " * body.col_offset + "altered = True\n")
    try:
        (copy / file).write_text("".join(lines))
        with pytest.raises(CompatibilityError) as caught:
            check(copy)
        assert f"{name} in {copy / file}" in str(caught.value)
        with pytest.warns(UserWarning, match=re.escape(name)):
            assert check(copy, allow_untested=True) == RELEASE
    finally:
        (copy / file).write_text(source)


def test_a_file_that_a_release_lacks_is_absent(table, copy):
    file = "modeling_rope_utils.py"
    source = (copy / file).read_text()
    try:
        (copy / file).unlink()
        with pytest.raises(CompatibilityError, match=f"dynamic_rope_update in {copy / file}"):
            check(copy)
    finally:
        (copy / file).write_text(source)


def test_a_folder_without_transformers_has_no_fingerprints(tmp_path):
    with pytest.raises(FileNotFoundError):
        compat.fingerprints(tmp_path)


def test_comments_docstrings_and_layout_do_not_count(table, copy):
    path = copy / compat.GEMMA
    source = path.read_text()
    try:
        path.write_text(ast.unparse(ast.parse(source)))
        assert check(copy) == RELEASE
    finally:
        path.write_text(source)


def test_an_untested_release_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(compat, "table", lambda: {"runs": {"4.0.0": [], "4.0.1": []}, "fingerprints": {}})
    with pytest.raises(CompatibilityError) as caught:
        check(PACKAGE)
    problem = f"transformers {RELEASE} was not tested"
    for text in (problem, "one of 4.0.0, 4.0.1", "OPENPI_LORA_ALLOW_UNTESTED=1", COMMAND):
        assert text in str(caught.value)
    with pytest.warns(UserWarning, match="was not tested"):
        assert check(PACKAGE, allow_untested=True) == RELEASE


@pytest.mark.parametrize("copied", ["check", "gemma"])
@pytest.mark.parametrize("allow_untested", [False, True])
def test_openpis_copied_files_are_recognised_whatever_is_allowed(table, copy, copied, allow_untested):
    path = copy / ("models/siglip/check.py" if copied == "check" else compat.GEMMA)
    before = path.read_text() if path.exists() else None
    try:
        path.write_text((before or "") + "\ndef _gated_residual(x, y, gate): ...\n")
        with pytest.raises(CompatibilityError, match="openpi's files were copied") as caught:
            check(copy, allow_untested=allow_untested)
        assert str(path) in str(caught.value)
        assert f"--no-deps transformers=={RELEASE}" in str(caught.value)
        assert "uv cache clean" in str(caught.value)
    finally:
        path.unlink() if before is None else path.write_text(before)


def test_another_version_loaded_than_installed_is_refused(table, monkeypatch):
    monkeypatch.setattr(importlib_metadata, "version", lambda name: "4.99.0")
    with pytest.raises(CompatibilityError, match=f"loaded {RELEASE}, installed 4.99.0"):
        check(PACKAGE)


def test_an_untested_release_is_refused_each_time_in_a_real_process(child, tmp_path):
    code = """
import importlib
import openpi_lora_patch
from openpi_lora_patch import compat
compat.table = lambda: {"runs": {}, "fingerprints": {}}
for name in ("transformers.models.gemma.modeling_gemma", "transformers.models.paligemma.modeling_paligemma") * 2:
    try:
        importlib.import_module(name)
    except openpi_lora_patch.CompatibilityError as error:
        print("refused")
try:
    from transformers import GemmaForCausalLM
except ImportError:
    print("swallowed")
except openpi_lora_patch.CompatibilityError:
    print("refused")
"""
    result = child("-c", code, OPENPI_LORA_ALLOW_UNTESTED="0")
    assert result.stdout.split() == ["refused"] * 5, result.stderr


@pytest.mark.parametrize("python", ["python3.10", "python3.11", "python3.12", "python3.13"])
def test_fingerprints_do_not_depend_on_the_version_of_python(python):
    source = pathlib.Path(compat.__file__).parent.parent
    code = f"""
import json, pathlib, sys
sys.path.insert(0, {str(source)!r})
from openpi_lora_patch import compat
print(json.dumps(compat.fingerprints(pathlib.Path({str(PACKAGE)!r}))))
"""
    if shutil.which(python) is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"{python} is not on this machine")
    environ = os.environ | {"OPENPI_LORA": "0"}
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, env=environ, check=True)
    assert json.loads(found.stdout) == compat.fingerprints(PACKAGE)


def test_the_command_runs_the_matrix_of_the_checkout(monkeypatch, tmp_path):
    program = tmp_path / "matrix.py"
    ran = tmp_path / "ran"
    program.write_text(f"import pathlib, sys; pathlib.Path({str(ran)!r}).write_text(' '.join(sys.argv[1:]))")
    assert compat.MATRIX.samefile(matrix.__file__)
    monkeypatch.setattr(compat, "MATRIX", program)
    assert compat.main(["check", "5.24.0", "5.25.0"]) == 0
    assert ran.read_text() == "5.24.0 5.25.0"
    program.write_text("raise SystemExit(1)")
    assert compat.main(["check", "5.24.0"]) == 1


def test_the_command_says_where_the_tests_are(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compat, "MATRIX", tmp_path / "matrix.py")
    with pytest.raises(SystemExit):
        compat.main(["check", "5.24.0"])
    assert "in a checkout of openpi_lora_patch" in capsys.readouterr().err


@settings(max_examples=60, deadline=None)
@given(st.integers(), st.integers())
def test_fingerprints_see_every_constant(one, other):
    found = [compat._digest(ast.parse(f"def f(x):\n    'doc'\n    return x + {n}")) for n in (one, other)]
    assert (found[0] == found[1]) == (one == other)


def test_every_tested_release_has_all_its_fingerprints_and_passed():
    table = json.loads(compat.TABLE.read_text())
    expected = {f"{file}:{name}" for file, name in NAMES}
    for release, runs in table["runs"].items():
        assert compat.tested(release).keys() == expected
        assert runs
        assert all(run["passed"] > 50 and run["failed"] == 0 and run["worst"] <= 1e-6 for run in runs)
    for by_fingerprint in table["fingerprints"].values():
        for releases in by_fingerprint.values():
            assert set(releases) <= set(table["runs"])


def test_the_readme_shows_the_table():
    assert matrix.readme_table() in (pathlib.Path(__file__).parent.parent / "README.md").read_text()
