"""Grammars: output that always has the form you want, from the first token on or from a trigger on."""

import json

import pyllama_wasm as pw

CITY = r"""
root ::= "{\"city\": \"" [A-Z] [a-z]+ "\", \"population\": " [1-9] [0-9]{3,6} "}"
"""
STEPS = r"""
root ::= "1. " line "2. " line "3. " line
line ::= [A-Z] [a-z ]+ ".\n"
"""

with pw.Model(pw.demo_model()) as model:
    city = json.loads(model.generate("A large city in France as JSON: ", grammar=CITY, temperature=0).text)
    print(sorted(city), city["city"].isalpha())

    # Free text first; from "1." on the grammar holds: exactly three short steps.
    lazy = pw.SamplingParams(grammar=STEPS, grammar_lazy=True, grammar_triggers=(r"(1\.)",), temperature=0)
    answer = model.generate("How do I make tea? The steps are:", max_tokens=60, sampling=lazy)
    print(answer.text)
    print("steps:", "3. " in answer.text, "4. " in answer.text, answer.finish_reason)
