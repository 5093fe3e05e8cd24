"""What the process of a model does for each request: the calls of ``Model``, with plain values in and out."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from ..adapter import LoraAdapter
from ..draft_model import DraftModel
from ..errors import ClosedError, HostError
from ..generate import Generation, TextStream
from ..limits import Limits
from ..model import Model
from ..params import ContextParams, ModelParams, SamplingParams
from ..sandbox_report import engine_facts
from ..source import OpenedFiles
from .chat import next_piece
from .options import options_from_wire
from .results import completion_to_wire, logprobs_to_wire, prompt_to_wire
from .values import facts_to_wire, params_from_wire, report_to_wire
from .wire import Value

if TYPE_CHECKING:
    from .child import Job

__all__ = ["HANDLERS", "Served"]


class Served:
    """The one model of this process, and what was loaded for it, by the numbers that the program has given."""

    def __init__(self) -> None:
        """Have none yet."""
        self._model: Model | None = None
        self._held: dict[int, LoraAdapter | DraftModel] = {}
        self._forgotten: set[int] = set()
        """What the program wants no more, and what was not there when it said so: its load may go on."""

        self._lock = threading.Lock()

    @property
    def model(self) -> Model:
        """The model. Raises ``HostError`` before it is loaded."""
        if self._model is None:
            raise HostError("use the model", "it is not loaded yet")
        return self._model

    @model.setter
    def model(self, model: Model) -> None:
        self._model = model

    @property
    def is_dead(self) -> bool:
        """Whether its sandbox has died."""
        return self._model is not None and self._model.is_dead

    def hold(self, number: int, what: LoraAdapter | DraftModel) -> None:
        """Keep an adapter or a draft model, unless it was forgotten before it was there."""
        with self._lock:
            is_wanted = number not in self._forgotten
            if is_wanted:
                self._held[number] = what
        if not is_wanted:
            self._forgotten.discard(number)
            what.close()

    def held(self, number: int) -> LoraAdapter | DraftModel:
        """Return what was kept. Raises ``ClosedError`` when it is no more."""
        if (found := self._held.get(number)) is None:
            raise ClosedError("use what was loaded for the model", "it is closed", "load it again")
        return found

    def forget(self, number: int) -> LoraAdapter | DraftModel | None:
        """Let go of it, and return it if it was there: unless it is closed, it is freed with the next that is made."""
        with self._lock:
            if (found := self._held.pop(number, None)) is None:
                self._forgotten.add(number)
        return found

    def cancel(self) -> None:
        """End what it computes."""
        if self._model is not None:
            self._model.cancel()


def _load(served: Served, job: Job, **given: Any) -> Value:
    with _opened(given) as files:
        served.model = Model(
            files,  # type: ignore[arg-type]  # not for everybody
            params=params_from_wire(ModelParams, given["params"]),
            context_params=params_from_wire(ContextParams, given["context_params"]),
            limits=params_from_wire(Limits, given["limits"]),
            n_threads=given["n_threads"],
            load=given["load"],
            progress=(lambda fraction: job.send("progress", fraction)) if given["tells_progress"] else None,
        )
    return facts_to_wire(served.model)


@contextmanager
def _opened(given: dict[str, Any]) -> Iterator[OpenedFiles]:
    """Return the files of a request; they are closed at the end, what was granted of them are duplicates."""
    files = given["files"]
    weights = files[-1] if given["has_weights"] else None
    own = tuple(files[:-1] if given["has_weights"] else files)
    try:
        yield OpenedFiles(tuple(given["names"]), own, given["is_listed"], given["repacks"], weights)
    finally:
        for fd in files:
            with suppress(OSError):
                os.close(fd)


def _load_adapter(served: Served, job: Job, number: int, name: str, files: list[int]) -> Value:
    with _opened({"names": [name], "files": files, "is_listed": False, "repacks": False, "has_weights": False}) as own:
        adapter = LoraAdapter(served.model, own)  # type: ignore[arg-type]  # as above
    served.hold(number, adapter)
    return [dict(adapter.metadata), list(adapter.alora_invocation_tokens)]


def _load_draft(served: Served, job: Job, **given: Any) -> Value:
    with _opened(given) as files:
        draft = DraftModel(served.model, files, given["n_draft"], given["p_min"])  # type: ignore[arg-type]  # as above
    served.hold(given["number"], draft)
    return None


def _prompt(value: Value) -> Value:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _asked(served: Served, given: dict[str, Value]) -> dict[str, Any]:
    """Return the arguments of a call that generates."""
    options = options_from_wire(given.pop("options"), served.held)
    return {**given, **options, "sampling": params_from_wire(SamplingParams, given["sampling"])}


def _generate(served: Served, job: Job, **given: Any) -> Value:
    prompt = _prompt(given.pop("prompt"))
    return completion_to_wire(served.model.generate(prompt, **_asked(served, given)))


def _stream(served: Served, job: Job, **given: Any) -> Value:
    prompt = _prompt(given.pop("prompt"))
    return _pump(served.model.stream(prompt, **_asked(served, given)), job)


def _chat(served: Served, job: Job, **given: Any) -> Value:
    return completion_to_wire(served.model.chat(given.pop("messages"), **_asked(served, given)))


def _chat_stream(served: Served, job: Job, **given: Any) -> Value:
    return _pump(served.model.chat(given.pop("messages"), stream=True, **_asked(served, given)), job)


def _chat_n(served: Served, job: Job, **given: Any) -> Value:
    for answer in served.model.chat_n(given.pop("messages"), given.pop("n"), **_asked(served, given)):
        job.send("item", completion_to_wire(answer))
    return None


def _chat_prompt(served: Served, job: Job, **given: Any) -> Value:
    return prompt_to_wire(served.model.chat_prompt(given.pop("messages"), **given))


def _pump(stream: TextStream, job: Job) -> Value:
    """Send the pieces of a stream as they are granted, each with its tokens and what it has cost so far."""
    job.send("made", None)
    generation = stream._generation
    n_told, has_told_prompt = 0, False
    with stream:
        while True:
            job.wait_for_grant()
            piece, deltas = next_piece(stream)
            if piece is None:
                break
            ids = generation._tokens[n_told : generation._n_read]
            n_told += len(ids)
            sent = {"text": piece, "tokens": ids, "counts": _counts(generation), "deltas": list(deltas)}
            if stream.logprobs is not None:
                sent["logprobs"] = logprobs_to_wire(stream.logprobs)
            if not has_told_prompt and (prompt_logprobs := generation.prompt_logprobs) is not None:
                sent["prompt_logprobs"] = logprobs_to_wire([item for item in prompt_logprobs if item is not None])
            has_told_prompt = True
            job.send("piece", sent)
    return completion_to_wire(generation.completion())


def _counts(generation: Generation[Any]) -> list[int | float]:
    return [
        len(generation._request.tokens), generation.n_cached, generation.n_drafted, generation.n_accepted,
        generation.prompt_s, generation.decode_s,
    ]  # fmt: skip


def _generate_many(served: Served, job: Job, **given: Any) -> Value:
    prompts = [_prompt(prompt) for prompt in given.pop("prompts")]
    samplings = [params_from_wire(SamplingParams, one) for one in given.pop("samplings")]
    sampling: Any = samplings[0] if given.pop("is_one_sampling") else samplings
    progress = (lambda done, total: job.send("progress", [done, total])) if given.pop("tells_progress") else None
    options = given.pop("options")
    if options is not None:
        given |= options_from_wire(options, served.held)
    for completion in served.model.generate_many(prompts, sampling=sampling, progress=progress, **given):
        job.send("item", completion_to_wire(completion))
    return None


def _embed(served: Served, job: Job, **given: Any) -> Value:
    inputs = [_prompt(item) for item in given.pop("inputs")]
    embeddings = served.model.embed_with_usage(inputs, **given)
    return [embeddings.vectors, list(embeddings.n_tokens)]


def _embed_tokens(served: Served, job: Job, **given: Any) -> Value:
    inputs = [_prompt(item) for item in given.pop("inputs")]
    for row in served.model.embed(inputs, pooling="none", **given):
        job.send("item", row)
    return None


def _rerank(served: Served, job: Job, **given: Any) -> Value:
    ranked = served.model.rerank(given.pop("query"), given.pop("documents"), **given)
    return [[item.index, np.asarray(item.scores, np.float32)] for item in ranked]


def _apply_chat_template(served: Served, job: Job, **given: Any) -> Value:
    return served.model.apply_chat_template(given.pop("messages"), **given)


def _tokenize(served: Served, job: Job, **given: Any) -> Value:
    return np.asarray(served.model.vocab.tokenize(**given), np.int32)


def _detokenize(served: Served, job: Job, **given: Any) -> Value:
    return served.model.vocab.detokenize(given.pop("tokens").tolist(), **given)


HANDLERS: dict[str, Callable[..., Value]] = {
    "apply_chat_template": _apply_chat_template,
    "chat": _chat,
    "chat_n": _chat_n,
    "chat_prompt": _chat_prompt,
    "chat_stream": _chat_stream,
    "detokenize": _detokenize,
    "embed": _embed,
    "embed_tokens": _embed_tokens,
    "eog_tokens": lambda served, job: list(served.model.vocab.eog_tokens()),
    "generate": _generate,
    "generate_many": _generate_many,
    "get_chat_template": lambda served, job, name: served.model.get_chat_template(name),
    "is_control": lambda served, job, token: served.model.vocab.is_control(token),
    "is_eog": lambda served, job, token: served.model.vocab.is_eog(token),
    "load": _load,
    "load_adapter": _load_adapter,
    "load_draft": _load_draft,
    "metadata": lambda served, job: dict(served.model.metadata),
    "rerank": _rerank,
    "sandbox_report": lambda served, job: report_to_wire(engine_facts(served.model.engine)),
    "stream": _stream,
    "token_attributes": lambda served, job, token: sorted(served.model.vocab.attributes(token)),
    "token_score": lambda served, job, token: served.model.vocab.score(token),
    "token_text": lambda served, job, token: served.model.vocab.text(token),
    "token_to_piece": lambda served, job, token, special: served.model.vocab.token_to_piece(token, special),
    "tokenize": _tokenize,
    "woven": lambda served, job: served.model._repacking.woven_bytes(),
    "woven_piece": lambda served, job, offset, n: served.model._repacking.read(offset, n),
}
"""By the name of the request; each takes the model, the job and the request's arguments by name."""
