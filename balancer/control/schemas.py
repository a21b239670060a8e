"""What bodies and answers of the control API look like, as JSON Schema: made from the models that check the bodies and
from the types that the answers have in the code."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, NoDefault

Schema = dict[str, Any]

PLACE = "#/components/schemas/{model}"
_REFERRED: list[type] = []


class Generator(GenerateJsonSchema):
    """Without what clients have no use for: titles that repeat names, and None for what was left out."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def get_default_value(self, schema: Any) -> Any:
        default = super().get_default_value(schema)
        return NoDefault if default is None else default

    def normalize_name(self, name: str) -> str:
        return super().normalize_name(name).removesuffix("View")


def ref(kind: type) -> Schema:
    """A reference to the schema of a body or an answer."""
    _REFERRED.append(kind)
    return {"$ref": PLACE.format(model=_name(kind))}


@cache
def schemas() -> Schema:
    """By name, of all that `ref` was asked for and of what is in them. Made when somebody asks: every start would be a
    tenth longer."""
    made: Schema = {}
    for kind in _REFERRED:
        schema = TypeAdapter(kind).json_schema(ref_template=PLACE, schema_generator=Generator)
        for each, found in {**schema.pop("$defs", {}), _name(kind): schema}.items():
            found.pop("title", None)  # the name once more
            assert made.setdefault(each, found) == found, f"two types are called {each}"
    return made


def _name(kind: type) -> str:
    return kind.__name__.removesuffix("View")
