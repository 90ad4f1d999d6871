"""What every part of a recipe has in common: strictness, and the numbers and texts that keys take. No torch here."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr

# Each branch carries its own bounds: pydantic drops the bounds of a union from the JSON Schema.
Finite = Annotated[StrictFloat, Field(allow_inf_nan=False)]
Positive = Annotated[StrictInt, Field(gt=0)] | Annotated[Finite, Field(gt=0)]
NonNegative = Annotated[StrictInt, Field(ge=0)] | Annotated[Finite, Field(ge=0)]
PositiveInt = Annotated[StrictInt, Field(ge=1)]
Text = Annotated[StrictStr, Field(min_length=1)]
AtLeastOne = Annotated[StrictInt, Field(ge=1)] | Annotated[Finite, Field(ge=1)]
Share = Annotated[StrictInt, Field(ge=0, le=1)] | Annotated[Finite, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of a recipe: frozen, and strict about names and types (YAML already knows numbers from strings)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
