"""Several choices of one prompt, which is computed once for all; and the log-probabilities of prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyllama_wasm as pw
from pyllama_wasm import lane as lane_module
from pyllama_wasm._run_many import begin_streams, run_all, together
from pyllama_wasm.generate import Generation
from pyllama_wasm.slots import Slot, plan_step

from ..tiny_models import write_cohere2, write_mamba, write_t5

PROMPT = "a prompt that is worth to be computed only once"
ENDLESS: dict[str, Any] = {"ignore_eos": True}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}answer:"


@pytest.fixture
def n_prompt_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return where the number of prompt tokens of each step is put."""
    found: list[int] = []

    def planned(slots: Sequence[Slot], n_batch: int, turn: int) -> list[tuple[Slot, int]]:
        parts = plan_step(slots, n_batch, turn)
        n = sum(n for slot, n in parts if slot.run is not None and slot.n_past < len(slot.run.prompt))
        found.extend([n] * bool(n))
        return parts

    monkeypatch.setattr(lane_module, "plan_step", planned)
    return found


@pytest.fixture
def model(tiny_path: Path) -> Iterator[pw.Model]:
    """Return a model that reads prompts in pieces of 16 tokens, and remembers none."""
    with pw.Model(tiny_path, n_threads=1, context_params=pw.ContextParams(n_batch=16, n_ubatch=16)) as model:
        yield model


WRITERS: dict[str, Callable[[Path], Path]] = {"recurrent": write_mamba, "window": write_cohere2}


@pytest.fixture(params=["tiny", *WRITERS])
def any_model(request: pytest.FixtureRequest, tiny_path: Path, tmp_path: Path) -> Iterator[pw.Model]:
    path = tiny_path if request.param == "tiny" else WRITERS[request.param](tmp_path / "model.gguf")
    with pw.Model(path, n_threads=1, context_params=pw.ContextParams(n_ctx=256, n_batch=16, n_ubatch=16)) as model:
        yield model


def test_a_prompt_is_computed_once_for_all_its_choices(any_model: pw.Model, n_prompt_tokens: list[int]) -> None:
    n = len(any_model.vocab.tokenize(PROMPT))
    found = any_model.generate_n(PROMPT, 5, max_tokens=8, seed=11, logprobs=0, **ENDLESS)
    assert sum(n_prompt_tokens) == n
    assert [one.usage.cached_tokens for one in found] == [0, n, n, n, n]
    assert sum(one.timings.prompt_tokens for one in found) == n
    with pw.Model(any_model.path, n_threads=1, context_params=any_model.context_params) as other:
        alone = [other.generate(PROMPT, max_tokens=8, seed=11 + i, logprobs=0, **ENDLESS) for i in range(5)]
    assert [one.tokens for one in found] == [one.tokens for one in alone]
    for one, two in zip(found, alone, strict=True):
        told = [[each.logprob for each in each_of.logprobs or ()] for each_of in (one, two)]
        assert told[0] == pytest.approx(told[1], abs=1e-3)
    assert len({one.tokens for one in found}) == 5


def test_further_choices_than_run_at_a_time_take_what_the_others_leave(
    model: pw.Model, n_prompt_tokens: list[int]
) -> None:
    found = model.generate_n(PROMPT, 7, n_parallel=3, max_tokens=4, seed=1, **ENDLESS)
    assert len({one.tokens for one in found}) == 7
    assert sum(n_prompt_tokens) == len(model.vocab.tokenize(PROMPT)) + 4  # of these the last token


def test_models_that_cannot_share_compute_each_choice(tiny_path: Path, tmp_path: Path) -> None:
    """What an encoder has read is of one context; a deterministic model's answers depend on nothing else."""
    for path, deterministic in ((write_t5(tmp_path / "t5.gguf"), False), (tiny_path, True)):
        with pw.Model(path, n_threads=1, params=pw.ModelParams(deterministic=deterministic)) as model:
            found = model.generate_n("ab" * 8, 3, max_tokens=4, seed=3, echo=True, logprobs=0)
            alone = [model.generate("ab" * 8, max_tokens=4, seed=3 + i) for i in range(3)]
            assert [one.tokens for one in found] == [one.tokens for one in alone]
            assert [one.usage.cached_tokens for one in found] == [0, 0, 0]
            assert [one.prompt_logprobs is None for one in found] == [model.has_encoder] * 3


def test_choices_of_several_threads_that_come_and_go(tiny: pw.Model) -> None:
    """Leaders go, slots change hands, prompts meet: every answer is the one of its prompt and seed."""
    prompts = [PROMPT * 2 + str(i) for i in range(3)]
    options: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}
    expected = {(i, s): tiny.generate(prompts[i], seed=s, **options).tokens for i in range(3) for s in range(1, 5)}

    def work(i: int) -> None:
        prompt = prompts[i % 3]
        if i % 4 == 3:  # begun, and left in the midst of its prompt or text
            streams = [tiny.stream(prompt, seed=s, **options) for s in (1, 2)]
            begin_streams(streams)
            for _ in zip(range(i % 5), streams[1], strict=False):
                pass
            for stream in streams:
                stream.close()
            return
        found = tiny.generate_n(prompt, 4, n_parallel=1 + i % 4, seed=1, **options)
        assert [one.tokens for one in found] == [expected[i % 3, s] for s in range(1, 5)]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(48)))


def test_prompts_that_are_the_same_among_others(model: pw.Model, n_prompt_tokens: list[int]) -> None:
    other = PROMPT.replace("a", "o")
    prompts = [PROMPT, other, PROMPT, other, "short", PROMPT]
    found = model.generate_many(prompts, max_tokens=6, temperature=0, **ENDLESS)
    assert sum(n_prompt_tokens) == sum(len(model.vocab.tokenize(prompt)) for prompt in set(prompts))
    alone = [model.generate(prompt, max_tokens=6, temperature=0, **ENDLESS).tokens for prompt in prompts]
    assert [one.tokens for one in found] == alone


def test_who_waits_for_a_prompt_goes_on_when_its_first_choice_has_gone(model: pw.Model) -> None:
    streams = [model.stream(PROMPT + " ", max_tokens=6, temperature=0, **ENDLESS) for _ in range(3)]
    twins = object()
    for stream in streams:
        stream._generation.twins = twins
        stream._begin()
    scheduler = model._scheduler
    waiting = streams[2]._generation
    waiting.is_waited_for = True
    job = scheduler._claim(waiting)
    while job is not None and waiting.slot is None:  # opens the lane, then computes the first 16 tokens
        job()
        scheduler._settle(waiting)
        job = scheduler._claim(waiting)
    assert job is not None
    job()
    scheduler._settle(waiting)
    leaders = [s for s in streams if (slot := s._generation.slot) is not None and not slot.is_following]
    assert len(leaders) == 1 and leaders[0]._generation.slot.n_past == 16  # type: ignore[union-attr]
    leaders[0].close()
    left = [stream for stream in streams if stream not in leaders]
    texts = ["".join(stream) for stream in left]
    assert texts[0] == texts[1] == model.generate(PROMPT + " ", max_tokens=6, temperature=0, **ENDLESS).text


def test_a_choice_that_fails_fails_alone(model: pw.Model) -> None:
    broken: tuple[Any, ...] = (lambda tokens, logits: 1 / 0,)
    requests = [
        model._request(PROMPT, 4, None, pw.SamplingParams(temperature=0, ignore_eos=True), {}, processors)
        for processors in ((), broken, ())
    ]
    generations = [Generation(model, request, pw.Completion) for request in requests]
    with pytest.raises(ZeroDivisionError):
        run_all(model, generations, 3)
    found = model.generate_n(PROMPT, 3, max_tokens=4, temperature=0, **ENDLESS)
    assert len({one.tokens for one in found}) == 1


def test_answers_to_one_conversation(
    write_tiny: Callable[..., Path], tmp_path: Path, n_prompt_tokens: list[int]
) -> None:
    asked = [{"role": "user", "content": PROMPT}]
    path = write_tiny(tmp_path / "chat.gguf", chat_template=TEMPLATE)
    with pw.Model(path, n_threads=1) as model:
        found = model.chat_n(asked, 4, seed=5, max_tokens=6, **ENDLESS)
        n = found[0].usage.prompt_tokens
        assert sum(n_prompt_tokens) == n == len(model.vocab.tokenize(model.chat_prompt(asked).prompt))
        alone = [model.chat(asked, seed=5 + i, max_tokens=6, **ENDLESS) for i in range(4)]
        assert [answer.message for answer in found] == [answer.message for answer in alone]
        choice = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [1, 2, 3]}}}
        parsed = [answer.parsed for answer in model.chat_n(asked, 6, response_format=choice, seed=1)]
        assert set(parsed) <= {1, 2, 3} and len(parsed) == 6
        refused: list[dict[str, Any]] = [{"n": 0}, {"n": 1, "n_parallel": 65}, {"n": 1025}]
        for wrong in refused:
            with pytest.raises(pw.RequestError):
                model.chat_n(asked, **wrong)


# -- log-probabilities of prompts -------------------------------------------------------------------------------------


def test_prompt_logprobs_are_those_of_the_logits_of_a_context(any_model: pw.Model) -> None:
    found = any_model.generate(PROMPT, max_tokens=2, temperature=0, logprobs=3, echo=True)
    tokens = any_model.vocab.tokenize(PROMPT)
    told = found.prompt_logprobs
    assert told is not None and [each.token for each in told[1:] if each] == tokens[1:] and told[0] is None
    with any_model.context(n_ctx=256, n_batch=16, n_ubatch=16) as context:
        for start in range(0, len(tokens), 16):
            batch = pw.Batch()
            for i, token in enumerate(tokens[start : start + 16], start):
                batch.add(token, i, logits=True)
            context.decode(batch)
            for k, row in enumerate(context.all_logits().astype(np.float64)):
                if start + k + 1 < len(tokens):
                    each = told[start + k + 1]
                    assert each is not None
                    logprobs = row - row.max() - math.log(np.exp(row - row.max()).sum())
                    assert each.logprob == pytest.approx(logprobs[each.token], abs=1e-3)
                    assert [token for token, _, _ in each.top] == np.argsort(-logprobs, kind="stable")[:3].tolist()
    assert found.text == PROMPT + any_model.generate(PROMPT, max_tokens=2, temperature=0).text
    assert found.logprobs is not None and len(found.logprobs) == 2


def test_only_the_prompt_may_be_wanted(model: pw.Model, n_prompt_tokens: list[int]) -> None:
    scored = model.generate(PROMPT, max_tokens=0, logprobs=0, echo=True)
    assert (scored.text, scored.tokens, scored.finish_reason, scored.logprobs) == (PROMPT, (), "length", ())
    assert len(scored.prompt_logprobs or ()) == sum(n_prompt_tokens) == scored.usage.prompt_tokens
    again = model.generate(PROMPT, max_tokens=0, logprobs=0, echo=True)
    assert again == pw.Completion(**{**vars(scored), "timings": again.timings})  # though its tokens are cached
    many = model.generate_many([PROMPT, "other"], max_tokens=0, logprobs=0, echo=True)
    told = [[each.logprob for each in one.prompt_logprobs or () if each] for one in (many[0], scored)]
    assert told[0] == pytest.approx(told[1], abs=1e-4)
    assert model.generate(PROMPT, max_tokens=2, logprobs=0).prompt_logprobs is None
    assert model.generate(PROMPT, max_tokens=0, echo=True).prompt_logprobs is None


