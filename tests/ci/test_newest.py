"""The table of the newest releases: its verdicts, and when it fails."""

import sys
import types
from pathlib import Path

import pytest

import compat
from ci import forks
from ci.forks._tests import Case
from ci.tables import matrix, newest
from ci.tables.newest import BROKEN, REFUSED, SLOWER, WORKS, Row
from tests.families import test_supported

WARNED = "wrong, FutureWarning: `state` is deprecated"


@pytest.mark.parametrize(
    ("said", "verdict", "why"),
    [
        ("right", WORKS, ""),
        ("slower: another mixer", SLOWER, "another mixer"),
        ("refused: a model without `state`: none", REFUSED, "a model without `state`: none"),
        ("not in this release", REFUSED, "not in this release"),
        ("wrong, 0.3", BROKEN, "wrong, 0.3"),
        (WARNED, BROKEN, WARNED),
        ("not tried, ValueError: 1", BROKEN, "not tried, ValueError: 1"),
        ("", BROKEN, ""),
        ("works: so it says", BROKEN, "works: so it says"),
    ],
)
def test_the_verdict_on_a_thing(said, verdict, why):
    assert newest.judged("mamba", said) == Row("mamba", verdict, why)


FOUND = {
    "models": {"mamba": "right", "mamba2": "right"},
    "new types": "right",
    "hooks": "right",
    "encode": "right",
    "fast paths": {"mamba2": "right"},
    "status": "the report",
}


@pytest.mark.parametrize(
    ("change", "thing", "verdict"),
    [
        ({}, None, WORKS),
        ({"models": {"mamba": "wrong, 0.3", "mamba2": "right"}}, "mamba", BROKEN),
        ({"models": {"mamba": WARNED, "mamba2": "right"}}, "mamba", BROKEN),
        ({"models": {"mamba": "refused: no scan", "mamba2": "right"}}, "mamba", REFUSED),
        ({"new types": "refused: lara"}, "new types", REFUSED),
        ({"new types": "wrong, ImportError: 1"}, "new types", BROKEN),
        ({"hooks": "wrong, left behind: Pooling.forward"}, "hooks", BROKEN),
        ({"encode": "wrong: 40 tokens at once"}, "encode", BROKEN),
        ({"fast paths": {"mamba2": "slower: another"}}, "fast path of mamba2", SLOWER),
        ({"fast paths": {"mamba2": "wrong, 1"}}, "fast path of mamba2", BROKEN),
        ({"status": "wrong, KeyError: 1"}, "status", BROKEN),
    ],
)
def test_a_row_for_each_thing_of_compat(change, thing, verdict):
    rows = {row.thing: row.verdict for row in newest.of_compat(FOUND | change)}
    assert rows.keys() == {
        *("mamba", "mamba2", "new types", "hooks", "encode", "fast path of mamba2", "status")
    }
    assert {name: found for name, found in rows.items() if found != WORKS} == (
        {thing: verdict} if thing else {}
    )


def test_fast_paths_that_cannot_be_looked_at_are_broken():
    rows = newest.of_compat(FOUND | {"fast paths": "wrong, AttributeError: paths"})
    (row,) = [row for row in rows if row.verdict != WORKS]
    assert (row.thing, row.verdict) == ("fast path of each type", BROKEN)


def test_what_dies_is_broken(monkeypatch):
    monkeypatch.setattr(newest.sys, "executable", "false")
    assert list(newest.compat_rows()) == [Row("compat", BROKEN, "exit status 1")]


def test_what_a_probe_raises_is_told():
    def refuses():
        raise compat.UnsupportedVersionError("a model without a state", "one", "another release")

    def fails():
        raise KeyError("state")

    assert matrix.attempted(refuses) == "refused: a model without a state"
    assert matrix.attempted(fails) == "wrong, KeyError: 'state'"
    assert matrix.attempted(lambda: "right") == "right"


# The things that are looked at.


def test_hooks_that_go_in_and_come_out_are_right():
    assert newest.hooks() == "right"


def test_hooks_that_are_in_when_the_check_begins_are_right(monkeypatch):
    monkeypatch.delitem(sys.modules, "tests.hooks.test_switch", raising=False)
    compat.enable_vertical_chunking()
    assert newest.hooks() == "right"


def test_a_hook_that_stays_is_not_right(monkeypatch):
    pooling = newest.importlib.import_module("tests.hooks.test_switch").Pooling
    before = pooling.forward
    disable = compat.hooks.switch.disable_vertical_chunking

    def leaky():
        disable()
        pooling.forward = lambda *args: before(*args)

    monkeypatch.setattr(compat.hooks.switch, "disable_vertical_chunking", leaky)
    try:
        assert newest.hooks() == "wrong, left behind: Pooling.forward"
    finally:
        pooling.forward = before


def test_a_fast_path_that_is_not_taken_or_not_known_is_slower(monkeypatch):
    own = newest.fast_paths()
    paths = dict.fromkeys(own, "") | {"mamba2": "its mixer differs: 0.3"}
    del paths["jamba"]
    monkeypatch.setattr(compat, "status", lambda: types.SimpleNamespace(paths=paths))
    found = newest.fast_paths()
    assert found.keys() == own.keys() > {"rwkv", "zamba2"}
    assert found["mamba2"] == "slower: its mixer differs: 0.3"
    assert found["jamba"].startswith("slower: compat's report does not name it")
    assert {found[name] for name in found.keys() - {"mamba2", "jamba"}} == {"right"}


