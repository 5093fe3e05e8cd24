"""Stop a generation from another thread; the model stays usable."""

import threading

import pyllama_wasm as pw

with pw.Model(pw.demo_model()) as model:
    timer = threading.Timer(0.5, model.cancel)
    timer.start()
    try:
        model.generate("Count to a million: 1, 2, 3,", max_tokens=2000, temperature=0, ignore_eos=True)
    except pw.CancelledError as error:
        print(error)
    print(model.generate("The capital of France is", max_tokens=4, temperature=0).text)
