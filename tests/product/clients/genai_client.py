"""Drives a running server with google-genai in this interpreter: `python genai_client.py BASE_URL [SERVICE]`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator

from checks import ENDLESS, MODEL, QUESTION, failure, long_prompt, report
from google import genai
from google.genai import errors, types
from google.oauth2.credentials import Credentials

SERVICES: dict[str, dict[str, object]] = {
    "gemini": {"api_key": "any"},
    "express": {"vertexai": True, "api_key": "any"},
    "project": {"vertexai": True, "project": "p", "location": "us-central1", "credentials": Credentials("any")},
}
"""What the client is made of, by the service that it believes to speak to. Vertex AI lists no models this way."""


def exact(**settings: object) -> types.GenerateContentConfig:
    return types.GenerateContentConfig(**{"temperature": 0.0, "max_output_tokens": 32, **settings})


def check_generate(client: genai.Client) -> None:
    answer = client.models.generate_content(model=MODEL, contents=QUESTION, config=exact())
    assert "Paris" in answer.text, answer.text
    candidate, usage = answer.candidates[0], answer.usage_metadata
    assert candidate.finish_reason == types.FinishReason.STOP
    assert candidate.content.role == "model"
    assert usage.prompt_token_count > 0
    assert usage.candidates_token_count == candidate.token_count > 0
    assert usage.total_token_count == usage.prompt_token_count + usage.candidates_token_count
    assert usage.prompt_tokens_details[0].modality == types.MediaModality.TEXT
    assert answer.model_version == MODEL
    assert answer.response_id


def check_cloud_model_name(client: genai.Client) -> None:
    answer = client.models.generate_content(model="gemini-2.5-flash", contents=QUESTION, config=exact())
    assert "Paris" in answer.text, answer.text
    assert answer.model_version == MODEL


def check_without_config(client: genai.Client) -> None:
    stream = client.models.generate_content_stream(model=MODEL, contents="Tell me a story.")
    first = next(stream)
    assert first.candidates[0].content.role == "model"
    stream.close()


def check_sampling_is_seeded(client: genai.Client) -> None:
    settings = exact(temperature=0.9, top_p=0.9, top_k=40, seed=7, presence_penalty=0.2, frequency_penalty=0.1)
    first = client.models.generate_content(model=MODEL, contents="Tell me a story.", config=settings)
    second = client.models.generate_content(model=MODEL, contents="Tell me a story.", config=settings)
    assert first.text == second.text
    settings.seed = 8
    third = client.models.generate_content(model=MODEL, contents="Tell me a story.", config=settings)
    assert third.text != first.text


def check_candidates(client: genai.Client) -> None:
    settings = exact(temperature=1.0, seed=3, candidate_count=3, max_output_tokens=12)
    answer = client.models.generate_content(model=MODEL, contents="Tell me a story.", config=settings)
    assert [candidate.index or 0 for candidate in answer.candidates] == [0, 1, 2]
    assert len({candidate.content.parts[0].text for candidate in answer.candidates}) > 1
    assert answer.usage_metadata.candidates_token_count == sum(c.token_count for c in answer.candidates)


def check_max_tokens_and_stop(client: genai.Client) -> None:
    answer = client.models.generate_content(
        model=MODEL, contents="Count from one to fifty.", config=exact(max_output_tokens=5)
    )
    assert answer.candidates[0].finish_reason == types.FinishReason.MAX_TOKENS
    assert answer.candidates[0].token_count == 5
    whole = client.models.generate_content(model=MODEL, contents=QUESTION, config=exact()).text
    stopped = client.models.generate_content(model=MODEL, contents=QUESTION, config=exact(stop_sequences=["Paris"]))
    assert stopped.text == whole[: whole.index("Paris")]
    assert stopped.candidates[0].finish_reason == types.FinishReason.STOP


def check_logprobs(client: genai.Client) -> None:
    settings = exact(response_logprobs=True, logprobs=5)
    candidate = client.models.generate_content(model=MODEL, contents=QUESTION, config=settings).candidates[0]
    chosen, top = candidate.logprobs_result.chosen_candidates, candidate.logprobs_result.top_candidates
    assert len(chosen) == len(top) == candidate.token_count
    assert all(len(step.candidates) == 5 for step in top)
    assert all(step.candidates[0].token_id == one.token_id for one, step in zip(chosen, top, strict=True))
    average = sum(one.log_probability for one in chosen) / len(chosen)
    assert abs(candidate.avg_logprobs - average) < 1e-6
    assert "".join(one.token for one in chosen) == candidate.content.parts[0].text


def check_system_instruction(client: genai.Client) -> None:
    plain = client.models.generate_content(model=MODEL, contents=QUESTION, config=exact())
    told = client.models.generate_content(
        model=MODEL, contents=QUESTION, config=exact(system_instruction="You are a pirate. Always answer in one word.")
    )
    assert told.usage_metadata.prompt_token_count != plain.usage_metadata.prompt_token_count


def _joined(chunks: Iterator[types.GenerateContentResponse]) -> tuple[str, list[types.GenerateContentResponse]]:
    seen = list(chunks)
    return "".join(chunk.text or "" for chunk in seen), seen


def check_stream_equals_whole(client: genai.Client) -> None:
    whole = client.models.generate_content(model=MODEL, contents=QUESTION, config=exact())
    text, chunks = _joined(client.models.generate_content_stream(model=MODEL, contents=QUESTION, config=exact()))
    assert text == whole.text
    assert [c.candidates[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].candidates[0].finish_reason == types.FinishReason.STOP
    assert all(chunk.candidates[0].content.parts for chunk in chunks)
    assert len({chunk.response_id for chunk in chunks}) == 1
    assert chunks[-1].usage_metadata.total_token_count == whole.usage_metadata.total_token_count
    totals = [chunk.usage_metadata.total_token_count for chunk in chunks]
    assert totals == sorted(totals)


def check_chat_keeps_history(client: genai.Client) -> None:
    chat = client.chats.create(model=MODEL, config=exact(system_instruction="You are helpful."))
    _joined(chat.send_message_stream("My name is Ada."))
    _joined(chat.send_message_stream("What is my name?"))
    history = chat.get_history(curated=True)
    assert [turn.role for turn in history].count("user") == 2
    assert history[-1].role == "model"
    chat.send_message("Thanks.")
    assert [turn.role for turn in chat.get_history(curated=True)].count("user") == 3


def check_count_tokens(client: genai.Client) -> None:
    counted = client.models.count_tokens(model=MODEL, contents=QUESTION)
    answer = client.models.generate_content(model=MODEL, contents=QUESTION, config=exact(max_output_tokens=1))
    assert counted.total_tokens == answer.usage_metadata.prompt_token_count


def check_models(client: genai.Client) -> None:
    names = [model.name for model in client.models.list(config={"page_size": 1})]
    assert f"models/{MODEL}" in names
    model = client.models.get(model=MODEL)
    assert model.input_token_limit == 8191
    assert "generateContent" in model.supported_actions
    assert client.models.get(model="gemini-2.5-pro").name == f"models/{MODEL}"


def check_errors(client: genai.Client) -> None:
    unknown = failure(errors.ClientError, lambda: client.models.generate_content(model="no-such-model", contents="hi"))
    assert (unknown.code, unknown.status) == (404, "NOT_FOUND"), unknown
    hot = exact(temperature=9.0)
    refused = failure(
        errors.ClientError, lambda: list(client.models.generate_content_stream(model=MODEL, contents="hi", config=hot))
    )
    assert (refused.code, refused.status) == (400, "INVALID_ARGUMENT"), refused
    assert "temperature" in refused.message


def check_a_silence(client: genai.Client) -> None:
    settings = exact(max_output_tokens=8)
    text, _ = _joined(client.models.generate_content_stream(model=ENDLESS, contents=long_prompt(), config=settings))
    assert len(text) == 8


def hurried() -> types.GenerateContentConfig:
    """One second for an answer that takes longer."""
    return exact(max_output_tokens=30_000, http_options=types.HttpOptions(headers={"X-Server-Timeout": "1"}))


def check_an_error_in_a_stream(client: genai.Client) -> None:
    def read() -> None:
        _joined(client.models.generate_content_stream(model=ENDLESS, contents="hi", config=hurried()))

    error = failure(errors.ServerError, read)
    assert (error.code, error.status) == (504, "DEADLINE_EXCEEDED"), error


async def _async_checks(client: genai.Client) -> None:
    whole = await client.aio.models.generate_content(model=MODEL, contents=QUESTION, config=exact())
    assert "Paris" in whole.text
    stream = await client.aio.models.generate_content_stream(model=MODEL, contents=QUESTION, config=exact())
    assert "".join([chunk.text or "" async for chunk in stream]) == whole.text
    texts = await asyncio.gather(
        *(client.aio.models.generate_content(model=MODEL, contents=QUESTION, config=exact()) for _ in range(6))
    )
    assert {answer.text for answer in texts} == {whole.text}
    settings = exact(max_output_tokens=8)
    silent = await client.aio.models.generate_content_stream(model=ENDLESS, contents=long_prompt(), config=settings)
    assert len("".join([chunk.text or "" async for chunk in silent])) == 8

    async def read_broken_stream() -> None:
        async for _ in await client.aio.models.generate_content_stream(model=ENDLESS, contents="hi", config=hurried()):
            pass

    [error] = await asyncio.gather(read_broken_stream(), return_exceptions=True)
    assert isinstance(error, errors.ServerError), error
    assert error.code == 504


def check_async(client: genai.Client) -> None:
    asyncio.run(_async_checks(client))


def main(base_url: str, service: str = "gemini") -> None:
    client = genai.Client(http_options=types.HttpOptions(base_url=base_url), **SERVICES[service])
    checks = globals().copy()
    if client.vertexai:
        del checks["check_models"]
    report(genai.__version__, checks, client)


if __name__ == "__main__":
    main(*sys.argv[1:])
