"""Texts that are embedded and ranked to compare with reference implementations, and how the record is laid out."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "embeddings.npz"

TEXTS = (
    "The cat sits on the mat.",
    "A cat is lying on a rug.",
    "Stock markets fell sharply on Monday.",
    "What is the capital of France?",
    "Paris is the capital and largest city of France.",
    "How do I reset my password?",
    "Click on 'forgot password' and follow the e-mail we send you.",
    "def add(a, b):\n    return a + b",
    "SELECT name FROM users WHERE id = 42;",
    "Das Wetter in M\u00fcnchen ist heute sch\u00f6n.",
    "El caf\u00e9 est\u00e1 demasiado caliente.",
    "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002",
    "\u041c\u043e\u0441\u043a\u0432\u0430, \u0420\u043e\u0441\u0441\u0438\u044f.",
    "I \u2764 unicode \U0001f600, don't you?",
    "a",
    "!!! ... ???",
    "E = mc^2 and 3.14159 are well-known; so is 6.022e23.",
    "UPPERCASE AND lowercase and MiXeD",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "Plants make their food out of sunlight.",
    "He said: \u201cWait \u2014 what?\u201d",
    "The mitochondrion is the powerhouse of the cell, " + "and so on, " * 60,
)

QUERIES = {
    "capital of France": (
        "Berlin is the capital of Germany.",
        "Paris is the capital of France.",
        "Bananas are yellow.",
        "France is a country in Europe, and its government sits in Paris.",
    ),
    "How do plants make food?": (
        "Plants turn sunlight into sugar by photosynthesis.",
        "The stock exchange opens at nine o'clock.",
        "Restaurants make food for their guests.",
    ),
    "forgotten password": (
        "To set a new password, follow the link in the e-mail.",
        "Our office is closed on public holidays.",
        "The weather was nice. " * 20,
    ),
}
PAIRS = tuple((query, document) for query, documents in QUERIES.items() for document in documents)
