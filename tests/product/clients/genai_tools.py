"""Function calling with the google-genai SDK installed in this interpreter: `python genai_tools.py BASE_URL`.

The built-in model is too small to call wisely: the checks look at what is called and what comes back, not at what it
says about it.
Annotations are real types here, because SDK 1.60 does not resolve those of a function that are strings.
"""

import asyncio
import sys

from checks import MODEL, report
from google import genai
from google.genai import types

QUESTION = "What is 12 + 30?"
RESULT = "the sum is 4711"


def add(a: int, b: int) -> str:
    """Adds two numbers."""
    assert isinstance(a, int)
    assert isinstance(b, int)
    return RESULT


def current_time() -> str:
    """Tells the current time."""
    return RESULT


def config(mode: str = "ANY", allowed: list[str] | None = None, **settings: object) -> types.GenerateContentConfig:
    calling = types.FunctionCallingConfig(mode=mode, allowed_function_names=allowed)
    return types.GenerateContentConfig(
        tools=[add, current_time],
        tool_config=types.ToolConfig(function_calling_config=calling),
        automatic_function_calling=types.AutomaticFunctionCallingConfig(maximum_remote_calls=2),
        temperature=0.0,
        max_output_tokens=64,
        **settings,
    )


def assert_looped(history: list[types.Content], name: str) -> None:
    """The function was called, and the next request held what it returned."""
    parts = [part for content in history for part in content.parts]
    calls = [part.function_call for part in parts if part.function_call]
    responses = [part.function_response for part in parts if part.function_response]
    assert calls, history
    assert responses, history
    assert {call.name for call in calls} == {name}
    assert all(call.id and call.args is not None for call in calls)
    assert responses[0].response == {"result": RESULT}


def check_sync(client: genai.Client) -> None:
    answer = client.models.generate_content(model=MODEL, contents=QUESTION, config=config(allowed=["add"]))
    assert_looped(answer.automatic_function_calling_history, "add")
    assert answer.usage_metadata.prompt_token_count > 0


def check_a_function_without_arguments(client: genai.Client) -> None:
    answer = client.models.generate_content(model=MODEL, contents="Time?", config=config(allowed=["current_time"]))
    assert_looped(answer.automatic_function_calling_history, "current_time")


def check_stream(client: genai.Client) -> None:
    history: list[types.Content] = []
    stream = client.models.generate_content_stream(model=MODEL, contents=QUESTION, config=config(allowed=["add"]))
    for chunk in stream:
        history = chunk.automatic_function_calling_history or history
    assert_looped(history, "add")


async def _async_loops(client: genai.Client) -> None:
    settings = config(allowed=["add"])
    answer = await client.aio.models.generate_content(model=MODEL, contents=QUESTION, config=settings)
    assert_looped(answer.automatic_function_calling_history, "add")
    history: list[types.Content] = []
    stream = await client.aio.models.generate_content_stream(model=MODEL, contents=QUESTION, config=settings)
    async for chunk in stream:
        history = chunk.automatic_function_calling_history or history
    assert_looped(history, "add")


def check_async(client: genai.Client) -> None:
    asyncio.run(_async_loops(client))


def check_auto_answers_in_words_or_calls(client: genai.Client) -> None:
    answer = client.models.generate_content(
        model=MODEL, contents="What is the capital of France?", config=config("AUTO")
    )
    assert answer.text or answer.function_calls
    assert "tool_call" not in (answer.text or "")


def check_none_never_calls(client: genai.Client) -> None:
    answer = client.models.generate_content(
        model=MODEL, contents="What is the capital of France?", config=config("NONE")
    )
    assert not answer.function_calls
    assert "Paris" in answer.text


def check_a_result_is_in_the_context(client: genai.Client) -> None:
    """The loop by hand: the prompt grows by the call and what came of it, and the answer is free again."""
    manual = config(allowed=["add"])
    manual.automatic_function_calling.disable = True
    manual.automatic_function_calling.maximum_remote_calls = None
    first = client.models.generate_content(model=MODEL, contents=QUESTION, config=manual)
    call = first.function_calls[0]
    result = types.Part.from_function_response(name=call.name, response={"result": RESULT})
    contents = [
        types.Content(role="user", parts=[types.Part(text=QUESTION)]),
        first.candidates[0].content,
        types.Content(role="user", parts=[result]),
    ]
    free = config("AUTO")
    free.automatic_function_calling = manual.automatic_function_calling
    second = client.models.generate_content(model=MODEL, contents=contents, config=free)
    assert second.usage_metadata.prompt_token_count > first.usage_metadata.prompt_token_count + 20
    assert second.text or second.function_calls


def check_chat(client: genai.Client) -> None:
    chat = client.chats.create(model=MODEL, config=config(allowed=["add"]))
    chat.send_message(QUESTION)
    assert_looped(chat.get_history(), "add")


if __name__ == "__main__":
    options = types.HttpOptions(base_url=sys.argv[1])
    report(genai.__version__, globals().copy(), genai.Client(api_key="any", http_options=options))
