# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Numbers that callers give: Python numbers, NumPy scalars and tensors without dimensions."""

from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassFieldValidationError

ConfigClass = TypeVar("ConfigClass")

LARGEST_INT = 2**63 - 1


def plain_number(x: object) -> int | float | None:
    """`x` as a Python number, or `None`; NumPy scalars and tensors without dimensions are numbers."""
    if getattr(x, "ndim", None) == 0 and hasattr(x, "item"):
        x = x.item()
    return x if isinstance(x, (int, float)) and not isinstance(x, bool) else None


def with_plain_numbers(config_class: type[ConfigClass]) -> type[ConfigClass]:
    """Lets every field take NumPy scalars and tensors without dimensions, which `strict` and JSON do not know.

    Integers that do not fit in 64 bits are refused here: later checks would overflow, or fail to print them.
    """
    checked = config_class.__setattr__

    def set_plain(self: ConfigClass, name: str, value: Any) -> None:
        if name in config_class.__annotations__:
            value = _plain_list(name, value) if isinstance(value, list) else _plain(name, value)
        checked(self, name, value)

    config_class.__setattr__ = set_plain  # type: ignore[method-assign, assignment]
    return config_class


def _plain_list(name: str, value: list[Any]) -> list[Any]:
    # One more level, and no deeper: no field has it, and a damaged file may be nested without end.
    return [[_plain(name, y) for y in x] if isinstance(x, list) else _plain(name, x) for x in value]


def _plain(name: str, value: Any) -> Any:
    number = plain_number(value)
    if isinstance(number, int) and abs(number) > LARGEST_INT:
        error = ValueError(f"`{name}` must fit in 64 bits, got an int of {number.bit_length()} bits.")
        raise StrictDataclassFieldValidationError(field=name, cause=error) from error
    return value if number is None else number


__all__ = ["LARGEST_INT", "plain_number", "with_plain_numbers"]
