"""Compute a common beginning once, share it between sequences, and answer all of them in one batch."""

import pyllama_wasm as pw

EXAMPLES = "Capitals. France: Paris. Japan: Tokyo. Italy: Rome.\n"
QUESTIONS = ("Germany:", "Egypt:", "Russia:")

with pw.Model(pw.demo_model()) as model:
    vocab = model.vocab
    examples = vocab.tokenize(EXAMPLES)
    with model.context(n_ctx=512, n_seq_max=len(QUESTIONS), kv_unified=True) as context:
        batch = pw.Batch(512)
        batch.add_sequence(examples, logits_last=False)
        context.decode(batch)  # once, for sequence 0
        for seq in range(1, len(QUESTIONS)):
            context.memory.seq_cp(0, seq)  # the others share its KV cache, nothing is copied

        batch.clear()
        for seq, question in enumerate(QUESTIONS):
            batch.add_sequence(vocab.tokenize(question), pos=len(examples), seq_id=seq)
        context.decode(batch)
        for question, logits in zip(QUESTIONS, context.all_logits(), strict=True):
            print(question + vocab.token_to_piece(int(logits.argmax())).decode())
        print(f"{len(examples)} tokens computed once instead of {len(QUESTIONS)} times")
