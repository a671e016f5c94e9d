"""Starts of Python, each a real child process of an interpreter that this package was put into.

Most children ask for `transformers` without importing it, which is what activates; that takes no torch.
"""

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
import zipapp
from pathlib import Path

import pytest

from openpi_lora_patch import activation, startup

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
PTH = "openpi_lora_patch.pth"
LIBRARY = f"lib/python{sys.version_info.major}.{sys.version_info.minor}"
BASE = Path(getattr(sys, "_base_executable", sys.executable)).resolve()

# Says how often a start was noticed, and whether we were active before transformers was asked for and after.
PROBE = """
import importlib.util, sys
def active():
    activation = sys.modules.get("openpi_lora_patch.activation")
    return activation is not None and activation.status().active
def probe():
    early = active()
    started = sum(type(finder).__module__ == "openpi_lora_patch.startup" for finder in sys.meta_path)
    importlib.util.find_spec("transformers")
    return f"{early=} {started=} active={active()}"
"""
SAY = f"{PROBE}\nprint(probe())"
OURS, NOT_OURS = "early=False started=1 active=True", "early=False started=0 active=False"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the layouts are those of POSIX")


def install(folder):
    """What pip leaves in `folder`: the package and the `.pth` file."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(
        SOURCE / "openpi_lora_patch", folder / "openpi_lora_patch", ignore=shutil.ignore_patterns("*.pth", "nodes")
    )
    shutil.copy2(SOURCE / "openpi_lora_patch" / PTH, folder)
    return folder


def a_venv(folder, **options):
    venv.create(folder, symlinks=True, with_pip=False, **options)
    return folder / "bin/python"


def packages(python):
    return python.parents[1] / LIBRARY / "site-packages"


def share(python):
    """Let `python` import what this interpreter imports, and read none of its `.pth` files."""
    found = [entry for entry in sys.path if "-packages" in entry and Path(entry).is_dir()]
    (packages(python) / "shared.pth").write_text("\n".join(found) + "\n")


def conda(folder):
    """An interpreter and its library below one prefix of its own, without a `pyvenv.cfg`: an environment of conda."""
    library = folder / LIBRARY
    library.mkdir(parents=True)
    (folder / "conda-meta").mkdir()
    (folder / "bin").mkdir()
    shutil.copy2(BASE, folder / "bin/python")
    for entry in Path(sysconfig.get_path("stdlib")).iterdir():
        if entry.name != "site-packages":
            (library / entry.name).symlink_to(entry)
    return folder / "bin/python"


def start(python, *arguments, expect=0, path=None, prefix=(), cwd=None, **environ):
    """Run `python` with none of our variables but those given, and return what it prints (stdout and stderr)."""
    dropped = ("OPENPI_LORA", "PYTHON", "VIRTUAL_ENV", "__PYVENV")
    clean = {name: text for name, text in os.environ.items() if not name.startswith(dropped)}
    clean["LD_LIBRARY_PATH"] = os.pathsep.join(
        filter(None, [sysconfig.get_config_var("LIBDIR"), clean.get("LD_LIBRARY_PATH")])
    )
    if path is not None:
        clean["PYTHONPATH"] = os.pathsep.join(map(str, path))
    result = subprocess.run(
        [*prefix, str(python), *map(str, arguments)],
        env=clean | environ,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == expect, result.stderr
    return result.stdout.strip(), result.stderr.strip()


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of a virtual environment with this package in it."""
    made = a_venv(tmp_path_factory.mktemp("environment") / "venv")
    install(packages(made))
    return made


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The same, with the torch and the transformers of this process."""
    made = a_venv(tmp_path_factory.mktemp("full") / "venv")
    install(packages(made))
    share(made)
    return made


def venv_copied(folder):
    made = folder / "venv/bin/python"
    venv.create(folder / "venv", symlinks=False, with_pip=False)
    install(packages(made))
    return made, {}


def conda_alone(folder):
    made = conda(folder / "conda")
    install(packages(made))
    return made, {}


def venv_over_conda(folder):
    """A virtual environment with the system's packages, among which this one is."""
    below, _ = conda_alone(folder)
    start(below, "-m", "venv", "--without-pip", "--system-site-packages", folder / "venv")
    return folder / "venv/bin/python", {}


