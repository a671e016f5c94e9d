"""Have openpi's Gemma models, and no others, converted as they are built.

openpi sets `use_adarms` on each of its Gemma configs, true or false: its presence marks a model as openpi's.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..replace import replace
from ..settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

# True inside a constructor of an openpi model: its parts are converted with it, once all of its weights are there.
_building = contextvars.ContextVar("_building", default=False)
HEADS = ("GemmaForCausalLM", "GemmaForSequenceClassification", "GemmaForTokenClassification")


def is_openpi(config: Any) -> bool:
    """Whether openpi configured this model (`config` is that of a Gemma text model)."""
    return hasattr(config, "use_adarms")


def patch(module: ModuleType, settings: Settings, undo: contextlib.ExitStack) -> None:
    """Convert openpi's Gemma models as they are built, and provide `_gated_residual`, which openpi calls."""
    replace(undo, module, "_gated_residual", gated_residual)
    wrap_init(module.GemmaModel, undo, after=_convert)
    for name in HEADS:
        wrap_init(getattr(module, name), undo, after=_convert_head)


def wrap_init(
    cls: Any, undo: contextlib.ExitStack, *, after: Callable[[Any], None], before: Callable[[Any], None] | None = None
) -> None:
    """When openpi builds a `cls`, no subclass of it nor a part of a model: `before(config)`, then `after(instance)`."""
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        outermost = is_openpi(config.get_text_config()) and not _building.get()
        ours = outermost and type(self) is cls
        if ours and before is not None:
            before(config)
        with _inside() if outermost else contextlib.nullcontext():
            original(self, config, *args, **kwargs)
        if ours:
            after(self)

    replace(undo, cls, "__init__", __init__)


@contextlib.contextmanager
def _inside() -> Iterator[None]:
    token = _building.set(True)
    try:
        yield
    finally:
        _building.reset(token)


def gated_residual(x: Tensor | None, y: Tensor | None, gate: Tensor | None) -> Any:
    """`x + y * gate`, without a gate `x + y`; where one of the two is None the other. All (batch, seq, dim)."""
    if x is None or y is None:
        return y if x is None else x
    return x + y if gate is None else x + y * gate


def _convert(model: Any) -> None:
    from ..models import gemma

    gemma.convert(model)


def _convert_head(head: Any) -> None:
    from ..models import gemma

    gemma.convert_head(head)
