"""Drives the Files API of a running server with google-genai: `python genai_files.py BASE_URL PDF TEXT`.

PDF and TEXT are paths of documents whose words are known.
"""

from __future__ import annotations

import asyncio
import io
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from checks import MODEL, failure, report
from google import genai
from google.genai import errors, types

SIZES = (0, 11, 17 * 1024 * 1024)
PDF, TEXT = map(Path, sys.argv[2:4])


def written(size: int) -> Path:
    path = Path(tempfile.mkdtemp()) / "data.bin"
    path.write_bytes(random.Random(size).randbytes(size))
    return path


def check_sizes(client: genai.Client) -> None:
    for size in SIZES:
        path = written(size)
        file = client.files.upload(file=str(path), config={"display_name": f"of {size}", "mime_type": "text/x-data"})
        assert (file.size_bytes, file.display_name, file.mime_type) == (size, f"of {size}", "text/x-data"), file
        assert file.state == types.FileState.ACTIVE
        assert client.files.get(name=file.name) == client.files.get(name=file.name.removeprefix("files/"))
        got = client.files.get(name=file.name)
        assert (got.sha256_hash, got.uri, got.expiration_time) == (file.sha256_hash, file.uri, file.expiration_time)
        assert client.files.download(file=got) == path.read_bytes()
        client.files.delete(name=file.name)
        refused(403, lambda name=file.name: client.files.get(name=name))
        path.unlink()


def check_io_and_a_name_of_ones_own(client: genai.Client) -> None:
    name = f"mine{os.getpid()}"
    file = client.files.upload(file=io.BytesIO(b"hello world"), config={"mime_type": "text/plain", "name": name})
    assert file.name == f"files/{name}"
    refused(409, lambda: client.files.upload(file=io.BytesIO(b"x"), config={"mime_type": "text/plain", "name": name}))
    assert client.files.download(file=file.name) == b"hello world"
    client.files.delete(name=file.name)


def check_list(client: genai.Client) -> None:
    names = [client.files.upload(file=io.BytesIO(b"x"), config={"mime_type": "text/plain"}).name for _ in range(5)]
    listed = [file.name for file in client.files.list(config={"page_size": 2})]
    assert [name for name in listed if name in names] == names[::-1]
    for name in names:
        client.files.delete(name=name)
    assert not {file.name for file in client.files.list()} & set(names)


def check_documents(client: genai.Client) -> None:
    for path, question in ((PDF, "What is the name of the dog?"), (TEXT, "What is the name of the dog?")):
        file = client.files.upload(file=str(path))
        config = types.GenerateContentConfig(temperature=0.0, max_output_tokens=40)
        answer = client.models.generate_content(model=MODEL, contents=[file, question], config=config)
        assert "Rufus" in answer.text, answer.text
        details = {row.modality.value: row.token_count for row in answer.usage_metadata.prompt_tokens_details}
        plain = client.models.count_tokens(model=MODEL, contents=question).total_tokens
        words = client.models.count_tokens(model=MODEL, contents=TEXT.read_text()).total_tokens
        assert details["TEXT"] == plain, (details, plain)
        assert details["DOCUMENT"] >= words - plain, (details, words)
        assert sum(details.values()) == answer.usage_metadata.prompt_token_count
        counted = client.models.count_tokens(model=MODEL, contents=[file, question])
        assert counted.total_tokens == answer.usage_metadata.prompt_token_count
        client.files.delete(name=file.name)


async def _async_checks(client: genai.Client) -> None:
    files = client.aio.files
    for size in SIZES:
        path = written(size)
        file = await files.upload(file=str(path), config={"mime_type": "application/x-data"})
        assert await files.download(file=await files.get(name=file.name)) == path.read_bytes()
        assert file.name in [entry.name async for entry in await files.list(config={"page_size": 1})]
        await files.delete(name=file.name)
        path.unlink()
    file = await files.upload(file=str(TEXT))
    answer = await client.aio.models.generate_content(
        model=MODEL,
        contents=[file, "What is the name of the dog?"],
        config={"temperature": 0.0, "max_output_tokens": 40},
    )
    assert "Rufus" in answer.text, answer.text
    await files.delete(name=file.name)


def check_async(client: genai.Client) -> None:
    asyncio.run(_async_checks(client))


def refused(code: int, call: Callable[[], object]) -> None:
    assert failure(errors.ClientError, call).code == code


if __name__ == "__main__":
    options = types.HttpOptions(base_url=sys.argv[1])
    report(genai.__version__, globals().copy(), genai.Client(api_key="any", http_options=options))
