"""Every error this package raises on purpose.

They derive from `Exception` alone: transformers' lazy modules turn `RuntimeError` and `ImportError` into
`ModuleNotFoundError`, which callers swallow, and a refusal must not be swallowed.
"""

from __future__ import annotations


class OpenpiLoraError(Exception):
    """Something was asked for that cannot be given; the message says what to do about it.

    Args:
        problem: what went wrong, one sentence.
        found: what was there.
        expected: what should have been there.
        fix: what the reader can do.
    """

    def __init__(
        self, problem: str, *, found: str | None = None, expected: str | None = None, fix: str | None = None
    ) -> None:
        # Pickle rebuilds an exception from `args`, so everything is in the one formatted string.
        lines = [problem]
        lines += [f"  {label}: {text}" for label, text in _labelled(found, expected, fix) if text is not None]
        super().__init__("\n".join(lines))


def _labelled(found: str | None, expected: str | None, fix: str | None) -> list[tuple[str, str | None]]:
    return [("found", found), ("expected", expected), ("to do", fix)]


class SettingsError(OpenpiLoraError):
    """An `OPENPI_LORA*` variable or a keyword of `activate()` has no meaning."""


class ActivationError(OpenpiLoraError):
    """The patches cannot be put in place: too late, in the middle of an import, or without wrapt."""


class CompatibilityError(OpenpiLoraError):
    """The installed transformers is not one that was tested, or is not what it says it is."""


class LoRAError(OpenpiLoraError):
    """LoRA cannot be applied to this model, or a LoRA layer is used in a way that would lose training."""


class FrozenParametersError(OpenpiLoraError):
    """What trains is no longer what the freezing preset decided."""


class CheckpointError(OpenpiLoraError):
    """A checkpoint does not fit the model; nothing of it was loaded."""
