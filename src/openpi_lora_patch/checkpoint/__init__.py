"""Checkpoints into and out of LoRA models."""
