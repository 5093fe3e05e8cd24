"""Structured output: an answer as an object of a class, and by a JSON schema with bounds."""

from dataclasses import dataclass
from typing import Literal

import pyllama_wasm as pw


@dataclass
class City:
    """What is known of a city."""

    name: str
    country: str
    size: Literal["small", "large"]
    is_capital: bool


SCHEMA = {
    "type": "object",
    "properties": {
        "year": {"type": "integer", "minimum": 1900, "maximum": 2100},
        "stars": {"type": "number", "minimum": 0, "maximum": 5, "multipleOf": 0.5},
    },
    "required": ["year", "stars"],
}

with pw.Model(pw.demo_model()) as model:
    question = [{"role": "user", "content": "Describe the city of Paris."}]
    city = model.chat(question, response_format=City, temperature=0).parsed
    print(type(city).__name__, city.size in ("small", "large"), type(city.is_capital).__name__)

    wanted = {"type": "json_schema", "json_schema": {"name": "year", "schema": SCHEMA}}
    for answer in model.chat_n(question, 3, response_format=wanted, seed=1):
        print(1900 <= answer.parsed["year"] <= 2100, answer.parsed["stars"] % 0.5 == 0)
