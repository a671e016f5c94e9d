"""openpi's unmodified `serve_policy.py` with a choice of adapters, asked by several clients at once.

Skipped where openpi or its client cannot be imported.
"""

import concurrent.futures
import socket

import numpy as np
import pytest
import torch
from safetensors.torch import save_model

from openpi_lora_patch.checkpoint import adapters
from test_openpi import CONFIG, PI0Pytorch, request, start, training, wait_for

client = pytest.importorskip("openpi_client.websocket_client_policy", reason="openpi's client is missing")
normalize = pytest.importorskip("openpi.shared.normalize", reason="openpi's dependencies are missing")
# The server draws its own noise; a bias this far out on the velocity tells adapters apart all the same.
SHIFTS = {None: 0.0, "pick": 1000.0, "place": -1000.0}


@pytest.fixture
def port(tmp_path):
    """Where a server with the adapters listens."""
    model = PI0Pytorch(training.get_config(CONFIG).model)
    save_model(model, tmp_path / "model.safetensors")
    zeros, ones = np.zeros(model.config.action_dim), np.ones(model.config.action_dim)
    stats = normalize.NormStats(mean=zeros, std=ones)
    normalize.save(tmp_path / "assets" / "debug", {"state": stats, "actions": stats})
    for name, shift in SHIFTS.items():
        if name:
            torch.nn.init.constant_(model.action_out_proj.bias, shift)
            adapters.save_adapter(model, tmp_path / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    log = tmp_path / "serve.log"
    arguments = ("--port", str(number), "policy:checkpoint", "--policy.config", CONFIG, "--policy.dir", str(tmp_path))
    choice = ",".join(f"{name}={tmp_path / name}" for name in SHIFTS if name)
    with log.open("w") as out:
        server = start("serve_policy.py", *arguments, folder=tmp_path, log=out, OPENPI_LORA_ADAPTERS=choice)
        try:
            wait_for(server, log, "server listening")
            yield number
            assert server.poll() is None, "the server died"
        finally:
            server.kill()
            server.wait()


def test_each_client_gets_the_adapter_it_names_and_an_unknown_name_hurts_nobody_else(port):
    seen = request(training.get_config(CONFIG).model)

    def ask(name):
        policy = client.WebsocketClientPolicy("127.0.0.1", port)
        # An action is the noise less the integral of the velocity over a time of 1.
        return [policy.infer(seen | ({"adapter": name} if name else {}))["actions"].mean() for _ in range(5)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = {name: pool.submit(ask, name) for name in (*SHIFTS, "push")}
        again = {name: pool.submit(ask, name) for name in SHIFTS}
    with pytest.raises(RuntimeError, match=r"There is no adapter of this name[^$]*'push'[^$]*pick, place"):
        asked.pop("push").result()
    for found in (asked, again):
        for name, answers in found.items():
            np.testing.assert_allclose(answers.result(), -SHIFTS[name], atol=50)