def user(folder):
    install(folder / LIBRARY / "site-packages")
    return BASE, {"PYTHONUSERBASE": str(folder)}


def editable(folder):
    made = a_venv(folder / "venv")
    (packages(made) / "_editable_impl_openpi_lora_patch.pth").write_text(f"{SOURCE}\n")
    shutil.copy2(SOURCE / "openpi_lora_patch" / PTH, packages(made))
    return made, {}


def sitecustomize(folder):
    """`.pth` files forbidden: the package on the path, and our example as sitecustomize."""
    shutil.copy(ROOT / "sitecustomize_example.py", folder / "sitecustomize.py")
    return a_venv(folder / "venv"), {"PYTHONPATH": os.pathsep.join(map(str, (folder, SOURCE)))}


LAYOUTS = [venv_copied, conda_alone, venv_over_conda, user, editable, sitecustomize]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_starts_us_when_asked_and_only_then(layout, tmp_path):
    if layout is user and (site.ENABLE_USER_SITE is None or Path(sys.executable) == BASE):
        pytest.skip("this interpreter allows no user site, or would read that of this environment too")
    python, environ = layout(tmp_path)
    assert start(python, "-c", SAY, OPENPI_LORA="1", **environ) == (OURS, "")
    for switched_off in ({}, {"OPENPI_LORA": ""}, {"OPENPI_LORA": "0"}):
        assert start(python, "-c", SAY, **switched_off, **environ) == (NOT_OURS, "")


FLAGS = ["-B", "-E", "-I", "-O", "-OO", "-P", "-s", "-u", "-Werror", "-Xdev", "-Xutf8", "-Xfrozen_modules=off"]


@pytest.mark.parametrize("flag", FLAGS)
def test_no_flag_but_S_keeps_the_pth_file_from_starting_us(python, flag):
    if flag == "-P" and sys.version_info < (3, 11):
        pytest.skip("Python 3.11 has it first")
    assert start(python, flag, "-c", SAY, OPENPI_LORA="1") == (OURS, "")


def test_S_reads_no_pth_file_and_an_import_does_it_then(python):
    assert start(python, "-S", "-c", SAY, OPENPI_LORA="1") == (NOT_OURS, "")
    code = "import openpi_lora_patch as o; print(o.status().active)"
    assert start(python, "-S", "-c", code, path=[packages(python)], OPENPI_LORA="1") == ("True", "")


@pytest.mark.parametrize(("flag", "started"), [("-E", False), ("-I", False), ("-S", False), ("-s", True), ("-P", True)])
def test_which_flags_skip_a_sitecustomize_on_PYTHONPATH(tmp_path, flag, started):
    if flag == "-P" and sys.version_info < (3, 11):
        pytest.skip("Python 3.11 has it first")
    python, environ = sitecustomize(tmp_path)
    expected = OURS if started else NOT_OURS
    assert start(python, flag, "-c", SAY, OPENPI_LORA="1", **environ) == (expected, "")


@pytest.mark.parametrize("flag", ["-s", "-I", "-S"])
def test_which_flags_skip_the_user_site(tmp_path, flag):
    python, environ = user(tmp_path)
    assert start(python, flag, "-c", SAY, OPENPI_LORA="1", **environ) == (NOT_OURS, "")


@pytest.mark.parametrize("how", ["file", "folder", "module", "stdin", "zipapp", "interactive"])
def test_however_a_program_is_run(python, tmp_path, how):
    program = tmp_path / "program"
    program.mkdir()
    (program / "__main__.py").write_text(SAY)
    zipapp.create_archive(program, tmp_path / "program.pyz")
    arguments = {
        "file": [program / "__main__.py"],
        "folder": [program],
        "module": ["-m", "program"],
        "stdin": ["-c", f"import subprocess, sys; subprocess.run([sys.executable, '-'], input={SAY!r}, text=True)"],
        "zipapp": [tmp_path / "program.pyz"],
        "interactive": ["-i", program / "__main__.py"],
    }[how]
    assert start(python, *arguments, cwd=tmp_path, OPENPI_LORA="1")[0] == OURS
    assert start(python, *arguments, cwd=tmp_path)[0] == NOT_OURS


