"""One parameter of a sweep file: listed values, or a distribution to draw numbers from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Drawing = Callable[[np.random.Generator], Any]
DISTRIBUTIONS = ("uniform", "int_uniform", "q_uniform", "log_uniform_values", "q_log_uniform_values")


def is_listed(parameter: Mapping[str, Any]) -> bool:
    """Whether a parameter lists its values, as a grid needs it."""
    return "value" in parameter or "values" in parameter


def listed(parameter: Mapping[str, Any]) -> list[Any]:
    """The values of a parameter that lists them."""
    return list(parameter["values"]) if "values" in parameter else [parameter["value"]]


def drawing(parameter: Any, where: str) -> Drawing:
    """What draws a value for a parameter; raises ValueError, which starts with `where`, for what is not known or no number."""
    if not isinstance(parameter, Mapping):
        raise ValueError(f"{where} is {parameter!r}; write {{value: {parameter}}}, {{values: […]}}, or min and max")
    if "parameters" in parameter:
        raise ValueError(f"{where}: nested parameters are not known here; write {_flat_names(parameter, where)}")
    if is_listed(parameter):
        kind = "values" if "values" in parameter else "value"
        _refuse_others(parameter, {kind, "distribution"}, where, kind)
        values = parameter[kind] if kind == "values" else [parameter[kind]]
        if not isinstance(values, list):
            raise ValueError(f"{where}: values is {values!r}; write a list, such as [{values}]")
        if not values:
            raise ValueError(f"{where}: values is empty; list some")
        if several := [value for value in values if isinstance(value, list | Mapping)]:
            raise ValueError(
                f"{where}: {several[0]!r} is no single value, and would reach the command as one word; sweep over config files "
                "instead (a parameter called config, with values [a.yaml, b.yaml])"
            )
        only = "categorical" if kind == "values" else "constant"
        if parameter.get("distribution", only) != only:
            raise ValueError(
                f"{where}: distribution {parameter['distribution']} does not go with {kind}; leave one away"
            )
        return lambda rng: values[int(rng.integers(len(values)))]
    return _distribution(parameter, where)


def _flat_names(parameter: Mapping[str, Any], where: str) -> str:
    """What W&B's nested parameters are in this project's dotted names."""
    name = where.rpartition(", ")[2]
    inner = parameter["parameters"]
    return (
        " and ".join(f"{name}.{key}: {{values: […]}}" for key in inner) if isinstance(inner, Mapping) else f"{name}.KEY"
    )


def _distribution(parameter: Mapping[str, Any], where: str) -> Drawing:
    both_int = isinstance(parameter.get("min"), int) and isinstance(parameter.get("max"), int)
    distribution = parameter.get("distribution", "int_uniform" if both_int else "uniform")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"{where}: distribution {distribution} is not known here (value, values, {', '.join(DISTRIBUTIONS)} are)"
        )
    quantised = distribution.startswith("q_")
    _refuse_others(parameter, {"distribution", "min", "max"} | ({"q"} if quantised else set()), where, distribution)
    if not {"min", "max"} <= parameter.keys():
        raise ValueError(f"{where}: give value, values, or min and max")
    low, high, step = (_number(parameter.get(key, 1), f"{where}: {key}") for key in ("min", "max", "q"))
    if distribution == "int_uniform" and not both_int:
        raise ValueError(f"{where}: min {low} and max {high} must be whole numbers for int_uniform")
    if not low < high or (distribution.endswith("log_uniform_values") and low <= 0):
        raise ValueError(f"{where}: min {low} and max {high} are no range for {distribution}")
    if step <= 0:
        raise ValueError(f"{where}: q is {step}; give the positive step between values")

    def draw(rng: np.random.Generator) -> float | int:
        if distribution == "int_uniform":
            return int(rng.integers(int(low), int(high) + 1))
        if distribution.endswith("log_uniform_values"):
            number = math.exp(rng.uniform(math.log(low), math.log(high)))
        else:
            number = rng.uniform(low, high)
        return round(number / step) * step if quantised else float(number)

    return draw


def _refuse_others(parameter: Mapping[str, Any], known: set[str], where: str, beside: str) -> None:
    if others := sorted(map(str, parameter.keys() - known)):
        raise ValueError(f"{where}: {', '.join(others)} does not go with {beside}; leave it away")


def _number(value: Any, where: str) -> float | int:
    """A finite number, or ValueError: YAML takes 1e-3, which has no point, and 1.0e3, which has no sign, for texts."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    hint = "one"
    if isinstance(value, str) and _is_number(value):
        mantissa, e, exponent = value.lower().partition("e")
        hint = f"{mantissa}{'' if '.' in mantissa else '.0'}e{int(exponent):+d}" if e else value
        hint += ", without quotes"
    raise ValueError(f"{where} is {value!r}, no finite number; write {hint}")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
