"""How the kernels become PyTorch ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Defined with Library and not with torch.library.custom_op, whose first call imports the compiler, for a second.
_library = torch.library.Library("dalle_fast", "FRAGMENT")


def define_op(schema: str, *tags: torch.Tag) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """Make a function the op ``schema`` of every device, which returns new tensors and leaves its arguments alone."""

    def define(function: Callable[..., Any]) -> torch._ops.OpOverload:
        name = schema.partition("(")[0]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        _library.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.dalle_fast, name).default

    return define
