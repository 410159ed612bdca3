"""Random JSON schemas whose answers are short enough to end, by a hypothesis strategy."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]

NAMES = ["a", "b", "name", "größe", "x y"]
FORMATS = ["date", "time", "date-time", "uuid", "ipv4"]


def schemas() -> st.SearchStrategy[Schema]:
    """Schemas of every type, nested, over the keywords that constrain."""
    return st.recursive(_leaves(), _nodes, max_leaves=5)


def _leaves() -> st.SearchStrategy[Schema]:
    bounds = st.tuples(st.integers(-99, 999), st.integers(0, 500)).map(lambda pair: (pair[0], sum(pair)))
    lengths = st.tuples(st.integers(0, 3), st.integers(0, 6)).map(lambda pair: (pair[0], sum(pair)))
    values = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.sampled_from(["", "red", 'a"b', "é\n"]))
    return st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        bounds.map(lambda b: {"type": "integer", "minimum": b[0], "maximum": b[1]}),
        bounds.map(lambda b: {"type": "integer", "exclusiveMinimum": b[0] - 1, "exclusiveMaximum": b[1] + 1}),
        lengths.map(lambda b: {"type": "string", "minLength": b[0], "maxLength": b[1]}),
        st.sampled_from(["^[a-z]{1,3}$", "^(yes|no)$", "^[0-9]{2}-[A-F]?$"]).map(
            lambda pattern: {"type": "string", "pattern": pattern}
        ),
        st.sampled_from(FORMATS).map(lambda name: {"type": "string", "format": name}),
        st.lists(values, min_size=1, max_size=3).map(lambda enum: {"enum": enum}),
        values.map(lambda value: {"const": value}),
    )


def _nodes(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    arrays = st.builds(
        lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )
    return st.one_of(arrays, _objects(inner), st.lists(inner, min_size=1, max_size=3).map(lambda any_: {"anyOf": any_}))


@st.composite
def _objects(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    properties = draw(st.dictionaries(st.sampled_from(NAMES), inner, max_size=3))
    required = draw(st.sets(st.sampled_from(sorted(properties)))) if properties else set()
    return {
        "type": "object",
        "properties": properties,
        "required": sorted(required),
        "additionalProperties": False,
    }
