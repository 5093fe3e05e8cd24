"""A model of a stranger: limits for memory, threads, time and output, and a report of what its sandbox has."""

import pyllama_wasm as pw

limits = pw.Limits.untrusted(memory_bytes=512 * 1024**2, threads=2, deadline_s=30)
with pw.Model(pw.demo_model(), limits=limits) as model:
    report = model.sandbox_report()
    print("files:", [file.guest_path for file in report.files], "has no", ", ".join(report.off[2:4]))

    try:
        model.generate("Count to a million: 1, 2, 3,", max_tokens=None, ignore_eos=True, deadline_s=0.5)
    except pw.DeadlineError as error:
        print(error)
    if not model.is_dead:  # a call that cannot be ended in any other way takes the sandbox with it
        print(model.generate("The capital of France is", max_tokens=4, temperature=0).text)

    with pw.deadline(0.5):  # all calls in the block together
        try:
            while True:
                model.embed("The same text again and again")
        except pw.DeadlineError:
            print("half a second is over")

try:
    pw.Model(pw.demo_model(), limits=pw.Limits(memory_bytes=100 * 1024**2))
except pw.OutOfMemoryError as error:
    print(error)
