"""Pydantic's complaints about a plan in words: file or override, key, what is allowed."""

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from pydantic import BaseModel, ValidationError

from pipeline.plan.faults import NAME_RULE
from pipeline.plan.sections import Plan


def explain(error: ValidationError, path: Path, origins: Mapping[str, str]) -> str:
    """One line per fault, naming the file or the override it came from."""
    lines = []
    for problem in error.errors():
        context = problem.get("ctx", {})
        location = _location(problem["loc"])
        key = ".".join([*location, *([context["key"]] if "key" in context else [])])
        named = [origin for k, origin in origins.items() if f"{key}.".startswith(f"{k}.")]
        message = _message(problem["type"], problem["msg"], problem["input"], location)
        lines.append(f"{named[-1] if named else path}: {key}: {message}")
    return "\n".join(lines)


def _location(found: tuple[int | str, ...]) -> list[str]:
    """Where a fault is, without the words Pydantic adds below a value for its own use."""
    parts = [str(part) for part in found]
    for depth in range(1, len(parts)):
        if _section(parts[:depth]) is None:
            return parts[:depth]
    return [part for part in parts if part != "[key]"]


def _message(kind: str, message: str, value: object, location: list[str]) -> str:
    shown = "null" if value is None else repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    section = _section(location[:-1] if kind == "extra_forbidden" else location)
    keys = fields(section) if section else "none here"
    match kind:
        case "missing":
            return "is required"
        case "extra_forbidden":
            return f"unknown key; allowed: {keys}"
        case "model_type":
            return f"{shown} is no section; allowed keys: {keys}"
        case "dict_type":
            return f"{shown} is no section; it maps names to sections of {keys}"
        case "string_pattern_mismatch":
            return f"{shown}: {NAME_RULE}"
    return message.removeprefix("Value error, ").replace("Input should", f"{shown} should")


def _section(location: list[str]) -> type[BaseModel] | None:
    """The plan section a location points into."""
    section: type[BaseModel] = Plan
    parts = iter(location)
    for part in parts:
        field = section.model_fields.get(part)
        if field is None:
            return None
        kinds = [a for a in (field.annotation, *get_args(field.annotation)) if isinstance(a, type)]
        nested = next((kind for kind in kinds if issubclass(kind, BaseModel)), None)
        if nested is None:
            return None
        section = nested
        if get_args(field.annotation):
            next(parts, None)  # a map of sections: skip the entry's own name
    return section


def fields(section: type[BaseModel]) -> str:
    """The keys a section knows."""
    return ", ".join(section.model_fields)
