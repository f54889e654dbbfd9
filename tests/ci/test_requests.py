"""Requests, on the library that test_forks makes: pages, what check holds, clones of upstream."""

import re
import shutil
import subprocess

import pytest

from ci import forks
from ci.forks import __main__, _alone, _lines, _tree, roadmap
from tests.ci.test_forks import commit, make_sdist, patches, pin

TEST = """
import tiny.core


def test_{word}():
    assert "{word}" in tiny.core.WORDS
"""
PAGE = """
+++
title = "Say {word}"
flow = "Whoever reads {word}"
patches = ["Say-{word}"]
main = "abc of 2026-01-01: applies"
state = "ready"
+++

## Body

It did not say {word}.

## Issue

None is needed.

## Reproduction

```python
import tiny.core
print("{word}" in tiny.core.WORDS)
```

On the release:

```text
False
```

After:

```text
True
```

## On a GPU

Nothing.

## Before it is sent

Read each line, say how it was made, and run pytest.
"""
RELEASE = {
    "PKG-INFO": b"Metadata-Version: 2.1\nName: tiny-lib\nVersion: 1.0\n",
    "tiny/__init__.py": b"",
    "tiny/core.py": "".join(["WORDS = [\n", *(f'    "{n}",\n' for n in range(30)), "]\n"]).encode(),
    "tiny/notes.txt": b"one\ntwo\nthree\n",
}


def page(root, number, word):
    folder = root / "forks" / "tiny" / "pull_requests"
    folder.mkdir(exist_ok=True)
    path = folder / f"{number:02d}-say-{word}.md"
    path.write_text(PAGE.format(word=word).lstrip())
    return path


def say(tree, word, line):
    """Commit that core.py has a word in a line, and a test of that."""
    (tree / "tests").mkdir(exist_ok=True)
    changes = {"tiny/core.py": {line: f'    "{word}",'}}
    changes[f"tests/test_{word}.py"] = TEST.format(word=word).lstrip().encode()
    commit(tree, changes, f"Say {word}\n\nIt was not said.")


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("requests") / "root"
    folder = root / "forks" / "tiny"
    folder.mkdir(parents=True)
    pin(root, make_sdist(folder / "tiny_lib-1.0.tar.gz", RELEASE))
    (folder / "PULL_REQUEST.md").write_text(
        "# Title\n\n<!-- requests -->\n<!-- /requests -->\n\nMore.\n"
    )
    tree = forks.patched("tiny", root)
    say(tree, "ten", 10)
    say(tree, "twenty", 20)
    forks.export("tiny", root)
    page(root, 1, "ten")
    page(root, 2, "twenty")
    forks.write_index("tiny", root)
    return root


@pytest.fixture
def root(made, tmp_path, monkeypatch):
    """A repository with one fork, of two patches and two requests, all right."""
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "0")
    # Two seconds a run, which its tests have no use for.
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:anyio -p no:hypothesispytest")
    return shutil.copytree(made, tmp_path / "root")


@pytest.fixture
def tree(root):
    """The tree of that fork."""
    return root / "forks" / "tiny" / "tree"


def problems(root, **how):
    return "\n".join(forks.check("tiny", root, **how))


def edit(root, old, new, number=1):
    (path,) = (root / "forks" / "tiny" / "pull_requests").glob(f"{number:02d}-*")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def amend(root, tree, changes, message="Say twenty\n\nIt was not said."):
    """Change the second patch."""
    commit(tree, changes, message, "--amend")
    forks.export("tiny", root)


