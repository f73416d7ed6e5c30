"""What the models of a sweep file have in common."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

All = Literal["all"]
Name = Annotated[str, Field(min_length=1, max_length=100)]
Where = Annotated[str, Field(min_length=1)]
"""A path, an address or a URI: as long as it happens to be."""
Names = All | Annotated[tuple[Name, ...], Field(min_length=1)]
Layer = Annotated[int, Field(ge=0)]
Layers = All | Annotated[tuple[Layer, ...], Field(min_length=1)]


class Strict(BaseModel):
    """Frozen, without fields that it does not know; a field's docstring is its description."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )
