"""What the process of a model does for each request: the calls of ``Model``, with plain values in and out."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import HostError
from ..generate import TextStream
from ..limits import Limits
from ..model import Model
from ..params import ContextParams, ModelParams, SamplingParams
from ..sandbox_report import engine_facts
from ..source import OpenedFiles
from .chat import next_piece
from .values import completion_to_wire, facts_to_wire, params_from_wire, report_to_wire
from .wire import Value

if TYPE_CHECKING:
    from .child import Job

__all__ = ["HANDLERS", "Served"]


class Served:
    """The one model of this process."""

    def __init__(self) -> None:
        """Have none yet."""
        self._model: Model | None = None

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

    def cancel(self) -> None:
        """End what it computes."""
        if self._model is not None:
            self._model.cancel()


def _load(served: Served, job: Job, **given: Any) -> Value:
    files = OpenedFiles(tuple(given["names"]), tuple(_descriptors(given["descriptors"])), given["is_listed"])
    served.model = Model(
        files,  # type: ignore[arg-type]  # not for everybody
        params=params_from_wire(ModelParams, given["params"]),
        context_params=params_from_wire(ContextParams, given["context_params"]),
        limits=params_from_wire(Limits, given["limits"]),
        n_threads=given["n_threads"],
        load=given["load"],
        progress=(lambda fraction: job.send("progress", fraction)) if given["tells_progress"] else None,
    )
    for fd in files.descriptors:  # what was granted are duplicates
        with suppress(OSError):
            os.close(fd)
    return facts_to_wire(served.model)


def _descriptors(numbers: list[int]) -> list[int]:
    if os.name != "nt":
        return numbers
    import msvcrt

    return [msvcrt.open_osfhandle(number, os.O_RDONLY) for number in numbers]  # type: ignore[attr-defined, unused-ignore]


def _prompt(value: Value) -> Value:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _sampling(given: dict[str, Value]) -> SamplingParams | None:
    own = given.pop("sampling")
    return None if own is None else params_from_wire(SamplingParams, own)


def _generate(served: Served, job: Job, **given: Any) -> Value:
    changes, sampling = given.pop("changes"), _sampling(given)
    prompt = _prompt(given.pop("prompt"))
    return completion_to_wire(served.model.generate(prompt, sampling=sampling, **given, **changes))


def _stream(served: Served, job: Job, **given: Any) -> Value:
    changes, sampling = given.pop("changes"), _sampling(given)
    prompt = _prompt(given.pop("prompt"))
    return _pump(served.model.stream(prompt, sampling=sampling, **given, **changes), job)


def _chat(served: Served, job: Job, **given: Any) -> Value:
    changes, sampling = given.pop("changes"), _sampling(given)
    return completion_to_wire(served.model.chat(given.pop("messages"), sampling=sampling, **given, **changes))


def _chat_stream(served: Served, job: Job, **given: Any) -> Value:
    changes, sampling = given.pop("changes"), _sampling(given)
    stream = served.model.chat(given.pop("messages"), stream=True, sampling=sampling, **given, **changes)
    return _pump(stream, job)


def _pump(stream: TextStream, job: Job) -> Value:
    """Send the pieces of a stream as they are granted, each with its tokens and what it has cost so far."""
    job.send("made", None)
    generation = stream._generation
    n_told = 0
    with stream:
        while True:
            job.wait_for_grant()
            piece, deltas = next_piece(stream)
            if piece is None:
                break
            ids = generation._tokens[n_told : generation._n_read]
            n_told += len(ids)
            counts = [len(generation._request.tokens), generation.n_cached, generation.prompt_s, generation.decode_s]
            job.send("piece", [piece, ids, *counts, list(deltas)])
    return completion_to_wire(generation.completion())


def _generate_many(served: Served, job: Job, **given: Any) -> Value:
    prompts = [_prompt(prompt) for prompt in given.pop("prompts")]
    changes: dict[str, Value] = {}
    samplings = []
    for one in given.pop("samplings"):
        changes = one.pop("changes")
        samplings.append(_sampling(one))
    sampling: Any = samplings[0] if given.pop("is_one_sampling") else samplings
    progress = (lambda done, total: job.send("progress", [done, total])) if given.pop("tells_progress") else None
    for completion in served.model.generate_many(prompts, sampling=sampling, progress=progress, **given, **changes):
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
    "metadata": lambda served, job: dict(served.model.metadata),
    "rerank": _rerank,
    "sandbox_report": lambda served, job: report_to_wire(engine_facts(served.model.engine)),
    "stream": _stream,
    "token_attributes": lambda served, job, token: sorted(served.model.vocab.attributes(token)),
    "token_score": lambda served, job, token: served.model.vocab.score(token),
    "token_text": lambda served, job, token: served.model.vocab.text(token),
    "token_to_piece": lambda served, job, token, special: served.model.vocab.token_to_piece(token, special),
    "tokenize": _tokenize,
}
"""By the name of the request; each takes the model, the job and the request's arguments by name."""
