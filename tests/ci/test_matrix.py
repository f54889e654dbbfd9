"""The verdict on releases that cannot chunk, and the judging of the table of releases."""

import warnings

import pytest
from sentence_transformers import SentenceTransformer
from support.stack import FORKS
from transformers.cache_utils import Cache

import compat
from ci.tables import matrix
from compat.installed import recurrent_cache


@pytest.fixture(autouse=True)
def _probed_anew():
    recurrent_cache.probe.cache_clear()
    yield
    recurrent_cache.probe.cache_clear()


def reasons():
    return {library.library: library.reason for library in compat.status().libraries}


@pytest.mark.skipif(FORKS, reason="the fork has no hooks to be refused")
def test_the_report_says_what_an_old_sentence_transformers_lacks(monkeypatch):
    monkeypatch.delattr(SentenceTransformer, "_inference")
    assert "_inference has no argument" in reasons()["sentence-transformers"]


def test_the_report_says_what_an_old_transformers_lacks(monkeypatch):
    monkeypatch.delattr(Cache, "reorder_cache")
    assert "the rows of its caches cannot be selected" in reasons()["transformers"]


def test_the_last_release_is_the_one_that_is_pinned():
    pins = (matrix.ROOT / "ci" / "constraints.txt").read_text().splitlines()
    names = ["transformers", "sentence-transformers"]
    last = [f"{n}=={v}" for n, v in zip(names, matrix.ENVIRONMENTS[-1], strict=True)]
    assert set(last) <= set(pins)


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ([0.0, 1e-6], "right"),
        ([0.3, 1e-6], "wrong, 0.3"),
        ([1e-6, float("nan")], "wrong, nan"),
        ([float("inf")], "wrong, inf"),
    ],
)
def test_the_judgement_of_errors(errors, said):
    assert matrix.judged(errors) == said


def changed(monkeypatch, row, column, change):
    """Change compat's chunks in one row's hidden state at one token."""
    released = compat.iter_chunks

    def chunks(*args, **kwargs):
        for start, hidden in released(*args, **kwargs):
            if start <= column < start + hidden.shape[1]:
                hidden[row, column - start] += change
            yield start, hidden

    monkeypatch.setattr(compat, "iter_chunks", chunks)


@pytest.mark.parametrize(
    ("place", "change", "said"),
    [
        ((0, 0), 0.0, "right"),
        # Change a padded row's first token, a shorter row's last, and one of a row that is neither.
        ((2, 16), 0.5, "wrong, 0.5"),
        ((2, 8), 0.5, "wrong, 0.5"),
        ((0, 35), 0.5, "wrong, 0.5"),
        ((0, 35), float("nan"), "wrong, nan"),
    ],
)
def test_a_family_is_right_where_each_token_is(monkeypatch, place, change, said):
    changed(monkeypatch, *place, change)
    assert matrix.model("mamba2") == said


def test_a_family_that_warns_of_the_future_is_not_right(monkeypatch):
    released = compat.iter_chunks

    def chunks(*args, **kwargs):
        warnings.warn("the argument is called otherwise", FutureWarning, stacklevel=2)
        return released(*args, **kwargs)

    monkeypatch.setattr(compat, "iter_chunks", chunks)
    assert matrix.model("mamba2").startswith("wrong, FutureWarning: the argument")


FOUND = {
    "versions": list(matrix.ENVIRONMENTS[-1]),
    "reasons": {"transformers": "the reason"},
    "models": {"mamba": "right", "mamba2": "right", "zaya": "not in this release"},
    "encode": "right",
}
OLD = {"versions": ["5.1.0", "6.2.0"]}
CLAIMED = {"versions": ["5.15.0", "6.2.0"]}
NAMED = " ".join(FOUND["versions"])
CELLS = " | ".join(FOUND["versions"])
REFUSED = {"mamba": "refused: no scan", "mamba2": "refused: no scan"}


@pytest.mark.parametrize(
    ("change", "faults", "row"),
    [
        ({}, [], f"| {CELLS} | 2 of 2 | yes |"),
        (OLD, [], "| 5.1.0 | 6.2.0 | 2 of 2 | yes |"),
        (
            OLD | {"models": REFUSED, "encode": "refused: no scan"},
            [],
            "| 5.1.0 | 6.2.0 | none: the reason | no |",
        ),
        (
            {"models": FOUND["models"] | {"mamba": "refused: no scan"}},
            [f"{NAMED}: mamba: refused: no scan"],
            f"| {CELLS} | 1 of 2, not mamba | yes |",
        ),
        (
            CLAIMED | {"models": FOUND["models"] | {"mamba": "refused: no scan"}},
            ["5.15.0 6.2.0: mamba: refused: no scan"],
            "| 5.15.0 | 6.2.0 | 1 of 2, not mamba | yes |",
        ),
        (
            CLAIMED | {"models": {"mamba": "right", "recurrent_gemma": "refused: its cache"}},
            [],
            "| 5.15.0 | 6.2.0 | 1 of 2, not recurrent_gemma | yes |",
        ),
        (
            {"models": {"mamba": "right", "recurrent_gemma": "refused: its cache"}},
            [f"{NAMED}: recurrent_gemma: refused: its cache"],
            f"| {CELLS} | 1 of 2, not recurrent_gemma | yes |",
        ),
        (
            CLAIMED | {"encode": "refused: no hook"},
            ["5.15.0 6.2.0: encode: refused: no hook"],
            "| 5.15.0 | 6.2.0 | 2 of 2 | no: no hook |",
        ),
        (
            {"versions": ["5.22.2", "6.1.0"], "encode": "refused: no hook"},
            [],
            "| 5.22.2 | 6.1.0 | 2 of 2 | no: no hook |",
        ),
        (
            OLD | {"models": FOUND["models"] | {"mamba": "not tried, ValueError: 1"}},
            [],
            "| 5.1.0 | 6.2.0 | 1 of 2, not tried: mamba | yes |",
        ),
        (
            {"models": FOUND["models"] | {"mamba": "not tried, ValueError: 1"}},
            [f"{NAMED}: mamba: not tried, ValueError: 1"],
            f"| {CELLS} | 1 of 2, not tried: mamba | yes |",
        ),
        (
            OLD | {"models": FOUND["models"] | {"mamba": "wrong, 0.3"}},
            ["5.1.0 6.2.0: mamba: wrong, 0.3"],
            "| 5.1.0 | 6.2.0 | 1 of 2, not mamba | yes |",
        ),
        (
            OLD | {"encode": "wrong, KeyError: 1"},
            ["5.1.0 6.2.0: encode: wrong, KeyError: 1"],
            "| 5.1.0 | 6.2.0 | 2 of 2 | wrong, KeyError: 1 |",
        ),
    ],
    ids=[
        "right",
        "old and right",
        "refused",
        "refused by the newest",
        "refused by one that is claimed",
        "refused as it is known",
        "refused as it was known",
        "encode refused by one that is claimed",
        "encode refused by one that is not",
        "of another configuration",
        "not as in the newest",
        "wrong",
        "crash",
    ],
)
def test_the_table_of_releases(change, faults, row):
    found = FOUND | change
    assert matrix.faults(found) == faults
    assert matrix.row(found) == row
