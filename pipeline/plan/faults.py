"""What a section of a plan is, names, and how one says that a key below it is wrong."""

from typing import Annotated

from pydantic import ConfigDict, StringConstraints
from pydantic_core import PydanticCustomError

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
"""A name is a path and a Dagster key at once: lower-case letters, digits and underscores."""

NAME_RULE = (
    "a name is lower-case letters, digits and underscores, begins with a letter "
    "and is at most 64 long"
)


SECTION = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
"""What a part of a plan is: known keys only, finite numbers, not to be changed."""


def fault(key: str, message: str) -> PydanticCustomError:
    """An error about a key below the section that finds it."""
    return PydanticCustomError("fault", "{message}", {"key": key, "message": message})