def test_a_zipapp_that_holds_us_is_started_by_an_import(tmp_path):
    program = install(tmp_path / "program")
    (program / "__main__.py").write_text("import openpi_lora_patch as o; print(o.status().active)")
    zipapp.create_archive(program, tmp_path / "program.pyz")
    assert start(a_venv(tmp_path / "venv"), tmp_path / "program.pyz") == ("True", "")


SECOND = {
    "site.main": "import site; site.main()",
    "addsitedir": "import site; [site.addsitedir({packages!r}) for _ in range(2)]",
    "sitecustomize": "import sitecustomize_example",
    "import": "import openpi_lora_patch",
}


@pytest.mark.parametrize("how", ["site.main", "addsitedir", "sitecustomize", "import"])
def test_started_twice_is_started_once(python, how):
    code = f"import sys\n{SECOND[how].format(packages=str(packages(python)))}\n{PROBE}\nprint(probe())"
    found, errors = start(python, "-c", code, path=[ROOT], OPENPI_LORA="1")
    assert (found, errors) == (OURS, "")


def test_sitecustomize_and_pth_together_and_a_sitecustomize_that_was_there(python, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "theirs").mkdir()
    shutil.copy(ROOT / "sitecustomize_example.py", tmp_path / "ours/sitecustomize.py")
    (tmp_path / "theirs/sitecustomize.py").write_text("print('theirs')")
    path = [tmp_path / "ours", tmp_path / "theirs"]
    assert start(python, "-c", SAY, path=path, OPENPI_LORA="1") == (f"theirs\n{OURS}", "")
    assert start(python, "-c", SAY, path=path) == (f"theirs\n{NOT_OURS}", "")
    assert start(python, "-c", SAY, path=path[1:], OPENPI_LORA="1") == (f"theirs\n{OURS}", "")