def test_batches_whose_logits_are_wanted_are_bounded(model: pw.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(lane_module, "_ROWS_BYTES", 4 * 5 * model.vocab.n_tokens)
        patched.setattr(lane_module, "_FEWEST_ROWS", 2)
        expected = model.generate(PROMPT, max_tokens=1, temperature=0, logprobs=1, echo=True).prompt_logprobs or ()
    (lane,) = model._scheduler._lanes
    assert lane.context.n_outputs_max == lane.context.n_batch == 5  # type: ignore[attr-defined]
    with pw.Model(model.path, n_threads=1) as other:
        whole = other.generate(PROMPT, max_tokens=1, temperature=0, logprobs=1, echo=True).prompt_logprobs or ()
        (lane,) = other._scheduler._lanes
        assert lane.context.n_outputs_max == 128  # type: ignore[attr-defined]
    assert [each and each.logprob for each in expected][1:] == pytest.approx(
        [each and each.logprob for each in whole][1:], abs=5e-3
    )


def test_streams_and_choices_tell_them_too(model: pw.Model) -> None:
    whole = model.generate(PROMPT, max_tokens=4, temperature=0, logprobs=1, echo=True, **ENDLESS)
    stream = model.stream(PROMPT, max_tokens=4, temperature=0, logprobs=1, echo=True, **ENDLESS)
    assert next(stream) == PROMPT
    assert stream.prompt_logprobs == whole.prompt_logprobs and stream.logprobs == ()
    assert PROMPT + "".join(stream) == whole.text
    choices = model.generate_n(PROMPT, 3, max_tokens=4, seed=1, logprobs=1, echo=True, **ENDLESS)
    assert {choice.prompt_logprobs for choice in choices} == {whole.prompt_logprobs}
    assert choices[1].usage.cached_tokens == choices[1].usage.prompt_tokens


def test_a_step_that_is_repeated_tells_and_shares_what_it_did_before(
    model: pw.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pw.Model(model.path, n_threads=1, context_params=model.context_params) as other:
        expected = other.generate_n(PROMPT, 3, max_tokens=4, seed=1, logprobs=0, echo=True, **ENDLESS)
    sample, n_left = lane_module.Lane._sample, [2]

    def interrupted(self: lane_module.Lane, outputs: list[tuple[int, Slot]]) -> None:
        if outputs and n_left[0]:
            n_left[0] -= 1
            raise pw.CancelledError("generate", "the step was cancelled")
        sample(self, outputs)

    monkeypatch.setattr(lane_module.Lane, "_sample", interrupted)
    found = model.generate_n(PROMPT, 3, max_tokens=4, seed=1, logprobs=0, echo=True, **ENDLESS)
    assert n_left == [0]
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert [one.prompt_logprobs for one in found] == [one.prompt_logprobs for one in expected]


def test_a_choice_whose_sampler_cannot_be_made_fails_alone(model: pw.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    params = pw.SamplingParams(temperature=0, ignore_eos=True)
    generations = [
        Generation(model, model._request(PROMPT[:10], 4, None, params, {}, ()), pw.Completion) for _ in range(3)
    ]
    make = Generation._make_sampler

    def failing(generation: Generation[Any], request: Any) -> Any:
        return 1 / 0 if generation is generations[1] else make(generation, request)

    monkeypatch.setattr(Generation, "_make_sampler", failing)
    with together(model, generations, 3):
        for i in (0, 2):
            generations[i].wait()
        with pytest.raises(ZeroDivisionError):
            generations[1].wait()
        assert generations[0].completion().tokens == generations[2].completion().tokens


def test_a_follower_that_computes_by_itself_after_all_tells_so(
    model: pw.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = pw.SamplingParams(temperature=0, ignore_eos=True)
    generations = [Generation(model, model._request(PROMPT, 4, None, params, {}, ()), pw.Completion) for _ in range(2)]
    sample, n_left = lane_module.Lane._sample, [1]

    def interrupted(self: lane_module.Lane, outputs: list[tuple[int, Slot]]) -> None:
        if len(outputs) == 2 and n_left[0]:
            n_left[0] = 0
            outputs[0][1].run.fail(ZeroDivisionError())  # type: ignore[union-attr]
            raise pw.CancelledError("generate", "the step was cancelled")
        sample(self, outputs)

    monkeypatch.setattr(lane_module.Lane, "_sample", interrupted)
    with together(model, generations, 2):
        with pytest.raises(ZeroDivisionError):
            generations[0].wait()
        generations[1].wait()
        usage = generations[1].completion().usage
    assert n_left == [0]
    assert 0 < usage.cached_tokens < usage.prompt_tokens


def test_a_prompt_that_is_only_scored_has_nothing_chosen(model: pw.Model) -> None:
    broken: tuple[Any, ...] = (lambda tokens, logits: 1 / 0,)
    scored = model.generate(PROMPT, max_tokens=0, logprobs=0, echo=True, logits_processors=broken)
    assert len(scored.prompt_logprobs or ()) == scored.timings.prompt_tokens == scored.usage.prompt_tokens
    assert (scored.finish_reason, scored.tokens) == ("length", ())


def test_who_cannot_look_at_its_prompt_fails_alone(model: pw.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    see = Generation.see_prompt_logits

    def failing(generation: Generation[Any], i: int, logits: Any) -> None:
        if generation._request.tokens == tuple(model.vocab.tokenize("other")):
            raise ZeroDivisionError
        see(generation, i, logits)

    monkeypatch.setattr(Generation, "see_prompt_logits", failing)
    requests = [
        model._request(prompt, 2, None, None, {"logprobs": 0, "echo": True}, ()) for prompt in (PROMPT, "other", "more")
    ]
    generations = [Generation(model, request, pw.Completion) for request in requests]
    with together(model, generations, 3):
        for i in (0, 2):
            generations[i].wait()
            assert generations[i].completion().prompt_logprobs
        with pytest.raises(ZeroDivisionError):
            generations[1].wait()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(model: pw.Model, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    rows_of = pw.Context._logit_rows

    def broken(context: pw.Context, *args: Any) -> Any:
        rows = rows_of(context, *args).copy()
        rows[:, 5] = value
        return rows

    monkeypatch.setattr(pw.Context, "_logit_rows", broken)
    with pytest.raises(pw.RequestError, match="not numbers"):
        model.generate(PROMPT, max_tokens=0, logprobs=0, echo=True)
