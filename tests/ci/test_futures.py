"""Models on mutated sources: whatever transformers does next, compat ends exact or refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.stack import FORKS

from ci.futures import trial as futures
from ci.futures.mutations import HARMLESS, MEANING, MUTATIONS, UNCHANGED
from ci.futures.rewrite import FAMILIES, Copy, DoesNotApply
from ci.futures.trial import BROKEN, EXACT, NOT_MADE, REFUSED, SLOWER, WRONG, Outcome

pytestmark = pytest.mark.skipif(FORKS, reason="the forks have no hooks that could fail")
ROOT = Path(__file__).parents[2]
PAIRS = futures.pairs()
# One of each kind; `nox -s test-futures` runs all.
SOME = [
    "the state renamed to what another family calls it, mamba",
    "the mixer returns a pair, bamba",
    "the scan's arguments in another order, rwkv",
    "time steps not clamped by the scan, mamba2",
    "a factor on the output of the second mixer, bamba",
]


def run(code, *arguments):
    """Run code in a process that has imported nothing, and return the last thing that it prints."""
    done = subprocess.run(
        [sys.executable, *code, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    return [Outcome(**outcome) for outcome in json.loads(done.stdout.splitlines()[-1])]


def judged(*words):
    outcomes = run(["-m", "ci.futures"], "--json", *words)
    assert futures.faults(outcomes) == []
    assert {outcome.verdict for outcome in outcomes} <= {EXACT, SLOWER, REFUSED}
    return outcomes


def test_a_future_ends_exact_or_refused():
    found = judged(*(f"^{re.escape(name)}$" for name in SOME))
    assert {outcome.name for outcome in found} >= set(SOME)


@pytest.mark.slow
def test_every_future_ends_exact_or_refused():
    assert len(judged()) == len(PAIRS)


# Faults of a compat; each runs in a fork that has imported no model.
SABOTAGE = """
import dataclasses, importlib, json, multiprocessing
from ci.futures import trial as futures

for module in futures.SHARED:
    importlib.import_module(module)
import compat, torch

def wrong(model, *, input_ids, **_):
    yield 0, torch.zeros(*input_ids.shape, model.config.hidden_size)

def crash(*_, **__):
    raise ZeroDivisionError

def refuse(*_, **__):
    raise compat.UnsupportedVersionError("found", "needed", "remedy")

def break_training():
    model = importlib.import_module("transformers.models.rwkv.modeling_rwkv").RwkvModel
    forward = model.forward
    model.forward = lambda self, *a, **k: (crash if self.training else forward)(self, *a, **k)

FAULTS = {
    "wrong": ("iter_chunks", wrong),
    "crash": ("iter_chunks", crash),
    "refuse": ("enable_vertical_chunking", refuse),
    "break training": ("enable_vertical_chunking", break_training),
}

def judge(fault):
    setattr(compat, *FAULTS[fault])
    return dataclasses.asdict(futures.judge("nothing is changed", "rwkv"))

with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
    print(json.dumps(pool.map(judge, FAULTS, chunksize=1)))
"""


def test_a_compat_that_is_at_fault_is_seen():
    found = run(["-c", SABOTAGE])
    assert [outcome.verdict for outcome in found] == [WRONG, BROKEN, BROKEN, BROKEN]
    for outcome, place in zip(found, ["chunks", "chunks", "enable", "training"], strict=True):
        assert outcome.because()[0].startswith(place)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_finds_its_place_in_the_installed_release(mutation):
    for family in MUTATIONS[mutation].families:
        copy = MUTATIONS[mutation].applied(family)
        for name, text in copy.sources.items():
            compile(text, name, "exec")
        assert copy.argument
        assert copy.output


def test_a_mutation_without_its_place_is_an_error():
    copy = Copy("mamba2")
    with pytest.raises(DoesNotApply, match="0 times, not 1"):
        copy.swap("Mamba2Mixer.forward", "there is no such text", "")
    with pytest.raises(DoesNotApply, match="0 Mamba3Mixer"):
        copy.swap("Mamba3Mixer.forward", "self", "")
    with pytest.raises(DoesNotApply, match="nobody calls"):
        copy.rename(("cache",), "memory", (), ["self.no_such_module"])
    with pytest.raises(DoesNotApply, match="has no"):
        copy.rename(("no_such_name",), "memory", ["Mamba2Mixer"])


def outcomes(**changes):
    """Make outcomes: an unchanged model, a harmless change, and a change of meaning."""
    harmless = next(name for name, m in MUTATIONS.items() if m.kind == HARMLESS != name)
    meaning = next(name for name, m in MUTATIONS.items() if m.kind == MEANING)
    numbers = {UNCHANGED: [1.0, 2.0], "harmless": [1.0, 2.0], "meaning": [1.0, 2.5]} | changes
    names = {UNCHANGED: UNCHANGED, "harmless": harmless, "meaning": meaning}
    return [Outcome(names[key], "mamba2", EXACT, {}, numbers[key]) for key in names]


def test_a_mutation_that_does_not_do_what_it_says_is_a_fault():
    assert futures.faults(outcomes()) == []
    assert len(futures.faults(outcomes(harmless=[1.0, 2.1]))) == 1
    assert len(futures.faults(outcomes(meaning=[1.0, 2.0]))) == 1


@pytest.mark.parametrize("verdict", [BROKEN, WRONG, NOT_MADE])
def test_the_table_says_what_was_found_and_why_it_is_a_fault(verdict):
    found = Outcome(UNCHANGED, "rwkv", verdict, {"chunks: off by 1e+00": verdict, "else": SLOWER})
    assert futures.faults([found]) == [f"{UNCHANGED}, rwkv: {verdict}. chunks: off by 1e+00"]
    cells = ["-"] * len(FAMILIES)
    cells[list(FAMILIES).index("rwkv")] = verdict
    assert futures.table([found]).splitlines()[-1] == (
        f"| {UNCHANGED} | the same | {' | '.join(cells)} |"
    )


def test_the_table_says_why_something_is_refused():
    found = Outcome(UNCHANGED, "rwkv", REFUSED, {"chunks: why": REFUSED})
    assert futures.faults([found]) == []
    assert futures.table([found]).endswith(f"- {UNCHANGED}, rwkv: chunks: why")
