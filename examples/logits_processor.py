"""A logits processor: a Python function that changes the logits before each token is chosen."""

import numpy as np

import pyllama_wasm as pw

with pw.Model(pw.demo_model()) as model:

    def without_the_letter_e(tokens: np.ndarray, logits: np.ndarray) -> None:
        """Forbid the likely tokens with an e in them; ``tokens`` are the prompt's and those chosen so far."""
        for token in np.argsort(logits)[-100:]:
            if b"e" in model.vocab.token_to_piece(int(token)).lower():
                logits[token] = -np.inf

    prompt = "In the morning, the old man"
    plain = model.generate(prompt, max_tokens=16, temperature=0)
    lipogram = model.generate(prompt, max_tokens=16, temperature=0, logits_processors=[without_the_letter_e])
    print(f"{prompt} |{plain.text}")
    print(f"{prompt} |{lipogram.text}")
    print("letters e:", plain.text.count("e") > 0, lipogram.text.count("e"))
