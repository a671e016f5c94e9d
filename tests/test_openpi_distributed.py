"""openpi's unmodified `train_pytorch.py` under torchrun, two processes. Skipped where openpi cannot be imported."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("openpi") is None:
    pytest.skip("openpi cannot be imported here", allow_module_level=True)
pytest.importorskip("openpi.training.config", reason="openpi's dependencies are missing")

import openpi
import safetensors.torch
import torch

from openpi_lora_patch.checkpoint import optimizer

TRAIN = Path(openpi.__file__).parents[2] / "scripts" / "train_pytorch.py"
CONFIG = "debug_lora_pytorch"

# Runs openpi's script (argv from 5 on), whose random numbers depend on the number of processes, such that they do not:
# the loader deals the samples out in order, and each process takes its own rows of the noise and times of the whole
# batch, which the step decides. Argv 1 is the step to start at; 2 whether DDP may search for unused parameters; 3 a
# folder for rank 0 to leave gradients in; 4 what kills a process: "none", "step" or "save".
_TRAIN = """
import os, pathlib, runpy, signal, sys
import torch
import torch.nn.parallel as parallel
import openpi.training.data_loader as data
import openpi.models_pytorch.preprocessing_pytorch as preprocessing
from openpi.models_pytorch.pi0_pytorch import PI0Pytorch

first, search, folder, dies = int(sys.argv[1]), sys.argv[2] == "search", pathlib.Path(sys.argv[3]), sys.argv[4]
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
folder.mkdir(exist_ok=True)
step = first

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class ByStep:
    def __init__(self, loader):
        self.loader, self.data_config = loader, loader.data_config

    def __iter__(self):
        global step
        for step, batch in enumerate(self.loader):
            if step >= first:
                yield batch

create = data.create_data_loader
data.create_data_loader = lambda config, **options: ByStep(create(config, **options | {"shuffle": False}))

right = preprocessing.preprocess_observation_pytorch
preprocessing.preprocess_observation_pytorch = lambda seen, train: right(seen, train=False)

noise, time = PI0Pytorch.sample_noise, PI0Pytorch.sample_time

def sample_noise(self, shape, device):
    if dies == "step" and rank == 1 and step == 3:
        die()
    torch.manual_seed(step)
    return noise(self, (shape[0] * world, *shape[1:]), device)[rank::world]

PI0Pytorch.sample_noise = sample_noise
PI0Pytorch.sample_time = lambda self, size, device: time(self, size * world, device)[rank::world]

clip = torch.nn.utils.clip_grad_norm_

def clip_grad_norm_(parameters, max_norm):
    parameters = list(parameters)
    if rank == 0:
        grads = {str(i): p.grad.clone() for i, p in enumerate(parameters) if p.grad is not None}
        torch.save(grads, folder / f"{step}.pt")
    return clip(parameters, max_norm)

torch.nn.utils.clip_grad_norm_ = clip_grad_norm_

if not search:
    class WithoutSearch(parallel.DistributedDataParallel):
        def __init__(self, *args, **options):
            super().__init__(*args, **options | {"find_unused_parameters": False})

    parallel.DistributedDataParallel = WithoutSearch

if dies == "save":
    import safetensors.torch
    save_model = safetensors.torch.save_model

    def torn(model, path):
        save_model(model, path)
        if path.parent.name == "tmp_4":
            path.write_bytes(path.read_bytes()[:1000])
            die()

    safetensors.torch.save_model = torn

sys.argv = sys.argv[5:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def train(folder, name, processes, *more, first=0, search="search", dies="none"):
    script = folder / "train.py"
    script.write_text(_TRAIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", script]
    command += [first, search, folder / f"{name}-gradients", dies, TRAIN, CONFIG, "--exp_name", name]
    command += ["--pytorch_training_precision", "float32", "--save_interval", 2, "--num_train_steps", 7, *more]
    variables = {"OPENPI_LORA": "1", "OPENPI_LORA_SAVE": "adapter", "JAX_PLATFORMS": "cpu", "WANDB_MODE": "disabled"}
    return subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=os.environ | variables | {"GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds what one process, and two with and without the search, left behind."""
    folder = tmp_path_factory.mktemp("runs")
    for name, processes, search in (("one", 1, "search"), ("two", 2, "search"), ("eager", 2, "eager")):
        done = train(folder, name, processes, search=search)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["two", "eager"])
def test_two_processes_have_the_gradients_of_one_with_both_samples(folder, name):
    for step in range(7):
        one, two = (torch.load(folder / f"{run}-gradients" / f"{step}.pt") for run in ("one", name))
        assert one.keys() == two.keys()
        assert len(one) == 112 + 10  # Adapters and heads.
        largest = max(grad.norm() for grad in one.values())
        for key, grad in one.items():
            assert (two[key] - grad).norm() <= 1e-4 * max(grad.norm(), largest / 100), key


@pytest.mark.parametrize("dies", ["step", "save"])
def test_a_rank_killed_in_a_step_or_a_save_leaves_a_checkpoint_that_resumes_to_the_same_bits(folder, dies):
    """Rank 1 is killed in the forward pass of step 3, or rank 0 with a checkpoint half written after step 4."""
    killed = train(folder, dies, 2, dies=dies)
    assert killed.returncode != 0
    assert f"Signal {signal.SIGKILL.value} (SIGKILL)" in killed.stderr
    runs = folder / "checkpoints" / CONFIG
    assert {path.name for path in (runs / dies).iterdir() if path.name.isdigit()} == {"2"}
    assert (runs / dies / "tmp_4").exists() == (dies == "save")

    resumed = train(folder, dies, 2, "--resume", first=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "Resumed training from step 2" in resumed.stderr
    one, other = (safetensors.torch.load_file(runs / name / "6" / "model.safetensors") for name in ("two", dies))
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]
    one, other = (optimizer.load(runs / name / "6" / "optimizer.pt")["state"] for name in ("two", dies))
    assert all(torch.equal(one[i][name], other[i][name]) for i in one for name in one[i])


def test_two_processes_checkpoint_resumes_on_one(folder):
    done = train(folder, "two", 1, "--resume", "--num_train_steps", "9", first=6)
    assert done.returncode == 0, done.stderr
    assert "Resumed training from step 6" in done.stderr
