"""Kill a process at a random moment of its writing."""

import os
import pathlib
import random
import signal
import time


def kill_while_it_writes(child: int, folder: pathlib.Path, generator: random.Random) -> None:
    """Kill the process `child` up to 50 ms after its first file in `folder`, which comes late on a busy machine."""
    deadline = time.monotonic() + 10
    while not any(folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(generator.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
