"""Run the tests on releases of transformers, and write the table of tested ones from what passed.

    python tests/matrix.py                  every release from 4.53.0 on that is not in the table yet
    python tests/matrix.py 5.24.0           these releases (again)
    python tests/matrix.py --python 3.13 --torch 2.13.0 5.23.0

Each release gets an environment of its own under `.matrix/`, all share one torch. A release on which every test passes
enters `tested_releases.json` with its fingerprints; for one that is new, or fails, the functions that changed since the
nearest tested release are named. It can be interrupted and started again; at the end the README shows the new table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if "openpi_lora_patch" not in sys.modules:  # Not where a test imports this: its children would be switched off too.
    os.environ.setdefault("OPENPI_LORA", "0")  # This process reads the guard's table and patches nothing.

from openpi_lora_patch import compat

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".matrix"
# What it must hold everywhere; the tests of openpi's scripts, of start-up and of fuzzing are run on a few releases.
TESTS = ["test_compatibility.py", "test_gemma.py", "test_layout.py", "test_pi0.py"]
TESTS += ["test_verify.py::test_everything_holds_here"]
FIRST = (4, 53, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*")
    parser.add_argument("--python", default=f"3.{sys.version_info.minor}", help="version of Python, such as 3.12")
    parser.add_argument("--torch", default="2.13.0", help="release of torch")
    parser.add_argument("--break", dest="broken", default="", help="break a patch on purpose, see conftest.py")
    parser.add_argument("pytest", nargs="*", help="after --: more for pytest")
    options = parser.parse_args()
    shared = shared_environment(options.python, options.torch)
    releases = options.releases or [release for release in published(shared) if release not in compat.table()["runs"]]
    rows = []
    for release in releases:
        begin = time.monotonic()
        environment = own_environment(release, shared)
        report = run_tests(environment, options.broken)
        report |= {"python": options.python, "torch": options.torch}
        known, passed = release in compat.table()["runs"], report["passed"] and not report["failed"]
        if passed and not options.broken:
            record(release, report, package(environment))
        rows.append(f"{release:8} {_outcome(report)} {time.monotonic() - begin:5.0f} s")
        print(rows[-1], flush=True)
        if not (known and passed):
            print(drift(release, package(environment)), flush=True)
    if not options.broken:
        write_readme()
    print("\n".join(["", "summary", *rows]))
    return int(any("FAILED" in row for row in rows))


def shared_environment(python: str, torch: str) -> Path:
    """An environment with torch and all that does not depend on transformers."""
    folder = FOLDER / f"shared-{python}-{torch}"
    packages = [f"torch=={torch}", "hypothesis", "importlib-metadata", "numpy<2", "pytest", "pillow", "wrapt!=2.2.0"]
    return _make(folder, python, packages if python != "3.13" else [*packages, "numpy>=2"], None)


def own_environment(release: str, shared: Path) -> Path:
    """An environment with one release of transformers and what it asks for; torch comes from `shared`."""
    return _make(FOLDER / f"{release}-{shared.name}", str(shared / "bin/python"), [f"transformers=={release}"], shared)


def _make(folder: Path, python: str, packages: list[str], shared: Path | None) -> Path:
    done = folder / "installed"
    if not done.exists():
        interpreter = python if "/" in python else f"python{python}"
        subprocess.run([interpreter, "-m", "venv", "--clear", str(folder)], check=True)
        if shared is not None:
            (site(folder) / "_shared.pth").write_text(f"{site(shared)}\n")
        pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *packages], check=True)
        if shared is not None:
            subprocess.run([*pip, "--no-deps", "--editable", str(ROOT)], check=True)
        done.touch()
    return folder


def site(folder: Path) -> Path:
    return next((folder / "lib").glob("python3.*")) / "site-packages"


def package(environment: Path) -> Path:
    return site(environment) / "transformers"


def published(environment: Path) -> list[str]:
    """Every release on the package index from 4.53.0 on, oldest first."""
    command = [str(environment / "bin/python"), "-m", "pip", "index", "versions", "transformers"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"Available versions: (.*)", listed)
    versions = [text for text in (found[1].split(", ") if found else []) if re.fullmatch(r"\d+\.\d+\.\d+", text)]
    return sorted((v for v in versions if _key(v) >= FIRST), key=_key)


def run_tests(environment: Path, broken: str) -> dict[str, Any]:
    """Counts of passed, failed and skipped tests, and the worst difference from openpi's outputs."""
    report = environment / "report.json"
    report.unlink(missing_ok=True)
    command = [str(environment / "bin/python"), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--report={report}"]
    command += [f"--break={broken}"] if broken else []
    environ = os.environ | {"OPENPI_LORA_ALLOW_UNTESTED": "1", "HF_HUB_OFFLINE": "1"}
    environ.pop("OPENPI_LORA")
    with (environment / "pytest.log").open("w") as log:
        subprocess.run(
            [*command, *(str(ROOT / "tests" / name) for name in TESTS)], cwd=ROOT, env=environ, stdout=log, stderr=log
        )
    if not report.exists():
        return {"passed": 0, "failed": 1, "skipped": 0, "worst": None}
    return json.loads(report.read_text())


def record(release: str, report: dict[str, Any], source: Path) -> None:
    """Enter a release, or another run of it, in the table."""
    table = json.loads(compat.TABLE.read_text())
    for name, fingerprint in compat.fingerprints(source).items():
        by_fingerprint = table["fingerprints"].setdefault(name, {})
        for releases in by_fingerprint.values():
            releases[:] = [known for known in releases if known != release]
        by_fingerprint.setdefault(fingerprint, []).append(release)
        table["fingerprints"][name] = {
            known: sorted(releases, key=_key) for known, releases in sorted(by_fingerprint.items()) if releases
        }
    runs = table["runs"].setdefault(release, [])
    runs[:] = [run for run in runs if (run["python"], run["torch"]) != (report["python"], report["torch"])]
    runs.append(report)
    runs.sort(key=lambda run: (_key(run["python"]), _key(run["torch"])))
    table["runs"] = {known: table["runs"][known] for known in sorted(table["runs"], key=_key)}
    temporary = compat.TABLE.with_suffix(".tmp")
    temporary.write_text(_compact(table))
    temporary.replace(compat.TABLE)
    compat.table.cache_clear()


def drift(release: str, source: Path) -> str:
    """Which relied-on functions differ from the nearest tested release, in words."""
    known = [other for other in compat.table()["runs"] if other != release]
    if not known:
        return "  no release was tested before"
    older = [other for other in known if _key(other) < _key(release)]
    nearest = max(older, key=_key) if older else min(known, key=_key)
    expected, found = compat.tested(nearest), compat.fingerprints(source)
    lines = [
        f"  {name}: " + ("is gone" if found[name] == compat.ABSENT else "is new" if was == compat.ABSENT else "changed")
        for name, was in expected.items()
        if found[name] != was
    ]
    log = source.parents[3] / "pytest.log"
    return "\n".join([f"  against {nearest}:", *(lines or ["  no relied-on function changed"]), f"  tests: {log}"])


def readme_table() -> str:
    """The README's table of tested releases."""
    lines = ["| transformers | Python | torch | tests passed | worst difference |", "| --- | --- | --- | --- | --- |"]
    for release, runs in compat.table()["runs"].items():
        lines += [
            f"| {release} | {run['python']} | {run['torch']} | {run['passed']} | {run['worst']:.1e} |" for run in runs
        ]
    return "\n".join(lines)


def write_readme() -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split("<!-- matrix:begin -->")
    after = rest.split("<!-- matrix:end -->")[1]
    readme.write_text(f"{before}<!-- matrix:begin -->\n{readme_table()}\n<!-- matrix:end -->{after}")


def _compact(table: dict[str, Any]) -> str:
    """JSON with one line a run and one a fingerprint, for diffs that can be read."""
    return re.sub(r"(\{|\[)\s+([^{}\[\]]*?)\s+(\}|\])", _one_line, json.dumps(table, indent=1)) + "\n"


def _one_line(match: re.Match[str]) -> str:
    return match[1] + re.sub(r"\s+", " ", match[2]) + match[3]


def _key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _outcome(report: dict[str, Any]) -> str:
    word = "ok    " if report["passed"] and not report["failed"] else "FAILED"
    worst = "-" if report["worst"] is None else f"{report['worst']:.1e}"
    return (
        f"{word} {report['passed']:4} passed {report['failed']:3} failed {report['skipped']:3} skipped, worst {worst}"
    )


if __name__ == "__main__":
    sys.exit(main())