def test_requests_that_are_right(root):
    assert problems(root) == ""
    text = (root / "forks" / "tiny" / "PULL_REQUEST.md").read_text()
    assert "| 1 | [Say ten](pull_requests/01-say-ten.md) | Whoever reads ten | - | ready |" in text
    assert text.startswith("# Title\n")
    assert text.endswith("\nMore.\n")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("## Issue", "## Issues", "no section `## Issue`"),
        ("None is needed.", "", "no section `## Issue`, or an empty one"),
        ('"ready"', '"soon"', "state is 'soon'; needed: one of draft, ready"),
        ("It did not", "It\n" * 40 + "did not", "the body has 41 lines, more than 40"),
        ("print(", "1\n" * 14 + "print(", "the reproduction has 16 lines, more than 15"),
        ("```python", "```", "0 blocks ```python and 2 ```text"),
        ("how it was made", "nothing", "does not say 'how it was made'"),
        ("Say ten", "Say " + "ten" * 30, "the title has 94 columns, more than 72"),
        ("abc of 2026-01-01: applies", " ", "`main` is empty"),
        ("+++\n", "", "no head"),
        ("state =", "stat =", "stat"),
    ],
)
def test_a_page_has_what_a_sender_needs(root, old, new, said):
    edit(root, old, new)
    assert said in problems(root, quick=True)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("False", "True", "the reproduction prints 'False' on the release"),
        ("True", "False", "the reproduction prints 'True' after; the page has 'False'"),
        ("import tiny.core", "import tiny.cores", "ModuleNotFoundError"),
    ],
)
def test_the_reproduction_prints_what_the_page_says(root, old, new, said):
    edit(root, old, new)
    assert said in problems(root, only="say-ten")
    assert problems(root, quick=True) == ""


def test_a_test_fails_without_its_request_and_passes_with_it(root, tree):
    name = "tests/test_twenty.py"
    amend(root, tree, {name: (tree / name).read_bytes() + b"\n\ndef test_more():\n    pass\n"})
    assert "test_more does not fail without the request (1 passed)" in problems(
        root, only="say-twenty"
    )
    edit(root, 'state = "ready"', 'state = "ready"\ncontrols = ["test_more"]', 2)
    assert problems(root, only="say-twenty") == ""
    amend(root, tree, {name: (tree / name).read_bytes() + b'    assert "19" not in "19"\n'})
    assert "test_more does not pass with the request (1 failed)" in problems(
        root, only="say-twenty"
    )
    edit(root, '["test_more"]', '["test_gone"]', 2)
    assert "test_gone is called a control, and is no test" in problems(root, only="say-twenty")


def test_what_a_test_asks_of_the_fork_is_not_locked(root, tree):
    """A file of this repository that runs tests asks for the release, while check holds them."""
    fork_toml = root / "forks" / "tiny" / "fork.toml"
    runner = root / "tests" / "run_tiny.py"
    runner.parent.mkdir()
    runner.write_text(
        "from ci import forks\n"
        f"STOCK = forks.stock('tiny', type(forks.ROOT)({str(root)!r}))\n"
        "TEXT = (forks.patched('tiny') / 'tiny' / 'core.py').read_text()\n\n\n"
        "def test_patched_twenty():\n    assert '\"twenty\"' in TEXT\n"
    )
    run_by = '[run_by]\n"tests/test_twenty.py" = "tests/run_tiny.py"\n'
    fork_toml.write_text(fork_toml.read_text() + run_by)
    assert problems(root, only="say-twenty") == ""


def test_a_request_brings_a_test(root, tree):
    (tree / "tests" / "test_twenty.py").unlink()
    amend(root, tree, {})
    assert "02-say-twenty.md: it brings no test." in problems(root, only="say-twenty")