def test_types_that_the_registry_does_not_know_are_named(monkeypatch):
    known = {"mamba", "qwen3_5"}
    monkeypatch.setattr(test_supported, "recurrent_types", lambda: (known, set()))
    assert newest.new_types() == "right"
    monkeypatch.setattr(test_supported, "recurrent_types", lambda: ({*known, "lara"}, set()))
    assert newest.new_types().startswith("refused: ")
    assert newest.new_types().endswith(": lara")


# The tests.


HOOKS = "tests.hooks.test_switch"


def outcomes(of_hooks=None):
    modules = ["tests." + name.replace("/", ".") for name in newest.TESTS]
    found = {f"{module}::test_a": Case("passed") for module in modules}
    return found | ({f"{HOOKS}::test_b": Case(of_hooks, "why")} if of_hooks else {})


def rows_of_tests(found, status=0):
    return [row for row in newest.of_tests(found, status) if row.verdict != WORKS]


def test_tests_that_pass_work():
    assert rows_of_tests(outcomes("skipped")) == []
    assert len(newest.of_tests(outcomes(), 0)) == len(newest.TESTS)


def test_a_test_that_fails_is_named():
    (row,) = rows_of_tests(outcomes("failed"), 1)
    details = "tests.hooks.test_switch::test_b: why"
    assert row == Row("tests/hooks/test_switch.py", BROKEN, "1 of 2 failed", details)


def test_a_file_that_cannot_be_imported_is_broken():
    found = outcomes() | {"::tests.hooks.test_switch": Case("failed", "ImportError: Cache")}
    (row,) = rows_of_tests(found, 1)
    assert (row.thing, row.verdict) == ("tests/hooks/test_switch.py", BROKEN)
    assert "ImportError: Cache" in row.details


@pytest.mark.parametrize("left", [{}, {"tests.hooks.test_switch::test_a": Case("skipped")}])
def test_a_file_of_which_nothing_passed_is_broken(left):
    found = {name: what for name, what in outcomes().items() if HOOKS not in name} | left
    (row,) = rows_of_tests(found, 2)
    assert (row.thing, row.verdict) == ("tests/hooks/test_switch.py", BROKEN)


def test_tests_that_did_not_run_are_broken():
    assert {row.verdict for row in newest.of_tests({}, 4)} == {BROKEN}


def test_an_exit_status_that_no_test_explains_is_broken():
    (row,) = rows_of_tests(outcomes(), 3)
    assert (row.thing, row.verdict) == ("pytest", BROKEN)


def test_what_is_run_and_what_is_left_out_are_there():
    folder = Path(__file__).parents[1]
    assert all((folder / f"{name}.py").exists() for name in newest.TESTS)
    assert callable(getattr(test_supported, newest.COMPLETENESS))


# The forks.


@pytest.mark.parametrize(
    ("verdict", "ours"),
    [("right", WORKS), ("broken", BROKEN), ("does not fit", BROKEN), ("not run", REFUSED)],
)
def test_a_rebase_and_what_it_comes_to(monkeypatch, verdict, ours):
    found = types.SimpleNamespace(version="5.25.0", verdict=verdict, text="0003: fails")
    monkeypatch.setattr(forks, "rebase", lambda library, version, root: found)
    details = "" if verdict == "right" else "0003: fails"
    wanted = Row("rebase mamba-ssm", ours, f"5.25.0: {verdict}", details)
    assert newest.rebase_row("mamba-ssm") == wanted


def test_a_rebase_that_cannot_be_tried_is_broken(monkeypatch):
    def rebase(*args):
        raise forks.ForkError("pip could not fetch it\nno such host")

    monkeypatch.setattr(forks, "rebase", rebase)
    row = newest.rebase_row("mamba-ssm")
    assert (row.verdict, row.why) == (BROKEN, "ForkError: pip could not fetch it")
    assert "no such host" in row.details


def test_a_verdict_that_nobody_knows_does_not_pass():
    with pytest.raises(KeyError):
        newest.of_rebase("rebase mamba-ssm", "5.25.0", "fine", "")


# The table.


@pytest.mark.parametrize(
    ("found", "verdict", "why"),
    [
        ({"torch>=2.6": "2.13.0", "transformers>=5.15,<6": "5.99.0"}, WORKS, ""),
        ({"transformers>=5.15,<6": "6.0.0"}, REFUSED, "6.0.0 for transformers>=5.15,<6"),
        ({"tqdm>=4.66": None}, REFUSED, "nothing for tqdm>=4.66"),
    ],
)
def test_releases_that_pip_would_not_bring_are_told(found, verdict, why):
    assert newest.of_range(found) == Row("pyproject.toml", verdict, why)


def test_only_what_is_broken_fails(capsys):
    rows = [Row("mamba", WORKS), Row("rwkv", SLOWER, "a | b"), Row("lara", REFUSED, "x", "more")]
    assert newest.told(rows) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:5] == [
        "| mamba | works |  |",
        "| rwkv | slower | a \\| b |",
        "| lara | refused | x |",
    ]
    assert lines[5:] == ["", "lara: refused", "more"]
    assert newest.told([*rows, Row("zaya", BROKEN, "wrong, 1")]) == 1
    assert capsys.readouterr().out.endswith("\nBroken: zaya\n")


def test_what_is_newer_than_the_pins_is_named(monkeypatch):
    pins = [line.split("==") for line in (matrix.ROOT / "ci/constraints.txt").read_text().split()]
    versions = {pin[0]: pin[1] for pin in pins if len(pin) == 2}
    monkeypatch.setattr(newest, "installed", lambda name: versions[name])
    assert newest.moved() == []
    was, versions["transformers"] = versions["transformers"], "5.99.0"
    assert newest.moved() == [f"transformers 5.99.0 (pinned: {was})"]
    versions["transformers"] = None
    assert newest.moved() == []
