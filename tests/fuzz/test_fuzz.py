"""A fixed few cases of every target through the module as it is, and each oracle against a fault that was put there."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import pyllama_wasm as pw

from . import __main__ as command
from . import findings as findings_module
from . import oracles as oracles_module
from .coverage import Seen
from .findings import Findings, minimise, signature
from .fuzzer import Campaign, Entry, Fuzzer
from .gguf_mutator import mutate_gguf
from .json_mutator import mutate_json
from .lab import DEADLINE_S, Lab
from .mutators import MAX_BYTES, mutate_bytes, mutate_text
from .oracles import Drift, Oracles, Outcome, message_fault, observe
from .report import markdown, merged, row
from .state_mutator import mutate_state
from .targets import TARGETS, Target

CASES, CASES_OF_SLOW = 30, 8
"""Of each target, beside its good inputs."""

SLOW = ("projector", "sound")

SEED = 20260101


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("lab"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def oracles(lab: Lab) -> Iterator[Oracles]:
    made = Oracles(lab)
    yield made
    made.close()


@pytest.fixture
def fuzzer(lab: Lab, oracles: Oracles, tmp_path: Path) -> Fuzzer:
    return Fuzzer(lab, oracles, Findings(tmp_path), None, SEED, None)


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_inputs_of_a_fixed_seed(name: str, lab: Lab, oracles: Oracles, fuzzer: Fuzzer) -> None:
    campaign = fuzzer.start(TARGETS[name])
    assert campaign.kinds["ok"] >= 0.7 * campaign.n_cases, campaign.kinds  # else everything below would be refused
    n_good = campaign.n_cases
    n_spoiled = CASES_OF_SLOW if name in SLOW else CASES
    for _ in range(n_spoiled):
        fuzzer.step(campaign)
    found = fuzzer.findings.all()
    assert not [item for item in found if not str(item["fault"]).startswith("ended the sandbox")], found
    assert campaign.n_faults == 0
    assert campaign.n_cases == n_good + n_spoiled
    assert campaign.kinds["ok"] < campaign.n_cases, "no input was spoiled"
    last = observe(lambda: TARGETS[name].run(lab, campaign.corpus[0].data))
    assert oracles.faults(last, is_dear=True) == []


def test_the_same_seed_spoils_the_same_way(lab: Lab) -> None:
    for target in TARGETS.values():
        seed = target.seeds(lab)[0]
        made = [[target.mutate(seed, random.Random(i)) for i in range(20)] for _ in range(2)]
        assert made[0] == made[1]
        assert sum(data != seed for data in made[0]) > 10, target.name


def test_mutators_take_anything() -> None:
    for i in range(300):
        rng = random.Random(i)
        data = rng.randbytes(rng.choice((0, 1, 3, 24, 500)))
        if i % 3 == 0:
            data = b"GGUF\3\0\0\0" + data
        for mutate in (mutate_bytes, mutate_gguf, mutate_state):
            assert len(mutate(data, rng)) <= MAX_BYTES
        mutate_text(data, rng, (b"a",))
        mutate_json(rng.choice((data, b"[[1]]", b"{}", b"3")), rng, (b"a",))


# -- each oracle, against a fault ---------------------------------------------------------------------------------


def _raises(error: BaseException) -> Callable[[], bytes]:
    def run() -> bytes:
        raise error

    return run


def _faults(oracles: Oracles, run: Callable[[], bytes], *, is_dear: bool = False) -> str:
    return "; ".join(oracles.faults(observe(run), is_dear))


def test_an_exception_of_another_kind_is_a_fault(oracles: Oracles) -> None:
    assert "not the package's: KeyError" in _faults(oracles, _raises(KeyError("x")))
    assert _faults(oracles, _raises(pw.RequestError("a", "b"))) == ""


def test_messages_are_a_fault_when_they_are_long_or_unclean(oracles: Oracles) -> None:
    for bad in ("\x1b[2J", "x" * 5000, "", "\u202e", "\udcff"):
        assert message_fault(bad)
        error = pw.RequestError("a")
        error.args = (bad,)
        assert "a message" in _faults(oracles, _raises(error))
    assert message_fault("load x: a reason\nin two lines (hint)") is None


def test_a_canary_that_comes_out_is_a_fault(oracles: Oracles, lab: Lab) -> None:
    secret, name = oracles.canary.secret, oracles.canary.name
    assert os.environ["PYLLAMA_FUZZ_CANARY"] == secret
    assert oracles.neighbour.model.metadata["general.name"] == name
    assert "canary" in _faults(oracles, lambda: f"x{secret}y".encode())
    assert "canary" in _faults(oracles, _raises(pw.RequestError("read", name)))
    logging.getLogger("pyllama_wasm.guest").warning("%s", secret)
    assert "log: the canary" in _faults(oracles, lambda: b"")
    logging.getLogger("pyllama_wasm.guest").warning("\x1b[2J")
    assert "log: a message with" in _faults(oracles, lambda: b"")
    assert "in a sandbox" not in _faults(oracles, lambda: b"", is_dear=True)
    model = lab.model("spm")
    with model.native.array(secret.encode()):
        assert "in a sandbox" in _faults(oracles, lambda: b"", is_dear=True)


def test_a_changed_neighbour_is_a_fault(oracles: Oracles, lab: Lab) -> None:
    with oracles.neighbour.model.load_lora(lab.seeds.adapter) as lora:
        oracles.neighbour.context.set_loras({lora: 1e-3})
        assert "neighbour" in _faults(oracles, lambda: b"", is_dear=True)
        oracles.neighbour.context.set_loras(None)
    assert _faults(oracles, lambda: b"", is_dear=True) == ""


def test_a_good_model_that_no_longer_loads_is_a_fault(
    oracles: Oracles, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = lab.seeds.model
    monkeypatch.setitem(lab.seeds.__dict__, "model", whole[:-100])
    assert "no longer loads: ModelFormatError" in _faults(oracles, _raises(pw.GuestAbortError("a", "b")))
    monkeypatch.setitem(lab.seeds.__dict__, "model", lab.seeds.mamba)
    assert "says something else" in _faults(oracles, _raises(pw.GuestAbortError("a", "b")))


def test_what_stays_open_is_a_fault(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self").is_dir():
        pytest.skip("the system does not tell what a process has open")
    drift = Drift(lab)
    assert drift.fault(lab) is None
    with (tmp_path / "file").open("wb"):
        assert drift.fault(lab) == "1 more descriptors, 0 more threads than before"
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, daemon=True)
    thread.start()
    try:
        assert drift.fault(lab) == "0 more descriptors, 1 more threads than before"
    finally:
        stop.set()
        thread.join()
    monkeypatch.setattr(oracles_module, "RSS_BYTES", -(1 << 40))
    assert "more bytes in memory" in str(drift.fault(lab))


def test_a_missed_deadline_is_a_fault(oracles: Oracles) -> None:
    late = Outcome("ok", "", DEADLINE_S + 1.5)
    assert oracles.faults(late, is_dear=False) == ["it ended 1.50 s past its deadline"]


def _hopeless(_: Lab, data: bytes) -> bytes:
    if b"\x07" in data:
        raise KeyError("x")
    return b""


def test_a_finding_is_kept_small_and_once(fuzzer: Fuzzer) -> None:
    target = Target("planted", lambda _: [b"good"], lambda data, rng: bytes(40) + b"\7" + rng.randbytes(3), _hopeless)
    campaign = fuzzer.start(target)
    for _ in range(3):
        fuzzer.step(campaign)
    (found,) = fuzzer.findings.all()
    assert found["fault"] == "an exception that is not the package's: KeyError"
    assert Path(str(found["path"])).read_bytes() == b"\7"
    assert (campaign.n_faults, row(campaign)["faults"]) == (3, 3)
    text = markdown(merged([row(campaign)] * 2), [], 1, [found])
    assert "broke another oracle: 6 of 8" in text and "hung it: 1 of 8" in text


def test_differences_are_undone_where_the_length_stayed() -> None:
    origin = bytes(64)
    broken = bytes(range(64))
    assert minimise(broken, origin, lambda data: data[40] == 40) == bytes(40) + b"\x28" + bytes(23)
    assert signature("at 0x1234: 55 bytes") == signature("at 0xff: 7 bytes") != signature("at f.cpp:7")
    assert findings_module.TRIES > 1


def test_the_parent_sees_a_child_that_dies_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current = tmp_path / "current"
    current.write_bytes(b"x\n")
    dies = subprocess.Popen([sys.executable, "-c", "import os; os.abort()"], stderr=subprocess.DEVNULL)
    assert not command._wait(dies, current)
    assert dies.returncode != 0
    monkeypatch.setattr(command, "HANG_S", 1.0)
    hangs = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stderr=subprocess.DEVNULL)
    began = time.monotonic()
    assert command._wait(hangs, current)
    assert time.monotonic() - began < 30
    assert hangs.returncode != 0


def test_new_edges_are_those_not_seen_as_often() -> None:
    seen = Seen(4)
    assert seen.add(np.array([1, 0, 0, 0], np.uint8))
    assert not seen.add(np.array([1, 0, 0, 0], np.uint8))
    assert seen.add(np.array([2, 0, 0, 0], np.uint8))
    assert seen.add(np.array([1, 0, 0, 128], np.uint8))
    assert seen.n_edges == 2


def test_who_had_children_is_picked_more_often() -> None:
    quick, slow, fertile = Entry(b"", 0.01, 3), Entry(b"", 1.0, 3), Entry(b"", 0.01, 3, n_children=4)
    assert fertile.weight > quick.weight > slow.weight
    assert Entry(b"", 0.01, 100).weight < quick.weight
    assert Campaign(TARGETS["gguf"]).n_cases == 0
