"""Every sampler of llama.cpp, one function each: the ``llama_sampler_init_…`` functions behind checked arguments.

The functions return a recipe: the arguments are checked at once, and the guest's object is made when the recipe is run
on the engine thread.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from ._grammar_check import check_grammar_text
from ._sampler_parts import ALL_TOKENS, Leaf, Parts
from .custom_sampler import CustomSampler, SamplerHook
from .errors import GuestException, OutOfMemoryError, RequestError
from .params import MAX_PENALTY, RANDOM_SEED, SMALLEST_TEMPERATURE, SamplingParams
from .params import _check_float as check_float
from .params import _check_int as check_int
from .params import _check_text as check_text

if TYPE_CHECKING:
    from .loaded_model import LoadedModel

__all__ = ["Recipe", "build_parts"]

Recipe = Callable[[], Leaf]

_I32 = 2**31 - 1
_U32 = 2**32 - 1
_MIROSTAT_M = 100


def _recipe(model: LoadedModel, key: tuple[object, ...], name: str, *args: Any, **about: Any) -> Recipe:
    """Return what calls ``llama_sampler_init_<name>``; ``about`` are fields of ``Leaf``."""

    def make() -> Leaf:
        return Leaf(int(getattr(model.native, f"llama_sampler_init_{name}")(*args)), key, **about)

    return make


def _checked_seed(model: LoadedModel, seed: int) -> int:
    """Check a seed. A deterministic model draws none: it begins with 0."""
    check_int("seed", seed, 0, _U32)
    return 0 if seed == RANDOM_SEED and model.params.deterministic else seed


def greedy(model: LoadedModel) -> Recipe:
    """Select the largest logit."""
    return _recipe(model, ("greedy",), "greedy")


def dist(model: LoadedModel, seed: int = RANDOM_SEED) -> Recipe:
    """Draw by probability."""
    seed = _checked_seed(model, seed)
    return _recipe(model, ("dist", seed), "dist", seed)


def top_k(model: LoadedModel, k: int) -> Recipe:
    """Keep the ``k`` largest."""
    check_int("k", k, -_I32, _I32)
    return _recipe(model, ("top_k", k), "top_k", k)


def _truncating(model: LoadedModel, name: str, p: float, min_keep: int) -> Recipe:
    check_float("p", p, 0.0, 1.0)
    check_int("min_keep", min_keep, 0, _I32)
    return _recipe(model, (name, p, min_keep), name, p, min_keep)


def top_p(model: LoadedModel, p: float, min_keep: int = 0) -> Recipe:
    """Keep the most likely tokens that make up ``p``."""
    return _truncating(model, "top_p", p, min_keep)


def min_p(model: LoadedModel, p: float, min_keep: int = 0) -> Recipe:
    """Keep what is at least ``p`` times as likely as the best."""
    return _truncating(model, "min_p", p, min_keep)


def typical(model: LoadedModel, p: float, min_keep: int = 0) -> Recipe:
    """Keep what is about as surprising as expected."""
    return _truncating(model, "typical", p, min_keep)


def temp(model: LoadedModel, t: float) -> Recipe:
    """Divide the logits."""
    _check_temperature(t)
    return _recipe(model, ("temp", t), "temp", t)


def temp_ext(model: LoadedModel, t: float, delta: float = 0.0, exponent: float = 1.0) -> Recipe:
    """Divide the logits by a temperature that follows the entropy."""
    _check_temperature(t)
    check_float("delta", delta)
    check_float("exponent", exponent)
    return _recipe(model, ("temp_ext", t, delta, exponent), "temp_ext", t, delta, exponent)


def _check_temperature(t: float) -> None:
    check_float("t", t)
    if 0 < t < SMALLEST_TEMPERATURE:
        raise RequestError("set t", f"{t} is too small to divide by", "0 takes the best token")


def xtc(model: LoadedModel, p: float, t: float, min_keep: int = 0, seed: int = RANDOM_SEED) -> Recipe:
    """Drop the most likely tokens now and then."""
    check_float("p", p, 0.0, 1.0)
    check_float("t", t)
    check_int("min_keep", min_keep, 0, _I32)
    seed = _checked_seed(model, seed)
    return _recipe(model, ("xtc", p, t, min_keep, seed), "xtc", p, t, min_keep, seed)


def top_n_sigma(model: LoadedModel, n: float) -> Recipe:
    """Keep what is within ``n`` standard deviations of the best."""
    check_float("n", n)
    return _recipe(model, ("top_n_sigma", n), "top_n_sigma", n)


def mirostat(model: LoadedModel, seed: int, tau: float, eta: float, m: int) -> Recipe:
    """Select at a steady surprise, version 1."""
    seed = _checked_seed(model, seed)
    _check_mirostat(tau, eta)
    check_int("m", m, 1, _I32)
    n_vocab = model.vocab.n_tokens
    return _recipe(model, ("mirostat", seed, tau, eta, m), "mirostat", n_vocab, seed, tau, eta, m)


def mirostat_v2(model: LoadedModel, seed: int, tau: float, eta: float) -> Recipe:
    """Select at a steady surprise, version 2."""
    seed = _checked_seed(model, seed)
    _check_mirostat(tau, eta)
    return _recipe(model, ("mirostat_v2", seed, tau, eta), "mirostat_v2", seed, tau, eta)


def _check_mirostat(tau: float, eta: float) -> None:
    check_float("tau", tau)
    check_float("eta", eta)


def adaptive_p(model: LoadedModel, target: float, decay: float = 0.9, seed: int = RANDOM_SEED) -> Recipe:
    """Select near a probability."""
    check_float("target", target, high=1.0)
    check_float("decay", decay, 0.0, 1.0)
    seed = _checked_seed(model, seed)
    return _recipe(model, ("adaptive_p", target, decay, seed), "adaptive_p", target, decay, seed, is_adaptive=True)


def penalties(model: LoadedModel, last_n: int, repeat: float, frequency: float, presence: float) -> Recipe:
    """Penalise tokens that were there before."""
    check_int("last_n", last_n, 0, _I32)
    check_float("repeat", repeat, 1e-30, 1e30)
    check_float("frequency", frequency, -MAX_PENALTY, MAX_PENALTY)
    check_float("presence", presence, -MAX_PENALTY, MAX_PENALTY)
    acts = last_n > 0 and (repeat != 1 or frequency != 0 or presence != 0)
    key = ("penalties", last_n, repeat, frequency, presence)
    args = (model.vocab.n_tokens, last_n, repeat, frequency, presence)
    return _recipe(model, key, "penalties", *args, prompt_tokens=last_n if acts else 0)


def dry(
    model: LoadedModel,
    multiplier: float,
    base: float,
    allowed_length: int,
    last_n: int,
    sequence_breakers: Sequence[str],
) -> Recipe:
    """Penalise what would go on with a repetition."""
    check_float("multiplier", multiplier, 0.0)
    check_float("base", base)
    check_int("allowed_length", allowed_length, 0, _I32)
    check_int("last_n", last_n, 0, _I32)
    breakers = [check_text("sequence_breakers", text) for text in _strings("sequence_breakers", sequence_breakers)]
    acts = last_n > 0 and multiplier != 0 and base >= 1

    def make() -> Leaf:
        native = model.native
        with ExitStack() as stack:
            table = _text_table(model, stack, breakers)
            ptr = native.llama_sampler_init_dry(
                model._vocab_ptr, multiplier, base, allowed_length, last_n, table, len(breakers)
            )
        key = ("dry", multiplier, base, allowed_length, last_n, *breakers)
        return Leaf(int(ptr), key, prompt_tokens=last_n if acts else 0)

    return make


def logit_bias(model: LoadedModel, biases: Mapping[int, float]) -> Recipe:
    """Add to the logits of some tokens."""
    checked = dict(SamplingParams(logit_bias=biases).logit_bias)
    n_vocab = model.vocab.n_tokens
    for token in checked:
        if token >= n_vocab:
            raise RequestError("set logit_bias", f"token {token} is not in the vocabulary")
    if sum(bias == -np.inf for bias in checked.values()) >= n_vocab:
        raise RequestError("set logit_bias", "every token is forbidden")

    def make() -> Leaf:
        packed = b"".join(struct.pack("<if", token, bias) for token, bias in checked.items())
        with model.native.array(packed) as ptr:
            sampler = model.native.llama_sampler_init_logit_bias(n_vocab, len(checked), ptr)
        return Leaf(int(sampler), ("logit_bias", *checked.items()), keeps_order_flag=True)

    return make


def infill(model: LoadedModel) -> Recipe:
    """Choose for filling in the middle."""
    if model.vocab.eot is None and model.vocab.eos is None:
        # The guest asserts that one of them is there when nothing else is left.
        raise RequestError("create an infill sampler", "the model has neither an end-of-turn nor an end token")
    return _recipe(model, ("infill",), "infill", model._vocab_ptr)


def grammar(model: LoadedModel, text: str, root: str = "root") -> Recipe:
    """Allow what a GBNF grammar does."""
    _check_grammar(model, text, root)
    return _grammar(model, (text, root), lambda: model.native.llama_sampler_init_grammar(model._vocab_ptr, text, root))


def grammar_lazy_patterns(model: LoadedModel, text: str, triggers: Sequence[str | int], root: str = "root") -> Recipe:
    """Allow what a GBNF grammar does, once it was triggered."""
    _check_grammar(model, text, root)
    patterns, tokens = split_triggers(triggers)
    for token in tokens:
        model.vocab._check(token, "set grammar_triggers")

    def init() -> int:
        with ExitStack() as stack:
            table = _text_table(model, stack, patterns)
            ids = stack.enter_context(model.native.array(np.asarray([*tokens, 0], "<i4")))
            return int(
                model.native.llama_sampler_init_grammar_lazy_patterns(
                    model._vocab_ptr, text, root, table, len(patterns), ids, len(tokens)
                )
            )

    return _grammar(model, (text, root, *triggers), init)


def split_triggers(triggers: Sequence[str | int]) -> tuple[list[str], list[int]]:
    """Return the patterns and the tokens among the triggers of a lazy grammar."""
    patterns = [check_text("grammar_triggers", trigger) for trigger in triggers if not isinstance(trigger, int)]
    tokens = [trigger for trigger in triggers if isinstance(trigger, int)]
    for token in tokens:
        check_int("grammar_triggers", token, 0, _I32)
    if not patterns and not tokens:
        raise RequestError("set grammar_triggers", "there is none", "a lazy grammar would never act")
    return patterns, tokens


def _check_grammar(model: LoadedModel, text: str, root: str) -> None:
    model.vocab._check_present("set grammar")
    if not check_text("grammar", text):
        raise RequestError("set grammar", "it is empty")
    check_text("root", root)
    check_grammar_text(text)


def _grammar(model: LoadedModel, key: tuple[object, ...], init: Callable[[], Any]) -> Recipe:
    def make() -> Leaf:
        mark = model.guest_log.mark()
        try:
            ptr = int(init())
        except GuestException as error:  # std::regex_error
            raise RequestError("set grammar_triggers", error.reason, "a trigger is an ECMAScript pattern") from error
        if not ptr:
            reason = _parse_error(model, mark)
            if reason.endswith("std::bad_alloc"):  # which llama.cpp catches, and only logs
                raise OutOfMemoryError("set grammar", reason, "raise memory_limit_bytes, or use a smaller grammar")
            raise RequestError("set grammar", reason, "see llama.cpp's grammars/README.md")
        return Leaf(ptr, ("grammar", *key), is_grammar=True, keeps_order_flag=True)

    return make


def _parse_error(model: LoadedModel, mark: int) -> str:
    """Return why a grammar was refused: the parser writes it to standard error, before the log says that it failed."""
    for line in model.guest_log.since(mark, with_warnings=True).lines:
        _, found, reason = line.partition("error parsing grammar: ")
        if found:
            return reason
    return model.guest_log.since(mark).reason("it does not parse")


def custom(model: LoadedModel, functions: CustomSampler) -> Recipe:
    """Call Python."""

    def make() -> Leaf:
        hook = SamplerHook(model.native, functions)
        return Leaf(hook.ptr, ("custom", id(functions)), ALL_TOKENS if functions.accept else 0, hook=hook)

    return make


def _strings(name: str, values: Sequence[str]) -> Sequence[str]:
    if isinstance(values, str):
        raise RequestError(f"set {name}", f"{values!r} is not a list of strings")
    return values


def _text_table(model: LoadedModel, stack: ExitStack, texts: Sequence[str]) -> int:
    """Copy texts into the guest, and the ``const char **`` of them, for as long as ``stack`` is open."""
    native = model.native
    pointers = [stack.enter_context(native.array(text.encode() + b"\0")) for text in texts]
    return stack.enter_context(native.array(np.asarray([*pointers, 0], "<u4")))


# -- the chain of common_sampler_init ---------------------------------------------------------------------------------


def build_parts(model: LoadedModel, params: SamplingParams, beside: Recipe | None = None) -> Callable[[], Parts]:
    """Return what makes the chain of ``params`` and the grammar beside it, in the order of ``common_sampler_init``.

    ``beside`` makes what stands in the place of the grammar of ``params``.
    """
    biases: dict[int, float] = dict(params.logit_bias)
    if params.ignore_eos:
        biases.update(dict.fromkeys(model.vocab.eog_tokens(), -np.inf))
    logit_bias(model, biases)  # checks them
    recipes = [_named(model, params, name) for name in _names(params)]
    if beside is None and params.grammar and params.grammar_lazy:
        beside = grammar_lazy_patterns(model, params.grammar, params.grammar_triggers)
    elif beside is None and params.grammar:
        beside = grammar(model, params.grammar)

    def make() -> Parts:
        biases.update(dict.fromkeys(_suppressed(model), -np.inf))
        bias = [logit_bias(model, biases)] if biases else []
        forbidden = tuple(token for token, value in biases.items() if value == -np.inf)
        parts = Parts(new_chain(model), is_chain=True, forbidden=forbidden)
        try:
            for recipe in [*bias, *recipes]:
                leaf = recipe()
                model.native.llama_sampler_chain_add(parts.ptr, leaf.ptr)
                parts.leaves.append(leaf)
            parts.grammar = _filter(model, beside(), forbidden) if beside else None
        except BaseException:
            if not model.engine.is_dead:
                model.native.llama_sampler_free(parts.ptr)
            raise
        return parts

    return make


def _filter(model: LoadedModel, leaf: Leaf, forbidden: tuple[int, ...]) -> Leaf:
    """Let the grammar beside a chain also refuse what the chain forbids.

    Else nothing might be left of the tokens it allows, which the guest notices only between the two.
    """
    if forbidden:
        native, grammar = model.native, leaf.ptr
        leaf.ptr = new_chain(model)
        native.llama_sampler_chain_add(leaf.ptr, grammar)
        native.llama_sampler_chain_add(leaf.ptr, logit_bias(model, dict.fromkeys(forbidden, -np.inf))().ptr)
    return leaf


def new_chain(model: LoadedModel, no_perf: bool = True) -> int:
    """Return an empty ``llama_sampler_chain``; on the engine thread."""
    params = model.native.llama_sampler_chain_default_params()
    params["no_perf"] = no_perf
    return int(model.native.llama_sampler_chain_init(params))


def _names(params: SamplingParams) -> list[str]:
    """Return the samplers of the chain after the biases, the one that selects last."""
    if params.mirostat:
        return ["temp", f"mirostat{params.mirostat}"]
    names = [name for name in params.samplers if name != "adaptive_p"]
    if "adaptive_p" in params.samplers:
        return [*names, "adaptive_p"]
    last = params.samplers[-1] if params.samplers else ""
    if last == "temperature" and params.temperature <= 0 and params.dynatemp_range == 0:
        while names and _keeps_largest(params, names[-1]):  # those in front decide what later ones see
            names.pop()
        return [*names, "greedy"]
    return [*names, "greedy" if last == "top_k" and params.top_k == 1 else "dist"]


def _keeps_largest(params: SamplingParams, name: str) -> bool:
    """Whether a sampler leaves the largest logit the largest, so that a chain that ends in ``greedy`` needs it not."""
    if name == "typical_p":
        return params.typical_p >= 1
    if name == "xtc":
        return params.xtc_probability <= 0
    return name in ("top_n_sigma", "top_k", "top_p", "min_p", "temperature")


def _named(model: LoadedModel, p: SamplingParams, name: str) -> Recipe:
    makers: dict[str, Callable[[], Recipe]] = {
        "penalties": lambda: penalties(
            model, p.penalty_last_n, p.repeat_penalty, p.frequency_penalty, p.presence_penalty
        ),
        "dry": lambda: dry(
            model, p.dry_multiplier, p.dry_base, p.dry_allowed_length, p.dry_penalty_last_n, p.dry_sequence_breakers
        ),
        "top_n_sigma": lambda: top_n_sigma(model, p.top_n_sigma),
        "top_k": lambda: top_k(model, p.top_k),
        "typical_p": lambda: typical(model, p.typical_p, p.min_keep),
        "top_p": lambda: top_p(model, p.top_p, p.min_keep),
        "min_p": lambda: min_p(model, p.min_p, p.min_keep),
        "xtc": lambda: xtc(model, p.xtc_probability, p.xtc_threshold, p.min_keep, p.seed),
        "temperature": lambda: temp_ext(model, p.temperature, p.dynatemp_range, p.dynatemp_exponent),
        "temp": lambda: temp(model, p.temperature),
        "infill": lambda: infill(model),
        "adaptive_p": lambda: adaptive_p(model, p.adaptive_target, p.adaptive_decay, p.seed),
        "mirostat1": lambda: mirostat(model, p.seed, p.mirostat_tau, p.mirostat_eta, _MIROSTAT_M),
        "mirostat2": lambda: mirostat_v2(model, p.seed, p.mirostat_tau, p.mirostat_eta),
        "greedy": lambda: greedy(model),
        "dist": lambda: dist(model, p.seed),
    }
    return makers[name]()


def _suppressed(model: LoadedModel) -> list[int]:
    """Return the tokens that the model itself forbids."""
    native, memory = model.native, model.engine.memory
    with native.array(bytes(4)) as count:
        ptr = int(native.llama_vocab_get_suppress_tokens(model._vocab_ptr, count))
        n = memory.u32(count)
    if not ptr or not 0 < n <= model.vocab.n_tokens:
        return []
    tokens = np.frombuffer(memory.read(ptr, 4 * n), "<i4")
    return [int(token) for token in tokens if 0 <= token < model.vocab.n_tokens]
