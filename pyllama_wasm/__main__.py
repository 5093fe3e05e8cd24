"""``python -m pyllama_wasm`` is the command ``pyllama-wasm``."""

from pyllama_wasm.cli import main

if __name__ == "__main__":
    main()
