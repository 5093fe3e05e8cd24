"""A conversation of two turns, with the model's own chat template."""

import pyllama_wasm as pw

messages: list[pw.ChatMessage] = [{"role": "system", "content": "Answer in one short sentence."}]

with pw.Model(pw.demo_model()) as model:
    for question in ("What is the capital of France?", "And of Italy?"):
        messages.append({"role": "user", "content": question})
        answer = model.chat(messages, max_tokens=32, temperature=0)
        messages.append(answer.message)
        print(">", question)
        print(answer.text)