def test_a_request_stands_on_what_it_needs_and_nothing_else(root, tree):
    say(tree, "eleven", 10)
    forks.export("tiny", root)
    page(root, 3, "eleven")
    forks.write_index("tiny", root)
    assert problems(root, quick=True) == (
        "tiny: 03-say-eleven.md: Say-eleven does not fit the release with what the request needs: "
        "tiny/core.py: hunk 1, lines 11 to 15."
    )
    edit(root, 'state = "ready"', 'state = "waits"\nneeds = ["say-ten"]', 3)
    forks.write_index("tiny", root)
    assert problems(root, only="say-eleven") == ""
    edit(root, "say-ten", "say-nothing", 3)
    assert problems(root, only="say-eleven") == (
        "tiny: 03-say-eleven.md: needs 'say-nothing', and no page has that name."
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tiny/notes.txt": b"one\ntwo \nthree\n"}, "tiny/notes.txt:2: trailing whitespace"),
        ({"tiny/notes.txt": b"one\ntwo\n\nthree\n"}, "notes.txt: nothing but space changes"),
        ({"tiny/notes.txt": b"one\ntwo\n\n\n3\n"}, "notes.txt:4: more than 1 blank lines"),
        ({"tiny/more.py": b"a = 1\n\n\n\nb = 2\n"}, "more.py:4: more than 2 blank lines"),
    ],
)
def test_no_stray_lines(root, tree, changes, said):
    amend(root, tree, changes)
    assert said in problems(root, quick=True)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("Say twenty", "the message does not say why"),
        ("Say twenty\n\n" + "why\n" * 13, "the message has 13 lines below the first"),
        ("Say twenty\n\nNot verified: on a GPU.", "the message has `Not verified:`"),
        ("Say twenty" + "y" * 70 + "\n\nWhy.", "the first line has 80 columns"),
    ],
)
def test_a_message_is_a_few_sentences(root, tree, message, said):
    amend(root, tree, {"tiny/notes.txt": b"one\n2\nthree\n"}, message)
    name = _tree.git(tree, "log", "-1", "--format=%f").strip()
    edit(root, '"Say-twenty"', f'"{sorted(patches(root))[1][5:-6]}"', 2)
    assert said in problems(root, quick=True), name


def test_each_patch_is_in_one_request(root):
    edit(root, '["Say-twenty"]', '["Say-ten"]', 2)
    forks.write_index("tiny", root)
    found = problems(root, quick=True)
    assert "patch Say-ten is in requests say-ten, say-twenty; needed: one" in found
    assert "patch Say-twenty is in no request; needed: one, or the folder parked/" in found


def test_a_page_names_patches_that_are_there(root):
    edit(root, '["Say-twenty"]', '["Say-twenty", "Say-thirty"]', 2)
    found = problems(root, quick=True)
    assert "no patch 'Say-thirty' is in the series" in found
    assert "02-say-twenty.md: it names patches that are not in the series" in found


def test_a_draft_is_applied_and_not_run(root):
    edit(root, "True", "False")
    edit(root, '"ready"', '"draft"')
    forks.write_index("tiny", root)
    assert problems(root, only="say-ten") == ""


def test_the_list_is_as_it_is_made(root, capsys):
    edit(root, '"ready"', '"sent"')
    assert "PULL_REQUEST.md is not what `python -m ci.forks pages` writes" in problems(
        root, quick=True
    )
    assert __main__.main(["pages"], root) == 0
    assert capsys.readouterr().out == "tiny: written\n"
    assert "| sent |" in (root / "forks" / "tiny" / "PULL_REQUEST.md").read_text()
    assert problems(root, quick=True) == ""


@pytest.fixture
def parked(root, tree):
    """The second patch is parked, and its page is gone."""
    folder = root / "patches" / "tiny" / "parked"
    folder.mkdir()
    (patch,) = (root / "patches" / "tiny").glob("0002-*")
    shutil.copy(patch, folder / "twenty.patch")
    (folder / "series").write_text("twenty.patch # Nobody counts so far.\n")
    _tree.git(tree, "reset", "-q", "--hard", "main~")
    forks.export("tiny", root)
    (root / "forks" / "tiny" / "pull_requests" / "02-say-twenty.md").unlink()
    forks.write_index("tiny", root)
    return folder


def test_what_is_parked_is_listed_and_fits_the_series(root, parked, monkeypatch):
    assert problems(root, quick=True) == ""
    text = (root / "forks" / "tiny" / "PULL_REQUEST.md").read_text()
    assert "| twenty.patch | Nobody counts so far. |" in text
    item = roadmap.Item("tiny", "says it", lambda tree: '"twenty"' in core(tree))
    monkeypatch.setattr(roadmap, "ITEMS", [item])
    assert forks.status(["tiny"], root).splitlines()[1].split()[-1] == "parked"

    patch = parked / "twenty.patch"
    patch.write_text(patch.read_text().replace('"18"', '"eighteen"'))
    assert "parked/twenty.patch: tiny/core.py: hunk 1" in problems(root, quick=True)


def core(tree):
    return (tree / "tiny" / "core.py").read_text()


