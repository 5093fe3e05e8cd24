"""Save what a context remembers to a file, and go on from there in another process."""

import tempfile
from pathlib import Path

import pyllama_wasm as pw

STORY = "Once upon a time there was a small robot who lived in a library and read every book it could find."


def next_word(context: pw.Context, tokens: list[int], pos: int) -> str:
    """Decode ``tokens`` and return the likeliest token after them as text."""
    batch = pw.Batch(len(tokens))
    batch.add_sequence(tokens, pos)
    context.decode(batch)
    return context.model.vocab.token_to_piece(int(context.logits().argmax())).decode()


path = Path(tempfile.mkdtemp()) / "story.state"
with pw.Model(pw.demo_model()) as model, model.context(n_ctx=256) as context:
    story = model.vocab.tokenize(STORY)
    next_word(context, story, 0)
    context.state.save(path, story)
    print(f"saved {len(story)} tokens, {path.stat().st_size / 1000:.0f} kB")

with pw.Model(pw.demo_model()) as model, model.context(n_ctx=256) as context:
    story = context.state.load(path)  # refused if the file is damaged or another model's
    question = model.vocab.tokenize(" The robot's favourite place was the")
    print("its favourite place was the" + next_word(context, question, len(story)))
