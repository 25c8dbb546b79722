"""The three spellings of the form an answer must have, as StructuredOutputs: vLLM's structured_outputs, OpenAI's response_format, and the
text.format of its Responses.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from jaxllm.request import RequestError, StructuredOutputs


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


Schema = dict[str, Any]


class StructuredBody(_Strict):
    """vLLM's field: exactly one of these."""

    json_: str | Schema | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class TextFormat(_Strict):
    type: Literal["text"]


class ObjectFormat(_Strict):
    type: Literal["json_object"]


class NamedSchema(_Strict):
    """OpenAI's json_schema. Every schema is followed strictly, whether `strict` is sent or not."""

    name: str
    schema_: Schema | None = Field(default=None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class SchemaFormat(_Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class FlatSchemaFormat(NamedSchema):
    """What SchemaFormat is in the Responses."""

    type: Literal["json_schema"]


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]
ResponsesFormat = Annotated[TextFormat | ObjectFormat | FlatSchemaFormat, Field(discriminator="type")]


def asked(format: Any, structured: StructuredBody | None = None, param: str = "response_format") -> StructuredOutputs | None:
    """The form that a body asks for. Raises RequestError if it asks twice, or for none that can be."""
    form = _of_format(format, param)
    if structured is None:
        return form
    if form is not None:
        raise RequestError(f"`{param}` and `structured_outputs` both say what form the answer has: send one of them", "structured_outputs")
    return StructuredOutputs(**structured.model_dump(by_alias=True))


def _of_format(format: Any, param: str) -> StructuredOutputs | None:
    if format is None or isinstance(format, TextFormat):
        return None
    if isinstance(format, ObjectFormat):
        return StructuredOutputs(json_object=True)
    named = format.json_schema if isinstance(format, SchemaFormat) else format
    if named.schema_ is None:
        raise RequestError(f"`{param}` names a json_schema without its `schema`", param)
    return StructuredOutputs(json=named.schema_)