def test_a_sitecustomize_that_fails_does_not_take_us_with_it(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/sitecustomize.py").write_text("raise ValueError('theirs')")
    python, environ = sitecustomize(tmp_path)
    environ["PYTHONPATH"] += f"{os.pathsep}{tmp_path / 'theirs'}"
    for switch, expected in (("1", OURS), ("0", NOT_OURS)):
        found, errors = start(python, "-c", SAY, OPENPI_LORA=switch, **environ)
        assert found == expected
        assert "ValueError: theirs" in errors


def test_a_package_that_another_pth_file_imported_before_us_is_patched_at_once(tmp_path):
    python = a_venv(tmp_path / "venv")
    folder = install(packages(python))
    (folder / "lerobot.py").write_text("")
    (folder / "a_first.pth").write_text("import lerobot\n")
    found, errors = start(python, "-c", SAY, OPENPI_LORA="1")
    assert (found, errors) == ("early=True started=0 active=True", "")


def test_the_packages_that_activate_are_those_that_are_patched():
    assert {name.partition(".")[0] for name in activation.PATCHES} == startup.PACKAGES


def modules_of_a_start(python, **environ):
    code = "import sys; print(*sorted(sys.modules))"
    return start(python, "-c", code, **environ)[0].split()


def test_what_a_start_costs_in_modules(python, tmp_path):
    """Unset, none at all; set, three small ones, until a patched package is imported (`benchmarks/startup.py`: ms)."""
    without = modules_of_a_start(a_venv(tmp_path / "venv"))
    assert modules_of_a_start(python) == without
    added = set(modules_of_a_start(python, OPENPI_LORA="1")) - set(without)
    assert added == {"__future__", *(f"openpi_lora_patch{part}" for part in ("", ".errors", ".startup"))}


CHILDREN = f"""
import os, subprocess, sys
run = lambda **options: subprocess.run([sys.executable, "-c", {SAY!r}], check=True, **options)
run()
run(env=dict(os.environ))
run(env={{}})
run(env={{name: text for name, text in os.environ.items() if name != "OPENPI_LORA"}})
del os.environ["OPENPI_LORA"]
run()
os.environ["OPENPI_LORA"] = "1"
os.system(f"{{sys.executable}} -c 'import openpi_lora_patch; print(1)'")
os.execv(sys.executable, [sys.executable, "-c", {SAY!r}])
"""


def test_a_subprocess_follows_the_environment_it_is_given(python):
    found, errors = start(python, "-c", CHILDREN, OPENPI_LORA="1")
    assert sorted(found.split("\n")) == sorted([OURS, OURS, NOT_OURS, NOT_OURS, NOT_OURS, "1", OURS])
    assert errors == ""


WORKERS = f"""
import multiprocessing, sys
{PROBE}
def work(_):
    return probe()
if __name__ == "__main__":
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        print(set(pool.map(work, range(4), chunksize=1)))
    print(probe())
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("switch", ["1", "0"])
def test_workers_of_multiprocessing(python, tmp_path, method, switch):
    (tmp_path / "program.py").write_text(WORKERS)
    expected = OURS if switch == "1" else NOT_OURS
    found, errors = start(python, tmp_path / "program.py", method, OPENPI_LORA=switch)
    assert found.splitlines()[-1] == expected
    assert "active=" + str(switch == "1") in found.splitlines()[0]
    assert f"active={switch != '1'}" not in found
    assert errors == ""


def write(text):
    return lambda path: path.write_text(text)


def forbid(path):
    shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)
    path.chmod(0)


DAMAGES = {
    "gone": lambda path: shutil.rmtree(path) if path.is_dir() else path.unlink(),
    "a syntax error": write("def broken(:"),
    "an error": write("raise OSError('broken')"),
    "an ImportError": write("import nothing_of_this_name"),
    "other bytes": lambda path: path.write_bytes(b"\x00\xff\xfe"),
    "empty": write(""),
    "forbidden": forbid,
}
# What a start and an activation import; the package as a whole.
MODULES = [f"openpi_lora_patch/{n}.py" for n in ("__init__", "activation", "errors", "hooks", "settings", "startup")]
BROKEN = [(part, damage) for part in MODULES for damage in DAMAGES]
BROKEN += [("openpi_lora_patch", damage) for damage in ("gone", "forbidden")]
# Root reads what is forbidden, unless it gives that up.
AS_ANYBODY = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--"] if os.geteuid() == 0 else []
IMPORT_ALL = """
import importlib, sys
for name in ("transformers", "openpi", "lerobot"):
    try:
        importlib.import_module(name)
    except ImportError:
        print("swallowed")
    except BaseException:
        print("refused")
if any(type(finder).__module__ == "openpi_lora_patch.hooks" for finder in sys.meta_path):
    print("active")
"""


def break_an_install(folder, part, damage):
    """A virtual environment with `part` of us broken and empty packages in place of those that we patch."""
    if damage == "forbidden" and AS_ANYBODY and shutil.which(AS_ANYBODY[0]) is None:
        pytest.skip("root reads everything, and there is no setpriv here to give that up")
    python = a_venv(folder / "venv")
    installed = install(packages(python))
    for name in ("transformers", "openpi", "lerobot"):
        (installed / f"{name}.py").write_text("")
    DAMAGES[damage](installed / part)
    return python, AS_ANYBODY if damage == "forbidden" else []


@pytest.mark.parametrize(("part", "damage"), BROKEN)
def test_a_broken_install_is_loud_for_those_who_asked_and_silent_for_all_others(tmp_path, part, damage):
    """Loud: the start prints an error, or no patched package can be imported, which no `except ImportError` hides.

    Without its `__init__`, the rest of us still does its work.
    """
    python, prefix = break_an_install(tmp_path, part, damage)
    assert start(python, "-c", IMPORT_ALL, prefix=prefix) == ("", "")
    imported, errors = start(python, "-c", IMPORT_ALL, prefix=prefix, OPENPI_LORA="1")
    assert imported.split() in (["refused"] * 3, ["active"]) or f"{PTH}:" in errors


@pytest.mark.parametrize("damage", ["gone", "empty", "forbidden"])
def test_without_its_pth_file_nothing_starts_us(tmp_path, damage):
    """Python passes over it without a word. openpi's own models then say that they are not patched."""
    python, prefix = break_an_install(tmp_path, PTH, damage)
    assert start(python, "-c", SAY, prefix=prefix, OPENPI_LORA="1") == (NOT_OURS, "")


@pytest.mark.parametrize("variable", ["OPENPI_LORA", "OPENPI_LORA_FREEZE", "OPENPI_LORA_FREZE", "OPENPI_LORA_\udcff"])
def test_a_setting_that_cannot_be_read_refuses_each_import_and_no_other_program(python, variable):
    settings = {"OPENPI_LORA": "1", variable: "\udcff"}
    assert start(python, "-c", "print(1)", **settings) == ("1", "")
    found, _ = start(python, "-c", IMPORT_ALL, **settings)
    assert found.split() == ["refused"] * 3
    _, errors = start(python, "-c", "import transformers", expect=1, **settings)
    assert "openpi_lora_patch.errors.SettingsError: " in errors
    assert variable.encode("utf-8", "backslashreplace").decode() in errors


WORKERS_OF_TORCH = f"""
import os, sys
{PROBE}
import torch
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, index):
        return probe()
if __name__ == "__main__":
    # The ranks share one stdout, where their lines would mix.
    with open(f"found-{{os.environ.get('RANK')}}", "w") as file:
        for method in ("fork", "spawn"):
            loader = torch.utils.data.DataLoader(Data(), batch_size=None, num_workers=1, multiprocessing_context=method)
            print(*loader, file=file)
        print(probe(), file=file)
"""


TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2"]
# Without MPI and without GPUs, accelerate starts one process.
ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.mark.parametrize(("launcher", "ranks"), [(TORCHRUN, ["0", "1"]), (ACCELERATE, ["None"])])
def test_processes_of_a_launcher_and_their_dataloaders_workers(full, tmp_path, launcher, ranks):
    pytest.importorskip(launcher[0].partition(".")[0])
    (tmp_path / "program.py").write_text(WORKERS_OF_TORCH)
    start(full, "-m", *launcher, tmp_path / "program.py", cwd=tmp_path, OPENPI_LORA="1")
    found = {path.name.removeprefix("found-"): path.read_text() for path in tmp_path.glob("found-*")}
    assert sorted(found) == ranks
    for text in found.values():
        assert text.count(" active=True") == text.count(" active=") == 3


@pytest.mark.parametrize("switch", ["1", "0"])
def test_a_notebook_kernel(full, tmp_path, switch):
    pytest.importorskip("ipykernel")
    manager = pytest.importorskip("jupyter_client.manager")
    folder = tmp_path / "kernels/ours"
    folder.mkdir(parents=True)
    command = [str(full), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel = {"argv": command, "display_name": "ours", "language": "python", "env": {"OPENPI_LORA": switch}}
    (folder / "kernel.json").write_text(json.dumps(kernel))
    kernels = manager.KernelManager(kernel_name="ours")
    kernels.kernel_spec_manager.kernel_dirs = [str(tmp_path / "kernels")]
    kernels.start_kernel()
    client, printed = kernels.client(), []
    try:
        client.start_channels()
        client.wait_for_ready(timeout=60)
        client.execute_interactive(SAY, timeout=60, output_hook=printed.append)
    finally:
        client.stop_channels()
        kernels.shutdown_kernel(now=True)
    text = "".join(message["content"]["text"] for message in printed if message["msg_type"] == "stream")
    assert f"active={switch == '1'}" in text
