"""The constructors of single samplers: ``Sampler.top_k(model, 40)`` and its like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from . import samplers
from .candidates import Candidates
from .custom_sampler import CustomSampler
from .params import DRY_SEQUENCE_BREAKERS, RANDOM_SEED

if TYPE_CHECKING:
    from .loaded_model import LoadedModel
    from .sampler import Sampler

__all__ = ["SamplerMakers"]


class SamplerMakers:
    """One class method for each sampler of llama.cpp; all raise ``RequestError`` for arguments out of range."""

    @classmethod
    def _single(cls, model: LoadedModel, recipe: samplers.Recipe) -> Sampler:
        raise NotImplementedError

    # -- those that select a token, at the end of a chain -------------------------------------------------------------

    @classmethod
    def greedy(cls, model: LoadedModel) -> Sampler:
        """Select the largest logit: ``llama_sampler_init_greedy``."""
        return cls._single(model, samplers.greedy(model))

    @classmethod
    def dist(cls, model: LoadedModel, seed: int = RANDOM_SEED) -> Sampler:
        """Draw a token by its probability: ``llama_sampler_init_dist``."""
        return cls._single(model, samplers.dist(model, seed))

    @classmethod
    def mirostat(
        cls, model: LoadedModel, *, seed: int = RANDOM_SEED, tau: float = 5.0, eta: float = 0.1, m: int = 100
    ) -> Sampler:
        """Select so that the surprise stays near ``tau`` bits, version 1: ``llama_sampler_init_mirostat``.

        ``eta`` is the learning rate, ``m`` how many tokens the estimate looks at.
        """
        return cls._single(model, samplers.mirostat(model, seed, tau, eta, m))

    @classmethod
    def mirostat_v2(cls, model: LoadedModel, *, seed: int = RANDOM_SEED, tau: float = 5.0, eta: float = 0.1) -> Sampler:
        """Select so that the surprise stays near ``tau`` bits, version 2: ``llama_sampler_init_mirostat_v2``."""
        return cls._single(model, samplers.mirostat_v2(model, seed, tau, eta))

    @classmethod
    def adaptive_p(cls, model: LoadedModel, target: float, *, decay: float = 0.9, seed: int = RANDOM_SEED) -> Sampler:
        """Select near the probability ``target`` over time: ``llama_sampler_init_adaptive_p``.

        A negative target draws as ``dist`` does. ``decay`` (up to 0.99) says how long the past counts.
        """
        return cls._single(model, samplers.adaptive_p(model, target, decay, seed))

    # -- those that leave fewer tokens --------------------------------------------------------------------------------

    @classmethod
    def top_k(cls, model: LoadedModel, k: int) -> Sampler:
        """Keep the ``k`` largest logits, sorted; 0 or less keeps all: ``llama_sampler_init_top_k``."""
        return cls._single(model, samplers.top_k(model, k))

    @classmethod
    def top_p(cls, model: LoadedModel, p: float, min_keep: int = 0) -> Sampler:
        """Keep the most likely tokens that make up ``p``, ``min_keep`` at least: ``llama_sampler_init_top_p``."""
        return cls._single(model, samplers.top_p(model, p, min_keep))

    @classmethod
    def min_p(cls, model: LoadedModel, p: float, min_keep: int = 0) -> Sampler:
        """Keep what is at least ``p`` times as likely as the best: ``llama_sampler_init_min_p``."""
        return cls._single(model, samplers.min_p(model, p, min_keep))

    @classmethod
    def typical(cls, model: LoadedModel, p: float, min_keep: int = 0) -> Sampler:
        """Keep the tokens about as surprising as expected that make up ``p``: ``llama_sampler_init_typical``."""
        return cls._single(model, samplers.typical(model, p, min_keep))

    @classmethod
    def top_n_sigma(cls, model: LoadedModel, n: float) -> Sampler:
        """Forbid what is more than ``n`` standard deviations below the best: ``llama_sampler_init_top_n_sigma``."""
        return cls._single(model, samplers.top_n_sigma(model, n))

    @classmethod
    def xtc(cls, model: LoadedModel, p: float, t: float, *, min_keep: int = 0, seed: int = RANDOM_SEED) -> Sampler:
        """With the probability ``p`` drop all tokens above ``t`` but the least likely: ``llama_sampler_init_xtc``."""
        return cls._single(model, samplers.xtc(model, p, t, min_keep, seed))

    @classmethod
    def infill(cls, model: LoadedModel) -> Sampler:
        """Choose for filling in the middle: ``llama_sampler_init_infill``.

        It compares every candidate with every other: put it behind ``top_k`` and ``top_p``. A whole vocabulary takes
        minutes.
        """
        return cls._single(model, samplers.infill(model))

    # -- those that change logits -------------------------------------------------------------------------------------

    @classmethod
    def temp(cls, model: LoadedModel, t: float) -> Sampler:
        """Divide the logits by ``t``; 0 or less keeps only the best: ``llama_sampler_init_temp``."""
        return cls._single(model, samplers.temp(model, t))

    @classmethod
    def temp_ext(cls, model: LoadedModel, t: float, delta: float = 0.0, exponent: float = 1.0) -> Sampler:
        """Divide by a temperature in ``t ± delta`` that follows the entropy: ``llama_sampler_init_temp_ext``."""
        return cls._single(model, samplers.temp_ext(model, t, delta, exponent))

    @classmethod
    def penalties(
        cls,
        model: LoadedModel,
        last_n: int = 64,
        *,
        repeat: float = 1.0,
        frequency: float = 0.0,
        presence: float = 0.0,
    ) -> Sampler:
        """Penalise tokens among the ``last_n`` that were accepted: ``llama_sampler_init_penalties``."""
        return cls._single(model, samplers.penalties(model, last_n, repeat, frequency, presence))

    @classmethod
    def dry(
        cls,
        model: LoadedModel,
        multiplier: float,
        *,
        base: float = 1.75,
        allowed_length: int = 2,
        last_n: int = 64,
        sequence_breakers: Sequence[str] = DRY_SEQUENCE_BREAKERS,
    ) -> Sampler:
        """Penalise what would continue a repetition longer than ``allowed_length``: ``llama_sampler_init_dry``."""
        return cls._single(model, samplers.dry(model, multiplier, base, allowed_length, last_n, sequence_breakers))

    @classmethod
    def logit_bias(cls, model: LoadedModel, biases: Mapping[int, float]) -> Sampler:
        """Add a number to the logits of some tokens, ``-inf`` forbids: ``llama_sampler_init_logit_bias``."""
        return cls._single(model, samplers.logit_bias(model, biases))

    @classmethod
    def grammar(cls, model: LoadedModel, grammar: str, root: str = "root") -> Sampler:
        """Forbid what the GBNF ``grammar`` does not allow next: ``llama_sampler_init_grammar``.

        In a chain it looks at every candidate; ``SamplingParams(grammar=…)`` asks it about the chosen token first,
        which is much faster. Raises ``RequestError`` when it does not parse or has no ``root``.
        """
        return cls._single(model, samplers.grammar(model, grammar, root))

    @classmethod
    def grammar_lazy_patterns(
        cls, model: LoadedModel, grammar: str, triggers: Sequence[str | int], root: str = "root"
    ) -> Sampler:
        """Let everything pass until a trigger is met, then act as ``grammar``.

        ``triggers`` are those of ``SamplingParams``: ``llama_sampler_init_grammar_lazy_patterns``.
        """
        return cls._single(model, samplers.grammar_lazy_patterns(model, grammar, triggers, root))

    # -- Python -------------------------------------------------------------------------------------------------------

    @classmethod
    def custom(
        cls,
        model: LoadedModel,
        apply: Callable[[Candidates], object],
        *,
        accept: Callable[[int], object] | None = None,
        reset: Callable[[], object] | None = None,
        clone: Callable[[], CustomSampler] | None = None,
        name: str = "custom",
    ) -> Sampler:
        """Make a sampler of Python functions: ``llama_sampler_init``. See ``CustomSampler`` for what they do."""
        functions = CustomSampler(apply, accept, reset, clone, name)
        return cls._single(model, samplers.custom(model, functions))
