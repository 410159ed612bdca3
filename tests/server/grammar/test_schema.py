"""Schemas of callers to JSON Schema: what is converted, what is refused by its path, what is closed."""

from __future__ import annotations

from typing import Any

import pytest

from server.errors import InvalidArgument
from server.grammar.schema import enforceable
from server.grammar.schema_dialects import JSON_PARAMETERS, JSON_SCHEMA, OPENAPI, PARAMETERS, SchemaDialect
from server.wire.json_schema import MAX_NESTING


def openapi_schema(schema: Any, field: str) -> dict[str, Any]:
    return enforceable(schema, field, OPENAPI).document


def json_schema(schema: Any, field: str) -> dict[str, Any]:
    return enforceable(schema, field, JSON_SCHEMA).document


def relaxed_schema(schema: Any) -> dict[str, Any]:
    return enforceable(schema, "parameters", PARAMETERS).document


S = {"type": "string"}
FROM_OPENAPI: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"type": "STRING"}, S),
    ({"type": "String"}, S),
    ({"type": 1}, S),
    ({"type": 7}, {"type": "null"}),
    ({"type": 0}, {}),
    ({"type": "TYPE_UNSPECIFIED"}, {}),
    ({"type": "STRING", "min_length": "3", "maxLength": 4.0}, {**S, "minLength": 3, "maxLength": 4}),
    ({"type": "STRING", "minLength": None}, S),
    ({"type": "STRING", "format": "enum", "enum": ["a", "b"]}, {**S, "enum": ["a", "b"]}),
    ({"type": "STRING", "format": "date-time"}, {**S, "format": "date-time"}),
    ({"type": "STRING", "format": "made-up"}, S),
    ({"type": "INTEGER", "format": "int32"}, {"type": "integer"}),
    ({"type": "INTEGER", "enum": ["1", "2"]}, {"type": "integer", "enum": [1, 2]}),
    ({"type": "NUMBER", "minimum": "0.5", "maximum": 2}, {"type": "number", "minimum": 0.5, "maximum": 2}),
    ({"type": "STRING", "nullable": True}, {"anyOf": [S, {"type": "null"}]}),
    ({"type": "STRING", "nullable": False}, S),
    ({"enum": ["a"], "nullable": True}, {"anyOf": [{"enum": ["a"]}, {"type": "null"}]}),
    ({"any_of": [S], "nullable": True}, {"anyOf": [{"anyOf": [S]}, {"type": "null"}]}),
    ({"type": "STRING", "title": "t", "description": "d", "default": 1, "example": {"not": {}}}, S),
    ({"items": {"type": "STRING"}, "max_items": "2"}, {"type": "array", "items": S, "maxItems": 2}),
    (
        {"properties": {"a": {"type": "STRING"}}},
        {"type": "object", "properties": {"a": S}, "additionalProperties": False},
    ),
    ({"type": "OBJECT"}, {"type": "object"}),
    (
        {"type": "OBJECT", "additional_properties": {"type": "STRING"}},
        {"type": "object", "additionalProperties": S},
    ),
    ({"type": "OBJECT", "minProperties": 1, "required": ["a"]}, {"type": "object", "required": ["a"]}),
    (
        {"$defs": {"A": {"type": "STRING"}}, "$ref": "#/$defs/A"},
        {"$ref": "#/$defs/A", "$defs": {"A": S}},
    ),
    (
        {"defs": {"A": {"type": "STRING"}}, "items": {"ref": "#/$defs/A"}},
        {"items": {"$ref": "#/$defs/A"}, "type": "array", "$defs": {"A": S}},
    ),
]
FROM_JSON: list[tuple[Any, dict[str, Any]]] = [
    (True, {}),
    ({"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "urn:x", "type": "string"}, S),
    ({"type": "STRING"}, S),
    ({"type": "string", "nullable": True}, S),
    ({"type": ["string", "null"]}, {"type": ["string", "null"]}),
    ({"type": "string", "x-guidance": {"lenient": True}, "unknown": {"not": {}}, "examples": ["x"]}, S),
    ({"type": "string", "format": "uuid"}, {**S, "format": "uuid"}),
    ({"type": "string", "format": "idn-email"}, S),
    ({"const": None}, {"const": None}),
    ({"exclusiveMinimum": True, "minimum": 1}, {"exclusiveMinimum": 1}),
    ({"exclusiveMinimum": False, "minimum": 1}, {"minimum": 1}),
    ({"items": [S, False], "additionalItems": False}, {"prefixItems": [S, False], "items": False}),
    ({"type": "array", "uniqueItems": False, "unevaluatedItems": True}, {"type": "array"}),
    ({"type": "object", "propertyNames": {"type": "string"}}, {"type": "object"}),
    ({"$ref": "#/definitions/a~1b", "definitions": {"a/b": S}}, {"$ref": "#/$defs/a_1b", "$defs": {"a_1b": S}}),
    ({"$defs": {"unused": {"not": {}}}, "type": "string"}, S),
]


@pytest.mark.parametrize(("schema", "expected"), FROM_OPENAPI)
def test_openapi_is_converted(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    assert openapi_schema(schema, "f") == expected


@pytest.mark.parametrize(("schema", "expected"), FROM_JSON)
def test_json_schema_is_cleaned(schema: Any, expected: dict[str, Any]) -> None:
    assert json_schema(schema, "f") == expected


def test_names_of_properties_are_never_changed() -> None:
    names = ["property_ordering", "minLength", "any_of", "$ref", "type"]
    properties = {name: {"type": "STRING"} for name in names}
    converted = openapi_schema({"type": "OBJECT", "properties": properties}, "f")
    assert list(converted["properties"]) == names


@pytest.mark.parametrize("convert", [openapi_schema, json_schema, lambda schema, _: relaxed_schema(schema)])
@pytest.mark.parametrize("order", [["c", "a"], ["c", "a", "b"]])
def test_the_order_of_properties(convert: Any, order: list[str]) -> None:
    schema = {"type": "object", "properties": {"a": S, "b": S, "c": S}, "propertyOrdering": order}
    assert list(convert(schema, "f")["properties"]) == ["c", "a", "b"]


UNENFORCED: list[tuple[SchemaDialect, Any, dict[str, bool]]] = [
    (JSON_SCHEMA, {"uniqueItems": True}, {".uniqueItems": True}),
    (JSON_SCHEMA, {"unevaluatedProperties": False}, {".unevaluatedProperties": True}),
    (JSON_SCHEMA, {"propertyNames": {"maxLength": 3}}, {".propertyNames": True}),
    (JSON_SCHEMA, {"properties": {"a": {"items": {"not": S}}}}, {".properties.a.items.not": True}),
    (JSON_SCHEMA, {"if": {}, "then": {}, "else": {}}, {".if": True, ".then": True, ".else": True}),
    (JSON_SCHEMA, {"contains": S, "minContains": 2}, {".contains": True, ".minContains": True}),
    (JSON_SCHEMA, {"dependentRequired": {"a": ["b"]}}, {".dependentRequired": True}),
    (
        JSON_SCHEMA,
        {"dependentSchemas": {"a": S}, "dependencies": {"a": S}},
        {".dependentSchemas": True, ".dependencies": True},
    ),
    (JSON_SCHEMA, {"minProperties": 2, "required": ["a"]}, {".minProperties": True}),
    (JSON_SCHEMA, {"$defs": {"A": {"not": S}}, "items": {"$ref": "#/$defs/A"}}, {".$defs.A.not": True}),
    (JSON_SCHEMA, {"definitions": {"A": {"not": S}}, "$ref": "#/definitions/A"}, {".definitions.A.not": True}),
    (JSON_SCHEMA, {"properties": {"a, b\n": {"not": S}}}, {'.properties["a, b\\n"].not': True}),
    (JSON_SCHEMA, {"$dynamicRef": "#x", "$recursiveRef": "#"}, {".$dynamicRef": False, ".$recursiveRef": False}),
    (JSON_SCHEMA, {"properties": {"a": {"$id": "x"}}}, {".properties.a.$id": False}),
    (JSON_SCHEMA, {"format": "idn-email"}, {".format": False}),
    (JSON_SCHEMA, {"format": "int32", "uniqueItems": False, "propertyNames": {"type": "string"}}, {}),
    (JSON_SCHEMA, {"pattern": "a{9999}"}, {".pattern": True}),
    (
        OPENAPI,
        {"type": "ARRAY", "unique_items": True, "items": {"any_of": [S], "not": {}}},
        {".unique_items": True, ".items.not": True},
    ),
    (OPENAPI, {"type": "STRING", "nullable": True, "not": {}}, {".not": True}),
    (OPENAPI, {"oneOf": [S, {"type": "INTEGER"}]}, {}),
    (
        PARAMETERS,
        {"properties": {"a": {"minLength": -1, "not": S}, "b": 7}},
        {".properties.a.minLength": False, ".properties.a.not": True, ".properties.b": False},
    ),
    (PARAMETERS, {"$ref": "https://example.com/x"}, {".$ref": False}),
    (PARAMETERS, {"type": "STRING"}, {"": False}),
    (JSON_PARAMETERS, {"properties": {"a": {"$ref": "#/nowhere"}}}, {".properties.a.$ref": False}),
]


@pytest.mark.parametrize(("dialect", "schema", "unenforced"), UNENFORCED)
def test_what_cannot_be_enforced_is_named_by_its_path(
    dialect: SchemaDialect, schema: Any, unenforced: dict[str, bool]
) -> None:
    assert enforceable(schema, "f", dialect).unenforced == unenforced


@pytest.mark.parametrize("read", [openapi_schema, lambda schema, _: relaxed_schema(schema)])
def test_one_of_is_any_of_where_sdks_write_unions_with_it(read: Any) -> None:
    union = {"oneOf": [S, {"type": "INTEGER"}]}
    found = read({"type": "OBJECT", "properties": {"a": {"type": "ARRAY", "items": union}}}, "f")
    assert found["properties"]["a"]["items"] == {"anyOf": [S, {"type": "integer"}]}
    both = read({"type": "OBJECT", "properties": {"a": {**union, "anyOf": [S]}}}, "f")
    assert both["properties"]["a"] == {"anyOf": [S], "allOf": [{"anyOf": [S, {"type": "integer"}]}]}
    assert "oneOf" in json_schema(union, "f")


@pytest.mark.parametrize(
    "conditional",
    [
        {"if": {"required": ["a"]}, "then": {"properties": {"b": S}, "required": ["c"]}},
        {"if": {"required": ["a"]}, "else": {"anyOf": [{"required": ["b"]}, {"required": ["c"]}]}},
        {"dependentSchemas": {"a": {"properties": {"b": S, "c": S}}}},
        {"dependentRequired": {"a": ["b", "c"]}},
        {"dependencies": {"a": ["b"], "b": {"required": ["c"]}}},
    ],
)
def test_a_closed_object_may_have_what_a_condition_asks_for(conditional: dict[str, Any]) -> None:
    found = json_schema({"type": "object", "properties": {"a": S}, **conditional}, "f")
    assert found["properties"] == {"a": S, "b": {}, "c": {}}
    assert found["additionalProperties"] is False


REFUSED = [
    (json_schema, False, "f"),
    (json_schema, [], "f"),
    (json_schema, {"type": "text"}, "f.type"),
    (json_schema, {"type": []}, "f.type"),
    (json_schema, {"type": True}, "f.type"),
    (json_schema, {"enum": []}, "f.enum"),
    (json_schema, {"minLength": -1}, "f.minLength"),
    (json_schema, {"minLength": "x"}, "f.minLength"),
    (json_schema, {"multipleOf": 0}, "f.multipleOf"),
    (json_schema, {"pattern": 3}, "f.pattern"),
    (json_schema, {"required": "a"}, "f.required"),
    (json_schema, {"properties": []}, "f.properties"),
    (json_schema, {"properties": {"a": 3}}, "f.properties.a"),
    (json_schema, {"anyOf": []}, "f.anyOf"),
    (json_schema, {"anyOf": [{}, 1]}, "f.anyOf[1]"),
    (json_schema, {"propertyOrdering": ["b"], "properties": {"a": S}}, "f.propertyOrdering"),
    (json_schema, {"$ref": "#/$defs/x"}, "f.$ref"),
    (json_schema, {"$ref": "https://example.com/x"}, "f.$ref"),
    (json_schema, {"$ref": "file:///etc/passwd"}, "f.$ref"),
    (json_schema, {"$ref": "#name"}, "f.$ref"),
    (openapi_schema, {"items": {"maximumLength": 1}}, "f.items"),
    (json_schema, {"not": {"type": "text"}}, "f.not.type"),
    (json_schema, {"uniqueItems": "yes"}, "f.uniqueItems"),
    (json_schema, {"dependentRequired": {"a": "b"}}, "f.dependentRequired"),
    (json_schema, {"if": {"properties": {"a": {"$ref": "#/$defs/x"}}}}, "f.if.properties.a.$ref"),
    (openapi_schema, {"items": True}, "f.items"),
    (openapi_schema, {"type": 8}, "f.type"),
    (openapi_schema, {"nullable": "yes"}, "f.nullable"),
    (openapi_schema, {"anyOf": [S], "any_of": [S]}, "f.any_of"),
    (openapi_schema, {"type": "INTEGER", "enum": ["one"]}, "f.enum"),
]


@pytest.mark.parametrize(("convert", "schema", "path"), REFUSED)
def test_refusals_name_the_place(convert: Any, schema: Any, path: str) -> None:
    assert refused(convert, schema) == path


def test_an_unknown_keyword_of_a_schema_message_is_an_unknown_name() -> None:
    with pytest.raises(InvalidArgument) as caught:
        openapi_schema({"items": {"foo": 1}}, "generation_config.response_schema")
    place = "generation_config.response_schema.items"
    assert caught.value.message == (
        f"Invalid JSON payload received. Unknown name \"foo\" at '{place}': Cannot find field."
    )


def test_every_problem_is_named() -> None:
    with pytest.raises(InvalidArgument) as caught:
        json_schema({"properties": {"a": {"not": 1}, "b": {"uniqueItems": 1}, "c": {"minLength": []}}}, "f")
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["f.properties.a.not", "f.properties.b.uniqueItems", "f.properties.c.minLength"]


ENDLESS = [
    {"$ref": "#"},
    {"$ref": "#/$defs/n", "$defs": {"n": {"required": ["c"], "type": "object", "properties": {"c": {"$ref": "#"}}}}},
    {"type": "array", "minItems": 1, "items": {"$ref": "#"}},
    {"anyOf": [{"allOf": [{"$ref": "#"}]}]},
]
FINITE = [
    {"type": ["object", "null"], "required": ["c"], "properties": {"c": {"$ref": "#"}}},
    {"type": "object", "required": ["c"], "properties": {"c": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
    {"type": "array", "items": {"$ref": "#"}},
]


@pytest.mark.parametrize("schema", ENDLESS)
def test_a_schema_that_only_endless_values_match_is_refused(schema: dict[str, Any]) -> None:
    assert refused(json_schema, schema) == "f"


@pytest.mark.parametrize("schema", FINITE)
def test_recursion_that_can_end_is_fine(schema: dict[str, Any]) -> None:
    assert json_schema(schema, "f")["$defs"]


def test_too_deep_and_too_large() -> None:
    deep: dict[str, Any] = S
    for _ in range(MAX_NESTING):
        deep = {"items": deep}
    chain = {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(500)} | {"d500": S}
    for schema in (deep, {"$defs": chain, "$ref": "#/$defs/d0"}, {"enum": list(range(30_000))}, {"const": "x" * 10**6}):
        assert refused(json_schema, schema) == "f"


PLAIN = {"type": "object", "properties": {"a": S}, "required": ["a"]}
TAGGED = [
    {"type": "object", "properties": {"kind": {"const": kind}, "v": S}, "required": ["kind"]} for kind in ("x", "y")
]
OPEN = [
    {"type": "object", "properties": {}},
    {**PLAIN, "additionalProperties": True},
    {**PLAIN, "additionalProperties": S},
    {**PLAIN, "patternProperties": {"^x": S}},
    {**PLAIN, "required": ["a", "b"]},
    {"allOf": [PLAIN, {"type": "object", "properties": {"b": S}}]},
    {**PLAIN, "anyOf": [{"required": ["a"]}, {"properties": {"b": S}}]},
    {"oneOf": [PLAIN, {**PLAIN, "properties": {"a": S, "b": S}}]},
]


@pytest.mark.parametrize("schema", OPEN)
def test_objects_stay_open_where_closing_would_change_the_meaning(schema: dict[str, Any]) -> None:
    assert '"additionalProperties": False' not in repr(json_schema(schema, "f")).replace("'", '"')


@pytest.mark.parametrize("schema", [PLAIN, {"items": PLAIN}, {"anyOf": [PLAIN, S]}, {"allOf": [PLAIN]}, *TAGGED])
def test_objects_that_declare_properties_are_closed(schema: dict[str, Any]) -> None:
    assert "'additionalProperties': False" in repr(json_schema(schema, "f"))


def test_branches_with_a_discriminator_are_closed() -> None:
    converted = json_schema({"oneOf": [{"$ref": "#/$defs/x"}, TAGGED[1]], "$defs": {"x": TAGGED[0]}}, "f")
    assert converted["oneOf"][1]["additionalProperties"] is False
    assert converted["$defs"]["x"]["additionalProperties"] is False


RELAXED = [
    ({}, {"type": "object"}),
    (None, {"type": "object"}),
    ([], {"type": "object"}),
    (False, {"type": "object"}),
    ({"type": "STRING"}, {"type": "object"}),
    ({"$ref": "#"}, {"type": "object"}),
    (
        {"type": "OBJECT", "properties": {"a": {"type": "ARRAY", "uniqueItems": True, "min_items": "1", "foo": 1}}},
        {"type": "object", "properties": {"a": {"type": "array", "minItems": 1}}, "additionalProperties": False},
    ),
    (
        {"properties": {"a": {"oneOf": [{"type": "number"}, {"type": "integer"}], "not": {}}}},
        {
            "type": "object",
            "properties": {"a": {"anyOf": [{"type": "number"}, {"type": "integer"}]}},
            "additionalProperties": False,
        },
    ),
    (
        {"properties": {"a": {"type": "bogus", "maxLength": -1}, "b": {"$ref": "#/nowhere"}, "c": 7}},
        {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "additionalProperties": False},
    ),
]


@pytest.mark.parametrize(("schema", "expected"), RELAXED)
def test_parameters_of_functions_are_relaxed_and_never_refused(schema: Any, expected: dict[str, Any]) -> None:
    assert relaxed_schema(schema) == expected


def refused(convert: Any, schema: Any) -> str:
    """The path of the first problem."""
    with pytest.raises(InvalidArgument) as caught:
        convert(schema, "f")
    field: str = caught.value.violations[0].field
    return field