@pytest.mark.parametrize(
    ("series", "said"),
    [
        ("", "twenty.patch is not listed"),
        ("twenty.patch\n", "twenty.patch has no reason"),
        ("twenty.patch # why\ngone.patch # why\n", "gone.patch is listed, and no such file"),
    ],
)
def test_what_is_parked_has_a_reason(root, parked, series, said):
    (parked / "series").write_text(series)
    assert said in problems(root, quick=True)


@pytest.fixture
def clone(tmp_path):
    """Upstream's main in somebody's clone: two lines more at the top of core.py."""
    core = b"# Of main.\n\n" + RELEASE["tiny/core.py"]
    return make_clone(tmp_path / "clone", {"tiny/core.py": core})


def make_clone(folder, files):
    """Make somebody's clone, whose main has the files."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(text)
    for command in (
        "init -q -b main",
        "config user.name Somebody",
        "config user.email some@body.org",
        "add --all",
        "commit -q -m main",
    ):
        subprocess.run(["git", *command.split()], cwd=folder, check=True)
    return folder


def onto(root, clone, name="say-twenty"):
    return __main__.main(["request", "tiny", name, "--onto", str(clone)], root)


def test_a_request_becomes_a_branch_of_somebodys_clone(root, clone, capsys):
    assert onto(root, clone) == 0
    said = capsys.readouterr().out
    assert "It did not say twenty." in said
    assert "run pytest" in said
    log = ["log", "main..say-twenty", "--format=%an %ae%n%B"]
    assert (
        _tree.git(clone, *log).strip() == "Somebody some@body.org\nSay twenty\n\nIt was not said."
    )
    assert "# Of main." in core(clone)
    assert '"twenty"' in core(clone)
    assert '"ten"' not in core(clone)
    assert not _tree.git(clone, "status", "--porcelain")

    assert onto(root, clone) == 1
    assert "has a branch say-twenty already" in capsys.readouterr().err
    (clone / "tiny" / "core.py").write_text("changed\n")
    assert onto(root, clone, "say-ten") == 1
    assert "has changes (tiny/core.py)" in capsys.readouterr().err
    assert onto(root, clone, "say-nothing") == 1
    assert "there are say-ten, say-twenty" in capsys.readouterr().err


def test_a_conflict_is_named_by_file_and_hunk(root, clone, capsys):
    text = core(clone).replace('    "19",', '    "nineteen",')
    (clone / "tiny" / "core.py").write_text(text)
    subprocess.run(["git", "commit", "-qam", "Say nineteen"], cwd=clone, check=True)
    assert onto(root, clone) == 1
    said = capsys.readouterr().out
    assert re.search(
        r"Say-twenty conflicts on branch say-twenty:\n    tiny/core.py: hunk 1, ", said
    )
    assert "It was not said." in said
    assert "<<<<<<<" in core(clone)


def test_a_release_may_have_other_line_ends(tmp_path):
    """Merge a patch of a release with CRLF into a main with LF, and strike no line for its end."""
    release, main = tmp_path / "release", tmp_path / "main"
    lines = [f"{n}\n" for n in range(30)]
    changed = [*lines[:20], "new\n", *lines[21:]]
    for folder, end in ((release, b"\r\n"), (main, b"\n")):
        folder.mkdir()
        subprocess.run(["git", "init", "-q", "-b", "main"], cwd=folder, check=True)
        texts = [lines, changed] if folder is release else [["# Of main.\n", *lines]]
        for text in texts:
            commit(folder, {"a.py": "".join(text).encode().replace(b"\n", end)}, "A message")
    assert not _lines.diff_faults(release, "main~", "main")
    _tree.git(main, "fetch", "-q", str(release), "main")
    assert not _alone._merge(main, _tree.git(release, "rev-parse", "main").strip()).returncode
    wanted = "".join(["# Of main.\n", *changed]).encode()
    assert (main / "a.py").read_bytes() == wanted
    assert _tree.git(main, "show", ":a.py").encode() == wanted


def test_the_command_line_wants_a_clone(root, tmp_path):
    with pytest.raises(SystemExit):
        __main__.main(["request", "tiny", "say-ten"], root)
    assert onto(root, tmp_path) == 1
