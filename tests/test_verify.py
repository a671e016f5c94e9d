"""The verify command, in a process of its own."""

import json

from openpi_lora_patch import verify


def test_everything_holds_here(child):
    result = child("-m", "openpi_lora_patch.verify", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert report["holds"]
    assert [check["check"] for check in report["checks"]] == list(verify.CHECKS)
    figures = {check["check"]: check["figure"] for check in report["checks"]}
    assert "pi0 504 LoRA tensors, 36,720,672 of 3,534,844,688 train" in figures["full-size counts"]
    assert "pi0.5 504 LoRA tensors, 35,638,304 of 3,650,230,032 train" in figures["full-size counts"]


def test_a_broken_patch_fails_with_what_to_do(child):
    code = """
import sys
from openpi_lora_patch import verify
from openpi_lora_patch.lora import LoRALinear
from openpi_lora_patch.models.paligemma import PaliGemmaModel
right = PaliGemmaModel.get_image_features
PaliGemmaModel.get_image_features = lambda self, images: right(self, images) / 8
LoRALinear.unmerge = lambda self: None
wanted = ("openpi's outputs", "save, load, merge", "conversion")
verify.CHECKS = {name: verify.CHECKS[name] for name in wanted}
sys.exit(verify.main([]))
"""
    result = child("-c", code)
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    marks = {line[14:32].strip(): line.split()[0] for line in lines if line.startswith(("ok", "FAIL"))}
    assert marks == {"openpi's outputs": "FAIL", "save, load, merge": "FAIL", "conversion": "ok"}
    assert result.stdout.count("to do:") == 2
    assert lines[-1].startswith("Not verified")
