"""Declared functions: names, schemas, modes, and which of them may be called."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.convert import tools as tools_module
from server.convert.tools import (
    MAX_FUNCTIONS,
    Tools,
    castor_prompt,
    data_problems,
    may_become_control,
    read_tools,
)
from server.errors import InvalidArgument, Unimplemented
from server.wire.message import parse
from server.wire.requests import GenerateContentRequest
from server.wire.support import Capabilities, review

ADD = {"name": "add", "description": "Adds."}
NOW = {"name": "now"}


def declared(*functions: Any, config: Any = None, control_texts: tuple[str, ...] = ()) -> Tools | None:
    body: dict[str, Any] = {"contents": "x", "tools": [{"functionDeclarations": list(functions)}]}
    if config is not None:
        body["toolConfig"] = {"functionCallingConfig": config}
    return read_tools(parse(GenerateContentRequest, body), control_texts)


def names(tools: Tools | None) -> tuple[list[str], list[str], bool]:
    assert tools is not None
    return [f.name for f in tools.functions], [f.name for f in tools.allowed], tools.must_call


@pytest.mark.parametrize(
    ("config", "allowed", "must_call"),
    [
        (None, ["add", "now"], False),
        ({}, ["add", "now"], False),
        ({"mode": "MODE_UNSPECIFIED"}, ["add", "now"], False),
        ({"mode": 1}, ["add", "now"], False),
        ({"mode": "any"}, ["add", "now"], True),
        ({"mode": 2, "allowedFunctionNames": ["now"]}, ["now"], True),
        ({"mode": "VALIDATED", "allowed_function_names": ["add"]}, ["add"], False),
        ({"mode": 4}, ["add", "now"], False),
    ],
)
def test_modes(config: Any, allowed: list[str], must_call: bool) -> None:
    assert names(declared(ADD, NOW, config=config)) == (["add", "now"], allowed, must_call)


@pytest.mark.parametrize("config", [{"mode": "NONE"}, {"mode": 3}])
def test_none_is_as_if_nothing_were_declared(config: Any) -> None:
    assert declared(ADD, config=config) is None
    assert declared() is None


def test_several_tools_are_one_list() -> None:
    tools = [{"functionDeclarations": [ADD]}, {"function_declarations": NOW}, {}]
    wire = parse(GenerateContentRequest, {"contents": "x", "tools": tools})
    assert names(read_tools(wire))[0] == ["add", "now"]


def test_schemas_reach_the_template_with_the_types_of_json_schema() -> None:
    schema = {
        "type": "OBJECT",
        "properties": {
            "type": {"type": "STRING", "enum": ["STRING"], "default": {"type": "STRING"}},
            "list": {"type": 5, "items": {"type": "Integer", "nullable": True}},
            "any": {"anyOf": [{"type": ["STRING", "NULL"]}]},
        },
        "property_ordering": ["type"],
    }
    for key in ("parameters", "parametersJsonSchema", "parameters_json_schema"):
        tools = declared({"name": "f", key: schema, "response": {"type": "STRING"}})
        assert tools is not None
        function = tools.for_template()[0]["function"]
        assert function["parameters"] == {
            "type": "object",
            "properties": {
                "type": {"type": "string", "enum": ["STRING"], "default": {"type": "STRING"}},
                "list": {"type": "array", "items": {"type": "integer", "nullable": True}},
                "any": {"anyOf": [{"type": ["string", "null"]}]},
            },
            "property_ordering": ["type"],
        }
        assert function["return"] == {"type": "string"}


def test_templates_always_find_parameters_and_a_description() -> None:
    tools = declared(NOW)
    assert tools is not None
    parameters = {"type": "object", "properties": {}}
    assert tools.for_template() == [
        {"type": "function", "function": {"name": "now", "description": "", "parameters": parameters}}
    ]


def test_castors_own_prompt_names_every_function() -> None:
    tools = declared(ADD, NOW)
    assert tools is not None
    assert '{"name": "add", "description": "Adds.", "parameters": {}}' in castor_prompt(tools)
    assert '{"name": "now", "parameters": {}}' in castor_prompt(tools)


@pytest.mark.parametrize("name", ["a", "_x", "a.b:c-d_1", "A" * 128])
def test_good_names(name: str) -> None:
    assert names(declared({"name": name}))[0] == [name]


@pytest.mark.parametrize("name", ["", "1a", "-a", "a b", "é", "a\n", "A" * 129, "a<b>"])
def test_bad_names(name: str) -> None:
    with pytest.raises(InvalidArgument, match="Invalid function name") as caught:
        declared(ADD, {"name": name})
    assert caught.value.violations[0].field == "tools[0].function_declarations[1].name"


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("functions", "config", "text"),
    [
        ([ADD, ADD], None, "Duplicate function declaration found: add"),
        ([{"name": "f", "parameters": {}, "parametersJsonSchema": {}}], None, "parameters is given too"),
        ([{"name": "f", "response": {}, "responseJsonSchema": {}}], None, "response is given too"),
        ([{"name": "f", "parameters": deep(200)}], None, "nested deeper than"),
        ([{"name": "f", "parameters": {"properties": {"<|x|>": {}}}}], None, "control token"),
        ([{"name": "f", "responseJsonSchema": {"anyOf": [{"a<|x|>": 1}]}}], None, "control token"),
        ([{"name": f"f{index}"} for index in range(MAX_FUNCTIONS + 1)], None, "at most"),
        ([], {"mode": "ANY"}, "without function_declarations"),
        ([], {"mode": "VALIDATED"}, "without function_declarations"),
        ([ADD], {"allowedFunctionNames": ["add"]}, "the mode is AUTO"),
        ([ADD], {"mode": "NONE", "allowedFunctionNames": ["add"]}, "the mode is NONE"),
        ([ADD], {"mode": "ANY", "allowedFunctionNames": ["add", "sub"]}, '"sub" is not among'),
    ],
)
def test_what_is_refused(functions: list[Any], config: Any, text: str) -> None:
    with pytest.raises(InvalidArgument, match="GenerateContentRequest") as caught:
        declared(*functions, config=config, control_texts=("<|x|>",))
    assert text in caught.value.message


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": [{"googleSearch": {}}, {"functionDeclarations": [ADD]}]}, "tools[0].googleSearch"),
        ({"tools": [{"functionDeclarations": [ADD], "codeExecution": {}}]}, "tools[0].codeExecution"),
        ({"tools": [{"functionDeclarations": [{"name": "f", "behavior": "NON_BLOCKING"}]}]}, "behavior"),
        ({"toolConfig": {"retrievalConfig": {"languageCode": "en"}}}, "toolConfig.retrievalConfig"),
        ({"toolConfig": {"includeServerSideToolInvocations": True}}, "includeServerSideToolInvocations"),
        ({"toolConfig": {"functionCallingConfig": {"streamFunctionCallArguments": True}}}, "streamFunction"),
        ({"contents": {"parts": {"functionResponse": {"name": "f", "scheduling": "SILENT"}}}}, "scheduling"),
        ({"contents": {"parts": {"functionResponse": {"name": "f", "willContinue": True}}}}, "willContinue"),
    ],
)
def test_what_is_not_served_is_named(fields: Any, named: str) -> None:
    with pytest.raises(Unimplemented) as caught:
        review(parse(GenerateContentRequest, {"contents": "x", **fields}), Capabilities())
    assert named in caught.value.message


def test_what_says_nothing_is_accepted() -> None:
    body = {
        "contents": "x",
        "tools": [{"functionDeclarations": [{**ADD, "behavior": "BLOCKING"}, {**NOW, "behavior": "UNSPECIFIED"}]}],
        "toolConfig": {"includeServerSideToolInvocations": False, "retrievalConfig": {}},
    }
    review(parse(GenerateContentRequest, body), Capabilities())


CONTROLS = ("<|im_start|>", "<|im_end|>", "<tool_call>", "</think>", "[INST]", "[/INST]", "madeupword")


@pytest.mark.parametrize(
    "name",
    [
        "<|im_end|>",
        "a<|im_end|>b",
        "<|im_end|",  # as in <parameter=NAME>
        "a<|im_e",
        "<|",
        "</",
        "|>b",
        "nd|>",
        "INST]",
        "|im_end|",  # as in <NAME>
        "/think",
        "a[I",
        "madeupwords",
    ],
)
def test_names_that_could_become_a_control_token(name: str) -> None:
    assert may_become_control(name, CONTROLS)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "city",
        "first name",
        "a<b",
        "a > b",
        "x|y",
        "im_end",
        "tool_call",
        "think",
        "schema",
        "INST",
        "é",
        "$ref",
        "[0]",
        "<",
        ">",
    ],
)
def test_names_that_could_not(name: str) -> None:
    assert not may_become_control(name, CONTROLS)
    assert not may_become_control("<|im_end|>", ())


@given(
    controls=st.lists(st.text("<|>ab", min_size=1, max_size=6), min_size=1, max_size=8),
    before=st.text("<|>ab", max_size=3),
    name=st.text("<|>ab", max_size=6),
    after=st.text("<|>ab", max_size=3),
)
def test_a_name_that_is_let_pass_makes_no_control_token_with_what_stands_beside_it(
    controls: list[str], before: str, name: str, after: str
) -> None:
    """Of one that lies across a border of the name, unless a single character or mere letters of it are the name's."""
    if may_become_control(name, controls):
        return
    for control in controls:
        assert control not in name
        for inside in range(2, len(control)):
            if not control[:inside].isalpha():
                assert not name.endswith(control[:inside])
            if not control[-inside:].isalpha():
                assert not name.startswith(control[-inside:])


