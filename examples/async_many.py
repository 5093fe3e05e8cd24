"""Await several answers at once in an event loop: they are computed together, and who is too slow is cancelled."""

import asyncio

import pyllama_wasm as pw


async def capital(model: pw.AsyncModel, name: str) -> str:
    question = [{"role": "user", "content": f"Name the capital of {name}. Answer with one word."}]
    return (await model.chat(question, max_tokens=8, temperature=0)).text


async def main() -> None:
    async with pw.AsyncModel(pw.demo_model()) as model:
        names = ["France", "Italy", "Japan"]
        for name, answer in zip(names, await asyncio.gather(*(capital(model, name) for name in names)), strict=True):
            print(f"{name}: {answer}")
        async for piece in model.stream("1, 2, 3, 4, 5,", max_tokens=16, temperature=0):
            print(piece, end="")
        print()
        try:
            endless = model.generate("Count: 1, 2, 3,", max_tokens=None, ignore_eos=True)
            await asyncio.wait_for(endless, timeout=0.5)
        except asyncio.TimeoutError:
            print("stopped after half a second")


if __name__ == "__main__":
    asyncio.run(main())
