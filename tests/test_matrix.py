"""What is said of releases that cannot do it, and how the table of releases is judged."""

import pytest
from sentence_transformers import SentenceTransformer
from stack import FORKS
from transformers.cache_utils import Cache

import compat
from ci import matrix
from compat import _transformers


@pytest.fixture(autouse=True)
def _probed_anew():
    _transformers.probe.cache_clear()
    yield
    _transformers.probe.cache_clear()


def reasons():
    return {library.library: library.reason for library in compat.status().libraries}


@pytest.mark.skipif(FORKS, reason="the fork has no hooks to be refused")
def test_the_report_says_what_an_old_sentence_transformers_lacks(monkeypatch):
    monkeypatch.delattr(SentenceTransformer, "_inference")
    assert "_inference has no argument" in reasons()["sentence-transformers"]


def test_the_report_says_what_an_old_transformers_lacks(monkeypatch):
    monkeypatch.delattr(Cache, "reorder_cache")
    assert "the rows of its caches cannot be selected" in reasons()["transformers"]


FOUND = {
    "versions": list(matrix.ENVIRONMENTS[-1]),
    "reasons": {"transformers": "the reason"},
    "models": {"mamba": "right", "mamba2": "right", "zaya": "not in this release"},
    "encode": "right",
}
OLD = {"versions": ["5.1.0", "6.2.0"]}
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
