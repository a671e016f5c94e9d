"""Sessions over releases of transformers; `tests/matrix.py` does the work and makes the environments.

    nox -s matrix                     every release that is not in the table yet
    nox -s matrix -- 4.53.2 5.24.0    these releases (again)
    nox -s edges                      the first release of each era
    nox -s broken                     a patch broken on purpose, which has to fail

The interpreter that runs nox needs nothing else.
"""

import pathlib
import sys
from collections.abc import Sequence

import nox

nox.options.sessions = ["edges"]

# The first releases of the eras in which what we build on changed.
EDGES = ["4.53.0", "4.54.0", "4.56.0", "4.57.1", "5.0.0", "5.2.0", "5.4.0", "5.6.0", "5.15.0", "5.21.0", "5.23.0"]
BROKEN_ON = ["4.53.2", "4.57.6", "5.4.0", "5.16.1", "5.23.0"]
# Absolute: tests start processes in other folders.
SOURCE = str(pathlib.Path(__file__).parent / "src")


@nox.session(python=False)
def matrix(session: nox.Session) -> None:
    """Test releases, and enter those that pass in the table."""
    _matrix(session, *session.posargs)


@nox.session(python=False)
def edges(session: nox.Session) -> None:
    """Test the edges of the eras."""
    _matrix(session, *EDGES)


@nox.session(python=False)
@nox.parametrize("release", BROKEN_ON)
@nox.parametrize("broken", ["adarms", "cache", "images"])
def broken(session: nox.Session, broken: str, release: str) -> None:
    """Test one release with one patch broken: fails unless a test does."""
    _matrix(session, "--break", broken, release, success_codes=[1])


def _matrix(session: nox.Session, *arguments: str, success_codes: Sequence[int] = (0,)) -> None:
    session.run(sys.executable, "tests/matrix.py", *arguments, env={"PYTHONPATH": SOURCE}, success_codes=success_codes)