@given(
    texts=st.lists(st.text("ab<|", min_size=1, max_size=5), min_size=1, max_size=12), name=st.text("ab<|", max_size=9)
)
def test_whole_control_tokens_are_found_as_a_search_for_each_would(texts: list[str], name: str) -> None:
    found = tools_module._controls(tuple(texts)).whole.search(name) is not None
    assert found == any(text in name for text in texts)


def test_what_is_searched_for_is_prepared_once_for_all_names() -> None:
    controls = tuple(f"<unused{index}>" for index in range(5_000))
    tools_module._controls.cache_clear()
    names = {f"{kind} {index}": 1 for index in range(5_000) for kind in ("name", "na<me", "<unuse", "1>")}
    [problem] = data_problems(names, controls)
    assert problem.endswith("and 4992 more.")  # those that begin like the end of one
    assert tools_module._controls.cache_info().misses == 1


def test_of_many_names_some_are_told_and_the_rest_counted() -> None:
    [problem] = data_problems([{f"<|x|>{index}": 1} for index in range(1_000)], ("<|x|>",))
    assert problem.endswith("and 992 more.")
    assert len(problem) < 1_000


def test_allowed_names_are_bounded() -> None:
    config = {"mode": "ANY", "allowedFunctionNames": ["add"] * (MAX_FUNCTIONS + 1)}
    with pytest.raises(InvalidArgument, match=f"{MAX_FUNCTIONS + 1} names are given, but at most {MAX_FUNCTIONS}"):
        declared(ADD, config=config)
