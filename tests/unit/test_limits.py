"""Limits: values, presets, and how they merge with a model's other arguments."""

from __future__ import annotations

import json

import pytest

import pyllama_wasm as pw
from pyllama_wasm._model_limits import bounded, merged_limits
from pyllama_wasm.deadline import current_deadline
from pyllama_wasm.sandbox_report import powers_off

FIELDS = ("memory_bytes", "threads", "deadline_s", "output_bytes", "open_files")


def test_trusted_limits_nothing_and_untrusted_everything() -> None:
    assert pw.Limits.trusted() == pw.Limits()
    assert set(pw.Limits().to_dict().values()) == {None, False}
    untrusted = pw.Limits.untrusted()
    assert tuple(untrusted.to_dict()) == (*FIELDS, "snapshot")
    assert all(untrusted.to_dict().values())
    assert pw.Limits.untrusted(deadline_s=5).deadline_s == 5
    assert pw.Limits.trusted(threads=1) == pw.Limits(threads=1)
    json.dumps(untrusted.to_dict())


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [0, -1, "1", True, float("nan")])
def test_each_limit_is_positive_or_none(name: str, value: object) -> None:
    with pytest.raises(pw.RequestError, match=name):
        pw.Limits(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_a_snapshot_is_taken_or_not(value: object) -> None:
    with pytest.raises(pw.RequestError, match="snapshot"):
        pw.Limits(snapshot=value)  # type: ignore[arg-type]


def test_unknown_limits_are_refused() -> None:
    with pytest.raises(pw.RequestError, match="unknown limit"):
        pw.Limits.untrusted(cpu=1)


def test_the_stricter_of_limit_and_argument_holds() -> None:
    limits, n_threads = merged_limits(pw.Limits(memory_bytes=100, threads=2), 8, 50)
    assert (limits.memory_bytes, n_threads) == (50, 2)
    limits, n_threads = merged_limits(pw.Limits(memory_bytes=100, threads=2), 1, 500)
    assert (limits.memory_bytes, n_threads) == (100, 1)
    limits, n_threads = merged_limits(None, None, None)
    assert limits == pw.Limits() and n_threads >= 1
    for n in (0, -1, True, 1.5):
        with pytest.raises(pw.RequestError, match="n_threads"):
            merged_limits(None, n, None)  # type: ignore[arg-type]
    with pytest.raises(pw.RequestError, match="limits is dict"):
        merged_limits({}, None, None)  # type: ignore[arg-type]


def test_a_calls_own_deadline_comes_before_the_models() -> None:
    limits = pw.Limits(deadline_s=60)
    with bounded(limits, None) as own:
        assert own is not None and own.seconds == 60
    with bounded(limits, 300) as own:
        assert own is not None and own.seconds == 300
    with pw.deadline(200) as outer, bounded(limits, None):
        assert current_deadline() is outer
    with bounded(pw.Limits(), None) as own:
        assert own is None


def test_a_power_that_an_import_gives_is_not_off() -> None:
    assert "sockets" in powers_off(("host.log", "wasi_snapshot_preview1.fd_read"))
    off = powers_off(("wasi_snapshot_preview1.sock_accept", "wasi_snapshot_preview1.environ_get"))
    assert "sockets" not in off and "environment variables" not in off and "links" in off
