"""A caller's schema as grammars can enforce it, and the paths of what they cannot: that is checked afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from server.errors import InvalidArgument
from server.grammar.regex_cost import costly
from server.grammar.schema_closure import Schema, check_depth, close_objects, has_no_finite_value
from server.grammar.schema_dialects import SchemaDialect
from server.grammar.schema_reader import SchemaReader, as_any_of, step
from server.wire.json_schema import check_size
from server.wire.support import joined


@dataclass(slots=True)
class EnforceableSchema:
    """``document`` is JSON Schema of which all can be enforced, as far as is known before it is compiled.

    ``unenforced`` are the paths of what the caller's schema has beyond that, each with whether the finished answer can
    be checked for it.
    """

    document: Schema
    unenforced: dict[str, bool] = field(default_factory=dict)
    paths: dict[int, str] = field(default_factory=dict)
    """Of each schema within the document, by its ``id``."""

    def drop(self, schema: Schema, keyword: str) -> None:
        """Leave a keyword of one of the document's schemas to the check."""
        if keyword == "oneOf":
            as_any_of(schema)
        else:
            del schema[keyword]
        self.unenforced[self.place(schema) + step(keyword)] = True

    def place(self, schema: Schema) -> str:
        """The path of one of the document's schemas; that of the whole for one which the caller did not write."""
        return self.paths.get(id(schema), "")


def enforceable(schema: Any, field: str, dialect: SchemaDialect) -> EnforceableSchema:
    """Annotations and unknown keywords are left out. ``field`` is the path of the schema in the request; paths of what
    cannot be enforced count from there.

    Raises ``InvalidArgument`` with the path of each problem; a relaxed dialect never does: it leaves out what is wrong,
    and the result is always an object's schema.
    """
    try:
        return _strictly_read(schema, field, dialect)
    except InvalidArgument:
        if not dialect.relaxed:
            raise
        return EnforceableSchema({"type": "object"}, {"": False})


def complete(schema: Any, dialect: SchemaDialect) -> tuple[Schema, list[tuple[Schema, str]]]:
    """The whole of a schema that was read before, as JSON Schema of draft 2020-12, and all schemas in it with their
    paths."""
    reader = SchemaReader(schema, "", dialect, complete=True)
    return reader.document(), reader.schemas


def _strictly_read(schema: Any, field: str, dialect: SchemaDialect) -> EnforceableSchema:
    check_size(schema, field)
    reader, whole = SchemaReader(schema, field, dialect), SchemaReader(schema, field, dialect, complete=True)
    document = close_objects(reader.document())
    whole.document()
    if whole.problems and not dialect.relaxed:
        raise joined(whole.problems)
    check_depth(document, field)
    if has_no_finite_value(document):
        raise InvalidArgument.at(field, f"{field}: no finite value can match this schema")
    if dialect.relaxed:
        if document.setdefault("type", "object") != "object":
            raise InvalidArgument.at(field, f"{field}: must be the schema of an object")
        reader.unenforced |= {problem.field: False for problem in whole.problems}
    unenforced = {path.removeprefix(field): checked for path, checked in reader.unenforced.items()}
    paths = {id(inner): path.removeprefix(field) for inner, path in reader.schemas}
    found = EnforceableSchema(document, unenforced, paths)
    while too_much := costly(document):
        for inner, keyword in too_much:
            found.drop(inner, keyword)
    return found
