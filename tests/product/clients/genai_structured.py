"""Structured output with the google-genai SDK installed in this interpreter: `python genai_structured.py BASE_URL`.

Prints what ``.parsed`` and the texts were as one JSON object.
"""

from __future__ import annotations

import enum
import json
import sys

from google import genai
from google.genai import types
from pydantic import BaseModel, Field

MODEL = "smollm2-135m-instruct"


class Color(enum.Enum):
    RED = "red"
    GREEN = "green"


class Item(BaseModel):
    name: str = Field(max_length=12)
    qty: int | None = Field(ge=0, le=99)


class Basket(BaseModel):
    owner: Item
    color: Color
    items: list[Item] = Field(max_length=2)


def main(url: str) -> None:
    client = genai.Client(api_key="any", http_options=types.HttpOptions(base_url=url))

    def ask(text: str, **settings: object) -> types.GenerateContentResponse:
        config = types.GenerateContentConfig(temperature=0.0, seed=1, max_output_tokens=200, **settings)
        return client.models.generate_content(model=MODEL, contents=text, config=config)

    basket = ask("A shopping basket as JSON.", response_mime_type="application/json", response_schema=Basket)
    assert isinstance(basket.parsed, Basket), basket.text
    several = ask("Two items as JSON.", response_mime_type="application/json", response_schema=list[Color])
    choice = ask("Red or green?", response_mime_type="text/x.enum", response_schema=Color)
    assert choice.parsed in list(Color), choice.text
    written = ask(
        "A shopping basket as JSON.",
        response_mime_type="application/json",
        response_json_schema=Basket.model_json_schema(),
    )
    Basket.model_validate_json(written.text)
    outcome = {"basket": basket.parsed.model_dump_json(), "several": several.text, "choice": choice.text}
    print(json.dumps(outcome | {"version": genai.__version__}))


if __name__ == "__main__":
    main(sys.argv[1])
