"""The forks' tooling, on a library made here: releases, patches and trees, and no network."""

import hashlib
import io
import re
import shutil
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from textwrap import dedent

import pytest

import compat
from ci import forks
from ci.forks import __main__, _commands, _release, _tree, behaviour, roadmap
from tests.laws import test_released

LINES = [f"line {n}" for n in range(30)]
RELEASE = {
    "PKG-INFO": b"Metadata-Version: 2.1\nName: tiny-lib\nVersion: 1.0\n",
    "tiny/core.py": "".join(f"{line}\n" for line in LINES).encode(),
    "tiny/crlf.txt": b"one\r\ntwo \r\n\tthree\r\n",
    "tiny/unended.txt": b"first  \nno newline at the end",
    "tiny/old.bin": bytes(range(256)),
    # Builds nothing: notes that it was run, and what it was given.
    "pyproject.toml": dedent("""
        [build-system]
        requires = []
        build-backend = "backend"
        backend-path = ["."]
    """).encode(),
    "backend.py": dedent("""
        import os
        from pathlib import Path

        def prepare_metadata_for_build_wheel(folder, config_settings=None):
            Path(os.environ["NOTE"]).write_text(os.environ["SKIP_BUILD"])
            info = Path(folder, "tiny_lib-1.0.dist-info")
            info.mkdir()
            (info / "METADATA").write_text(Path("PKG-INFO").read_text())
            (info / "WHEEL").write_text("Wheel-Version: 1.0")
            return info.name
    """).encode(),
}
PARTS = ["Why", "API", "Verified", "Not verified", "Upstream", "Unneeded when"]
BODY = "\n".join(f"{part}: because of it." for part in PARTS)


def make_sdist(path, files=RELEASE, version="1.0"):
    with tarfile.open(path, "w:gz") as release:
        for name, content in files.items():
            member = tarfile.TarInfo(f"tiny_lib-{version}/{name}")
            member.size = len(content)
            release.addfile(member, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pin(root, sha256, more=""):
    text = f'name = "tiny-lib"\nversion = "1.0"\nsha256 = "{sha256}"\nlicense = "MIT"\n'
    text += f'environment = {{ SKIP_BUILD = "yes" }}\n{more}'
    (root / "forks" / "tiny" / "fork.toml").write_text(text)


def commit(tree, changes, message=f"Change it\n\n{BODY}", *arguments):
    """Commit files, given as bytes, or as {number: text of a line of core.py}."""
    for name, change in changes.items():
        if isinstance(change, dict):
            lines = (tree / name).read_text().splitlines()
            lines = [change.get(number, line) for number, line in enumerate(lines)]
            change = "".join(f"{line}\n" for line in lines).encode()
        (tree / name).write_bytes(change)
    _tree.git(tree, "add", "--all")
    _tree.git(tree, "commit", "-q", "-m", message, *arguments)


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    root = tmp_path_factory.mktemp("template") / "root"
    folder = root / "forks" / "tiny"
    folder.mkdir(parents=True)
    pin(root, make_sdist(folder / "tiny_lib-1.0.tar.gz"))
    (folder / "PULL_REQUEST.md").write_text("# Title\n")
    tree = forks.patched("tiny", root)
    commit(tree, {"tiny/core.py": {10: "ten"}}, f"Say ten\n\n{BODY}")
    commit(tree, {"tiny/core.py": {5: "five", 20: "twenty"}}, f"Say five\n\n{BODY}")
    forks.export("tiny", root)
    return root


@pytest.fixture
def root(template, tmp_path):
    """A repository with one fork: the release at hand, two patches, and the tree."""
    return shutil.copytree(template, tmp_path / "root")


@pytest.fixture
def tree(root):
    """The tree of that fork."""
    return root / "forks" / "tiny" / "tree"


def patches(root):
    return {path.name: path.read_bytes() for path in (root / "patches" / "tiny").glob("*")}


def history(tree):
    return _tree.git(tree, "log", "--reverse", "--format=%an %ae %ad%n%B%T", "base..main")


def edit(root, name, old, new):
    """Change a patch that is committed; `name` is the start of its name."""
    (path,) = (root / "patches" / "tiny").glob(f"{name}*")
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    return path.name


def test_sync_and_export_are_inverses(root, tree):
    commit(
        tree,
        {
            "tiny/crlf.txt": b"one\r\n2 \r\n\tthree\r\n\r\n",
            "tiny/unended.txt": b"first  \t\nstill no newline at the end",
            "tiny/new.txt": b"\n \n\n",
            "tiny/old.bin": bytes(range(255, -1, -1)),
        },
        "[core] A first line with brackets, and of more columns than a mail has, which is 78: ü\n\n"
        f"{BODY}\n\n  indented\n\n#12 begins with a hash\n>From here",
        "--author=Zoë Ünal <zoe@example.org>",
        "--date=2024-02-29T12:34:56+05:30",
    )
    (tree / "tiny/unended.txt").unlink()
    (tree / "tiny/core.py").rename(tree / "tiny/moved.py")
    (tree / "tiny/moved.py").chmod(0o755)
    commit(tree, {}, f"Move and remove\n\n{BODY}")

    assert forks.export("tiny", root)
    written, before = patches(root), history(tree)
    assert len(written) == 5
    assert not forks.export("tiny", root)

    shutil.rmtree(tree)
    assert forks.sync("tiny", root)
    assert history(tree) == before
    assert not forks.export("tiny", root)
    assert patches(root) == written
    assert not forks.sync("tiny", root)
    assert forks.check("tiny", root) == []


def test_nobodys_settings_matter(root, tree, tmp_path, monkeypatch):
    forks.sync("tiny", root, force=True)
    before, written = _tree.git(tree, "rev-parse", "main"), patches(root)
    (tmp_path / ".gitconfig").write_text("[diff]\nnoprefix = true\n[core]\nautocrlf = true\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Somebody")
    forks.sync("tiny", root, force=True)
    assert _tree.git(tree, "rev-parse", "main") == before
    assert not forks.export("tiny", root)
    assert patches(root) == written


def test_hunks_have_one_line_of_context_and_nothing_that_changes_by_itself(root, tree):
    (first,) = (text.decode() for name, text in patches(root).items() if name.startswith("0001"))
    assert first.startswith("From " + 40 * "0" + " ")
    assert "\nSubject: Say ten\n" in first
    assert first.endswith("@@ -10,3 +10,3 @@ line 8\n line 9\n-line 10\n+ten\n line 11\n")


def test_export_removes_what_is_no_longer_in_the_tree(root, tree):
    _tree.git(tree, "reset", "-q", "--hard", "main~2")
    commit(tree, {"tiny/core.py": {3: "three"}}, f"Say three\n\n{BODY}")
    forks.export("tiny", root)
    assert set(patches(root)) == {"series", "0001-Say-three.patch"}
    assert patches(root)["series"] == b"0001-Say-three.patch\n"
    _tree.git(tree, "reset", "-q", "--hard", "base")
    forks.export("tiny", root)
    assert patches(root) == {}


@pytest.mark.parametrize("built", [True, False])
def test_a_wrong_hash(root, tree, built):
    if not built:
        shutil.rmtree(tree)
    path = root / "forks" / "tiny" / "tiny_lib-1.0.tar.gz"
    pinned, found = hashlib.sha256(path.read_bytes()).hexdigest(), make_sdist(path, {"a": b"b"})
    for verb in (forks.sync, forks.stock, forks.patched):
        with pytest.raises(forks.ForkError, match=f"{found}.*{pinned}"):
            verb("tiny", root)
    assert tree.exists() == built


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b" line 19\n", b" line nineteen\n", "hunk 2, @@ -20,3 +20,3 @@, does not apply"),
        (b"@@ -20,3 +20,3 @@", b"@@ -18,3 +18,3 @@", "hunk 2, @@ -18,3 +18,3 @@, fits elsewhere"),
        (b"@@ -5,3 +5,3 @@", b"@@ -9,3 +9,3 @@", "hunk 1, @@ -9,3 +9,3 @@, fits elsewhere"),
    ],
    ids=["context", "offset", "offset of the first"],
)
def test_a_patch_that_does_not_fit_line_by_line(root, tree, old, new, said):
    name = edit(root, "0002", old, new)
    before = history(tree)
    wanted = re.escape(f"tiny: {name}: tiny/core.py: {said}")
    with pytest.raises(forks.ForkError, match=wanted):
        forks.sync("tiny", root)
    assert history(tree) == before
    shutil.rmtree(tree)
    (problem,) = forks.check("tiny", root)
    assert re.match(wanted, problem)
    with pytest.raises(forks.ForkError, match=wanted):
        forks.sync("tiny", root)
    left = {path.name for path in (root / "forks" / "tiny").iterdir()}
    assert left == {"stock", "fork.toml", "PULL_REQUEST.md", "tiny_lib-1.0.tar.gz"}


def test_a_patch_for_a_file_that_is_not_there(root, tree):
    path = root / "patches" / "tiny" / "0001-Say-ten.patch"
    path.write_bytes(path.read_bytes().replace(b"tiny/core.py", b"tiny/gone.py"))
    (problem,) = forks.check("tiny", root)[:1]
    assert "0001-Say-ten.patch: tiny/gone.py: No such file" in problem


@pytest.mark.parametrize("part", PARTS)
def test_a_message_has_all_its_parts(root, tree, part):
    without = BODY.replace(f"{part}: because of it.", "And so on.")
    commit(tree, {"tiny/core.py": {3: "three"}}, f"Leave out\n\n{without}")
    empty = BODY.replace(f"{part}: because of it.", f"{part}:")
    commit(tree, {"tiny/core.py": {9: "nine"}}, f"Leave empty\n\n{empty}")
    forks.export("tiny", root)
    assert forks.check("tiny", root) == [
        f"tiny: 0003-Leave-out.patch: the message has no `{part}:`.",
        f"tiny: 0004-Leave-empty.patch: `{part}:` is empty in the message.",
    ]


def test_a_series_fits_its_folder(root, tree):
    (root / "patches" / "tiny" / "series").write_text(
        "0001-Say-ten.patch\n0003-gone.patch\n0001-Say-ten.patch\n"
    )
    with pytest.raises(forks.ForkError) as raised:
        forks.sync("tiny", root)
    for said in (
        "0001-Say-ten.patch is listed 2 times",
        "0003-gone.patch is listed, and no such file",
        "0002-Say-five.patch is not listed",
    ):
        assert said in str(raised.value)
        assert any(said in problem for problem in forks.check("tiny", root))


def test_check_wants_what_export_writes(root, tree):
    name = edit(root, "0001", b"\n---\n", b"\n---\nA note for nobody.\n")
    assert f"tiny: {name} is not what export writes; run sync, then export." in forks.check(
        "tiny", root
    )
    forks.sync("tiny", root)
    forks.export("tiny", root)
    assert forks.check("tiny", root) == []


def test_check_wants_the_pull_request(root):
    (root / "forks" / "tiny" / "PULL_REQUEST.md").unlink()
    (problem,) = forks.check("tiny", root)
    assert "PULL_REQUEST.md" in problem


def uncommitted(tree):
    (tree / "tiny/core.py").write_text("all else is gone\n")


def untracked(tree):
    (tree / "tiny/more.py").write_text("")


def committed(tree):
    commit(tree, {"tiny/core.py": {15: "fifteen"}})


def amended(tree):
    commit(tree, {"tiny/core.py": {15: "fifteen"}}, f"Amended\n\n{BODY}", "--amend")


def dropped(tree):
    _tree.git(tree, "reset", "-q", "--hard", "main~1")


def on_a_branch(tree):
    _tree.git(tree, "checkout", "-q", "-b", "other")
    committed(tree)
    _tree.git(tree, "checkout", "-q", "main")


def stashed(tree):
    uncommitted(tree)
    _tree.git(tree, "stash")


def half_rebased(tree):
    commit(tree, {"tiny/core.py": {20: "score"}})
    with pytest.raises(forks.ForkError):
        _tree.git(tree, "rebase", "--onto", "base", "main~1")


WORK = [uncommitted, untracked, committed, amended, dropped, on_a_branch, stashed, half_rebased]


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_work_that_is_not_exported_is_kept(root, tree, work):
    exported = history(tree)
    work(tree)
    everything = ["for-each-ref"], ["status", "--porcelain"], ["rev-parse", "HEAD"]
    before = [_tree.git(tree, *command) for command in everything]
    with pytest.raises(forks.ForkError, match=r"export.*--force"):
        forks.sync("tiny", root)
    assert forks.patched("tiny", root) == tree
    assert [_tree.git(tree, *command) for command in everything] == before
    assert any("run export" in problem for problem in forks.check("tiny", root))

    forks.sync("tiny", root, force=True)
    assert history(tree) == exported
    assert not _tree.git(tree, "status", "--porcelain")


@pytest.mark.parametrize("work", [uncommitted, untracked, half_rebased], ids=lambda w: w.__name__)
def test_export_wants_commits(root, tree, work):
    before = patches(root)
    work(tree)
    with pytest.raises(forks.ForkError, match="commit or finish that first"):
        forks.export("tiny", root)
    assert patches(root) == before


def test_patches_that_changed_by_a_pull_are_built(root, tree):
    new, with_two = patches(root), history(tree)
    _tree.git(tree, "reset", "-q", "--hard", "main~1")
    forks.export("tiny", root)
    (tree / "tiny" / "__pycache__").mkdir()
    (tree / "tiny" / "__pycache__" / "core.pyc").write_bytes(b"")
    for name, content in new.items():
        (root / "patches" / "tiny" / name).write_bytes(content)
    assert forks.patched("tiny", root) == tree
    assert history(tree) == with_two


@pytest.mark.parametrize(
    "message",
    [f"Cut\n\n{BODY}\n---\nand this is lost", f"Cut\nhalfway\n\n{BODY}"],
    ids=["a line that ends it", "two first lines"],
)
def test_a_message_that_git_am_would_change(root, tree, message):
    before = patches(root)
    commit(tree, {"tiny/core.py": {3: "three"}}, message)
    with pytest.raises(forks.ForkError, match=r"0003-Cut.*\.patch would not come back"):
        forks.export("tiny", root)
    assert patches(root) == before


def test_a_merge_is_refused(root, tree):
    on_a_branch(tree)
    commit(tree, {"tiny/core.py": {3: "three"}})
    _tree.git(tree, "merge", "-q", "other")
    with pytest.raises(forks.ForkError, match="linear"):
        forks.export("tiny", root)


@pytest.fixture
def overlay(root):
    """A file of the repository that the fork takes over, pinned in fork.toml."""
    (root / "compat" / "stream").mkdir(parents=True)
    (root / "compat" / "stream" / "pooling.py").write_text("pooling = 1\n")
    sha256 = hashlib.sha256((root / "forks/tiny/tiny_lib-1.0.tar.gz").read_bytes()).hexdigest()
    pin(root, sha256, '[overlays]\n"compat/stream/pooling.py" = "tiny/sub/pooling.py"\n')
    return root / "compat" / "stream" / "pooling.py"


def test_an_overlay_is_in_the_tree_and_in_no_patch(root, tree, overlay):
    assert forks.sync("tiny", root)
    assert (tree / "tiny" / "sub" / "pooling.py").read_text() == "pooling = 1\n"
    assert not forks.export("tiny", root)
    assert forks.check("tiny", root) == []
    assert sorted(patches(root)) == ["0001-Say-ten.patch", "0002-Say-five.patch", "series"]
    assert not (forks.stock("tiny", root) / "tiny" / "sub").exists()

    overlay.write_text("pooling = 2\n")
    (problem,) = forks.check("tiny", root)
    assert "other files than fork.toml says now (tiny/sub/pooling.py); run sync" in problem
    assert forks.sync("tiny", root)
    assert forks.check("tiny", root) == []
    assert (tree / "tiny" / "sub" / "pooling.py").read_text() == "pooling = 2\n"
    assert (tree / "tiny" / "core.py").read_text().count("five") == 1
    assert not forks.export("tiny", root)


def test_a_patch_leaves_overlays_alone(root, tree, overlay):
    forks.sync("tiny", root)
    assert _tree.git(tree, "log", "--reverse", "--format=%s").split("\n")[1] == "overlay"
    commit(tree, {"tiny/sub/pooling.py": b"pooling = 3\n"})
    forks.export("tiny", root)
    (problem,) = forks.check("tiny", root)
    assert "tiny/sub/pooling.py is an overlay" in problem


def test_an_overlay_is_a_new_file(root, overlay):
    path = root / "forks" / "tiny" / "fork.toml"
    path.write_text(path.read_text().replace("tiny/sub/pooling.py", "tiny/core.py"))
    with pytest.raises(forks.ForkError, match=r"tiny/core\.py is a file of the release"):
        forks.sync("tiny", root)
    overlay.unlink()
    path.write_text(path.read_text().replace("tiny/core.py", "tiny/other.py"))
    with pytest.raises(forks.ForkError, match=r"no .*pooling\.py"):
        forks.sync("tiny", root)


def test_stock_is_the_release(root):
    stock = forks.stock("tiny", root)
    (stock / "tiny" / "core.py").write_text("changed")
    (stock / "backend.py").unlink()
    forks.stock("tiny", root)
    found = {str(p.relative_to(stock)): p.read_bytes() for p in stock.rglob("*") if p.is_file()}
    assert found == RELEASE
    (stock / "tiny" / "trace.pyc").write_text("of a run")
    forks.stock("tiny", root)
    assert (stock / "tiny" / "trace.pyc").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("licence = 'MIT'\n", "licence"),
        ("overlays = ['a']\n", "a table .* is needed"),
        ("name = 'again'\n", r"fork\.toml"),
    ],
)
def test_a_pin_with_an_unknown_key(root, more, said):
    pin(root, 64 * "0", more)
    with pytest.raises(forks.ForkError, match=said):
        forks.sync("tiny", root)


def test_a_pin_without_a_hash(root):
    pin(root, "")
    with pytest.raises(forks.ForkError, match="64 hex digits"):
        forks.sync("tiny", root)


def test_pip_fetches_the_release_and_runs_nothing_of_another(root, tree, tmp_path, monkeypatch):
    shutil.rmtree(tree)
    sdist, index = root / "forks" / "tiny" / "tiny_lib-1.0.tar.gz", tmp_path / "index"
    index.mkdir()
    sdist.rename(index / sdist.name)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(index)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    note = tmp_path / "note"
    monkeypatch.setenv("NOTE", str(note))

    fork_toml = root / "forks" / "tiny" / "fork.toml"
    right = fork_toml.read_text()
    pin(root, 64 * "0")
    with pytest.raises(forks.ForkError, match=r"could not fetch(.|\n)*(?i:hash)"):
        forks.sync("tiny", root)
    assert not note.exists()
    assert not sdist.exists()

    fork_toml.write_text(right)
    assert forks.sync("tiny", root)
    assert note.read_text() == "yes"
    assert sdist.read_bytes() == (index / sdist.name).read_bytes()


@pytest.fixture
def release(root, tmp_path, monkeypatch):
    """Make an sdist of another release, which pip finds: its version, and lines of core.py."""
    index = tmp_path / "index"
    index.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NOTE", str(tmp_path / "note"))
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "0")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:anyio -p no:hypothesispytest")  # Slow to load.

    def make(version, lines, more=()):
        files = RELEASE | {"tiny/core.py": "".join(f"{line}\n" for line in lines).encode()}
        for name in ("PKG-INFO", "backend.py"):
            files[name] = files[name].replace(b"1.0", version.encode())
        make_sdist(index / f"tiny_lib-{version}.tar.gz", files | dict(more), version)

    return make


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Reads the package that comes first on the path.
TEST = """
from pathlib import Path

import tiny

lines = Path(tiny.__path__[0], "core.py").read_text().splitlines()


def test_ten():
    assert "ten" in lines


def test_29():
    assert "line 29" in lines
"""


def bring(root, tree, files):
    """Give the series a third patch, with more files."""
    for name in files:
        (tree / name).parent.mkdir(exist_ok=True)
    commit(tree, {name: text.encode() for name, text in files.items()}, f"Test it\n\n{BODY}")
    forks.export("tiny", root)


@pytest.fixture
def tested(root, tree):
    """The series brings a file of tests."""
    bring(root, tree, {"tests/test_core.py": TEST})


OFFSET = "fits elsewhere (offset 2 lines)"
PASSED, RIGHT = ["2 passed, 0 skipped, 0 failed"], "right"


@pytest.mark.parametrize(
    ("lines", "ten", "five", "tests", "verdict"),
    [
        (LINES, ["applies"], ["applies"], PASSED, RIGHT),
        (
            ["new", "new", *LINES],
            ["applies with an offset", f"tiny/core.py: hunk 1, @@ -10,3 +10,3 @@, {OFFSET}"],
            [
                "applies with an offset",
                f"tiny/core.py: hunk 1, @@ -5,3 +5,3 @@, {OFFSET}",
                f"tiny/core.py: hunk 2, @@ -20,3 +20,3 @@, {OFFSET}",
            ],
            PASSED,
            RIGHT,
        ),
        (
            [*LINES[:10], "10", *LINES[11:]],
            ["fails", "tiny/core.py: hunk 1, @@ -10,3 +10,3 @@, does not apply"],
            ["applies"],
            ["1 passed, 0 skipped, 1 failed", "test_ten: tests/test_core.py:10: AssertionError: "],
            "does not fit",
        ),
        (
            [*LINES[:10], "ten", *LINES[11:]],
            [
                "fails",
                "is in the release already",
                "tiny/core.py: hunk 1, @@ -10,3 +10,3 @@, does not apply",
            ],
            ["applies"],
            PASSED,
            "does not fit",
        ),
        (
            [*LINES[:29], "LINE 29"],
            ["applies"],
            ["applies"],
            ["1 passed, 0 skipped, 1 failed", "test_29: tests/test_core.py:14: AssertionError: "],
            "broken",
        ),
    ],
    ids=["the same", "offset", "conflict", "already", "fits and is wrong"],
)
def test_rebase_tries_another_release_and_runs_the_tests_of_what_applies(
    root, tree, release, tested, lines, ten, five, tests, verdict, capsys
):
    committed(tree)  # Work in the tree is neither used nor lost.
    before = everything(root)
    release("2.0", lines)
    assert __main__.main(["rebase", "tiny", "2.0"], root) == (verdict != "right")
    said = ["tiny-lib 2.0, fetched without a hash:"]
    for name, found in {
        "0001-Say-ten.patch": ten,
        "0002-Say-five.patch": five,
        "0003-Test-it.patch": ["applies"],
    }.items():
        said += [f"{name}: {found[0]}", *(f"    {more}" for more in found[1:])]
    said += ["What fails was left out for those after it."] if "fails" in ten else []
    said += ["The series' own tests, on Python"]
    said += [f"tests/test_core.py (of 0003): {tests[0]}", *(f"    {more}" for more in tests[1:])]
    said += [f"tiny-lib 2.0: {verdict}"]
    found = capsys.readouterr().out.splitlines()
    assert len(found) == len(said)
    assert all(map(str.startswith, found, said)), found
    assert everything(root) == before


def rebased(root, said):
    """What rebase says of 2.0, in which `said` must stand."""
    found = forks.rebase("tiny", "2.0", root)
    assert found.version == "2.0"
    assert said in found.text
    assert found.text.endswith(f"\ntiny-lib 2.0: {found.verdict}")
    return found.verdict


SKIPS = "import pytest\n\ndef test_it():\n    pytest.skip('of a reason')\n"
ABSENT = "ModuleNotFoundError: No module named 'absent'"


@pytest.mark.parametrize(
    ("files", "verdict", "said"),
    [
        ({"tests/mixin.py": "def test_it(): pass\n"}, "not run", "series brings none"),
        ({"tests/test_a.py": SKIPS}, "not run", "0 passed, 1 skipped, 0 failed (of a reason)"),
        ({"tests/test_a.py": "import absent\n"}, "not run", f"tests not run: {ABSENT}"),
        (
            {"tests/test_a.py": "def test_it():\n    import absent\n"},
            "not run",
            f"tests not run: tests/test_a.py:2: {ABSENT}",
        ),
        (
            {
                "tests/test_a.py": "import tiny.a\n\ndef test_it():\n    tiny.a.wrong()\n",
                "tiny/a.py": "def wrong():\n    raise ValueError('of a reason')\n",
            },
            "broken",
            "\n    test_it: tiny/a.py:2: ValueError: of a reason\n",
        ),
        ({"tests/test_a.py": "import tiny.absent\n"}, "broken", "No module named 'tiny.absent'"),
        ({"tests/test_a.py": "import os\n\nos.abort()\n"}, "broken", "status -6"),
        ({"tests/test_a.py": TEST, "tests/conftest.py": "import tiny.a\n"}, "broken", "tiny.a'"),
        ({"tests/test_a.py": TEST, "tiny/__init__.py": "import absent\n"}, "broken", ABSENT),
        (
            {"tests/test_a.py": TEST, "tests/test_b.py": "0 / 0\n"},
            "broken",
            "test_a.py (of 0003): 2",
        ),
    ],
)
def test_rebase_calls_right_only_what_passed(root, tree, release, files, verdict, said):
    release("2.0", LINES)
    bring(root, tree, files)
    assert rebased(root, said) == verdict


def test_rebase_does_not_trust_half_a_report(root, tree, release):
    stop = "import pytest\n\ndef test_b():\n    pytest.exit('stopped')\n"
    release("2.0", LINES)
    bring(root, tree, {"tests/test_a.py": TEST, "tests/test_b.py": stop})
    assert rebased(root, "tests/test_a.py (of 0003): tests not run: pytest ended") == "not run"


def test_rebase_runs_no_test_on_a_release_that_cannot_be_imported(root, release, tested):
    release("2.0", LINES, {"tiny/__init__.py": b"import absent\n"})
    assert rebased(root, f"tests/test_core.py (of 0003): tests not run: {ABSENT}\n") == "not run"


def test_rebase_says_what_ran_the_tests(root, release, tested):
    asked = (
        b"Requires-Dist: pytest>=10000\nRequires-Dist: absent\nRequires-Dist: no; extra == 'a'\n"
    )
    release("2.0", LINES, {"PKG-INFO": RELEASE["PKG-INFO"].replace(b"1.0", b"2.0") + asked})
    said = f"pytest {pytest.__version__} (asked for: >=10000), no absent:\n"
    assert rebased(root, said) == "right"


def test_rebase_tells_a_series_that_the_release_has(root, tree, release):
    commit(tree, {"tiny/core.py": {5: "FIVE"}}, f"Say it louder\n\n{BODY}")
    forks.export("tiny", root)
    release("2.0", (tree / "tiny" / "core.py").read_text().splitlines())
    assert rebased(root, "\nAll patches are in this release already;") == "does not fit"
    release("3.0", [*LINES[:10], "ten", *LINES[11:]])
    assert "All patches" not in forks.rebase("tiny", "3.0", root).text


def test_rebase_takes_the_newest_release(root, release, tested, monkeypatch):
    for version in ("9.0", "10.0.post1", "11.0rc1", "8.0"):
        release(version, LINES)
    found = forks.rebase("tiny", "newest", root)
    assert (found.version, found.verdict) == ("10.0.post1", "right")
    assert found.text.startswith("tiny-lib 10.0.post1, the newest release, fetched")
    monkeypatch.setenv("PIP_PRE", "1")
    with pytest.raises(forks.ForkError, match=r"11\.0rc1, a pre-release"):
        forks.rebase("tiny", "newest", root)


@pytest.mark.parametrize(
    ("runner", "verdict", "said"),
    [
        ("def test_patched(): assert 'new' in LINES", "right", "1 passed, 0 skipped, 0 failed"),
        ("def test_patched(): assert 'old' in LINES", "broken", "0 passed, 0 skipped, 1 failed"),
        ("raise RuntimeError('mend me')", "not run", "tests not run: RuntimeError: mend me"),
        ("", "not run", "tests not run: 0 passed, 0 skipped, 0 failed (no test was found)"),
    ],
)
def test_rebase_runs_tests_by_a_file_of_the_repository(
    root, release, tested, runner, verdict, said
):
    """The tree stands in for the fork there, and the release alone is not tested."""
    path = root / "forks" / "tiny" / "fork.toml"
    path.write_text(path.read_text() + '[run_by]\n"tests/test_core.py" = "tests/run_tiny.py"\n')
    write(
        root / "tests" / "run_tiny.py",
        f"""
        from ci import forks

        TREES = [forks.patched("tiny"), forks.sources("tiny", "patched")]
        LINES = set.intersection(*(
            set((tree / "tiny" / "core.py").read_text().splitlines()) for tree in TREES
        ))

        def test_stock():
            raise AssertionError

        {runner}
        """,
    )
    release("2.0", ["new", *LINES])
    assert rebased(root, f"tests/test_core.py, by tests/run_tiny.py (of 0003): {said}") == verdict


def test_what_runs_a_test_is_there():
    for library in forks.libraries():
        brought = "".join(
            patch.read_text() for patch in (forks.ROOT / "patches" / library).glob("*.patch")
        )
        for test, runner in _release.Fork.read(library).run_by.items():
            assert f"\n+++ b/{test}\n" in brought
            assert (forks.ROOT / runner).is_file()


@pytest.mark.parametrize("there", [False, True])
def test_rebase_lays_overlays(root, release, overlay, there):
    release("2.0", LINES, {"tiny/sub/pooling.py": b"theirs"} if there else ())
    said = "overlay tiny/sub/pooling.py is a file of the release." if there else "fits"
    verdict = rebased(root, f"compat/stream/pooling.py: {said}\n")
    assert (verdict == "does not fit") is there


def test_rebase_names_what_pip_cannot_find(root, release, capsys):
    assert __main__.main(["rebase", "tiny", "3.0"], root) == 1
    assert "could not fetch tiny-lib==3.0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        __main__.main(["rebase", "tiny"], root)


def test_one_builds_while_others_wait(root, tree, monkeypatch):
    shutil.rmtree(tree)
    shutil.rmtree(tree.with_name("stock"))
    made = []
    replace = _release.replace

    def counted(folder, new):
        made.append(folder.name)
        replace(folder, new)

    monkeypatch.setattr(_commands, "replace", counted)
    monkeypatch.setattr(_release, "replace", counted)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda _: forks.sources("tiny", "patched", root), range(4))
        assert set(found) == {tree}
    assert made == ["stock", "tree"]


def test_work_that_begins_during_a_build_is_kept(root, tree, monkeypatch):
    new = patches(root)
    _tree.git(tree, "reset", "-q", "--hard", "main~1")
    forks.export("tiny", root)
    for name, content in new.items():
        (root / "patches" / "tiny" / name).write_bytes(content)
    build = _commands.build

    def slow(*arguments):
        build(*arguments)
        untracked(tree)

    monkeypatch.setattr(_commands, "build", slow)
    with pytest.raises(forks.ForkError, match=r"more\.py"):
        forks.sync("tiny", root)
    assert (tree / "tiny" / "more.py").exists()


def test_a_commit_in_a_new_tree_has_the_author_of_the_patches(root, tree, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    forks.sync("tiny", root, force=True)
    (tree / "tiny" / "core.py").write_text("")
    run = ["git", "-C", str(tree), "commit", "--quiet", "--all", "--message=Say nothing"]
    subprocess.run(run, check=True)
    forks.export("tiny", root)
    (last,) = (text for name, text in patches(root).items() if name.startswith("0003"))
    assert b"\nFrom: Vertical Chunking <maintainers@vertical-chunking.invalid>\n" in last


def test_status_tells_native_patched_and_missing(root, tree, monkeypatch):
    def has(line):
        return lambda tree: line in (tree / "tiny" / "core.py").read_text().splitlines()

    wanted = {"line 3": "native", "ten": "patched", "eleven": "missing"}
    items = [roadmap.Item("tiny", f"says {line}", has(line)) for line in wanted]
    monkeypatch.setattr(roadmap, "ITEMS", [*items, roadmap.Item("absent", "not asked", has(""))])
    heading, *rows = forks.status(["tiny"], root).splitlines()
    assert heading.split("  ")[0] == "roadmap item"
    assert [row.split()[-1] for row in rows] == list(wanted.values())
    assert len({row.index("tiny 1.0") for row in rows}) == 1


def test_the_command_line_fails_where_something_is_wrong(root, tree, capsys):
    def run(*arguments):
        return __main__.main(list(arguments), root)

    assert run("check", "tiny") == 0
    commit(tree, {"tiny/core.py": {3: "three"}}, "Say nothing of why")
    assert run("sync") == 1
    assert "--force" in capsys.readouterr().err
    assert run("export") == 0
    assert run("check") == 1
    assert "has no `Why:`" in capsys.readouterr().err
    assert run("sync", "--force", "tiny") == 0
    assert capsys.readouterr().out == "tiny: built\n"
    assert run("status") == 0
    assert run("sync", "nothing") == 1
    assert "there are tiny" in capsys.readouterr().err


def probe(title):
    (item,) = (item for item in roadmap.ITEMS if item.title == title)
    return item.probe


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text))


CONV = """
    import torch
    from causal_conv1d.cpp_functions import causal_conv1d_fwd_function

    def causal_conv1d_ref(
        x, weight, bias=None, initial_states=None, return_final_states=False, seq_idx=None
    ):
        REFUSES
        ids = torch.cat([seq_idx[:, :1].expand(-1, 3), seq_idx], 1)[0]
        whole = torch.cat([STATES, x], 2)[0, 0]
        out = [
            sum(whole[t - i] for i in range(4) if ids[t - i] == ids[t]) for t in range(3, len(ids))
        ]
        out = torch.stack(out)[None, None]
        last = (whole * (ids == ids[-1]))[None, None, -3:]
        return (out, last) if return_final_states else out
"""


@pytest.mark.parametrize(
    ("refuses", "states", "found"),
    [
        ("", "initial_states", (True, True)),
        ("", "initial_states * 0", (False, False)),
        ("assert not return_final_states", "initial_states", (True, False)),
        ("raise NotImplementedError", "initial_states", (False, False)),
    ],
)
def test_the_convolution_is_probed_by_running_it(tmp_path, refuses, states, found):
    text = CONV.replace("REFUSES", refuses or "pass").replace("STATES", states)
    write(tmp_path / "causal_conv1d" / "causal_conv1d_interface.py", text)
    titles = "seq_idx with initial_states", "seq_idx with return_final_states"
    assert tuple(probe(title)(tmp_path) for title in titles) == found


@pytest.mark.parametrize(("first", "found"), [("0", False), ("tl.load(first_ptr)", True)])
def test_any_sequence_id_is_probed(tmp_path, first, found):
    write(
        tmp_path / "mamba_ssm/ops/triton/ssd_state_passing.py",
        f"""
        def _state_passing_fwd_kernel(seq_idx_ptr, first_ptr):
            seq_idx = {first}
        """,
    )
    assert probe("initial state for any sequence id")(tmp_path) == found


@pytest.mark.parametrize(
    ("test", "found"),
    [
        ("params.seqlen_offset > 0", False),
        ("params.seqlen_offset > 0 and u.shape[1] == 1", True),
        ("params.seqlen_offset > 0 and seqlen == 1", True),
    ],
)
def test_going_on_with_several_tokens_is_probed(tmp_path, test, found):
    write(
        tmp_path / "mamba_ssm/modules/mamba2.py",
        f"""
        class Mamba2:
            def forward(self, u, params, seqlen):
                if params is not None:
                    if {test}:
                        return self.step(u)
                return u
        """,
    )
    assert probe("Mamba2.forward goes on with several tokens")(tmp_path) == found


@pytest.mark.parametrize("found", [True, False])
def test_every_overload_is_probed(tmp_path, found):
    write(
        tmp_path / "model.py",
        f"""
        class Encoder:
            @overload
            def encode(self, inputs, {"size=..." if found else ""}): ...
            def encode(self, inputs, *, size=None): ...
        """,
    )
    assert roadmap.takes("model.py", "Encoder.encode", "size")(tmp_path) == found


def titles(library):
    return {item.title for item in roadmap.ITEMS if item.library == library}


# compat's hooks serve SentenceTransformer alone.
OTHER_ENCODERS = ["SparseEncoder.encode", "MultiVectorEncoder.encode", "CrossEncoder.predict"]


@pytest.mark.parametrize("on", [True, False])
def test_sentence_transformers_is_probed_by_running_it(on):
    if on:
        compat.enable_vertical_chunking()
    found = behaviour.sentence_transformers()
    assert set(found) == titles("sentence-transformers")
    others = {found.pop(f"{name}(vertical_chunk_size=)") for name in OTHER_ENCODERS}
    assert set(found.values()) == {on}
    assert others == {False}


@pytest.mark.parametrize("right", [True, False])
def test_transformers_is_probed_by_running_its_models(monkeypatch, right):
    def check(model_type, case):
        assert right

    monkeypatch.setattr(test_released, "test_released_models_in_chunks", check)
    for name in ("_bamba_without_positions", "_fused", "_fused_in_torch"):
        monkeypatch.setattr(behaviour, name, lambda *_, **__: right)
    found = behaviour.transformers()
    assert set(found) <= titles("transformers")
    assert set(found.values()) == {right}


@pytest.mark.parametrize("found", [True, False])
def test_parameters_are_probed(tmp_path, found):
    extra = ", initial_conv_states=None, *, return_final_conv_states=False" if found else ""
    write(
        tmp_path / "mamba_ssm/ops/triton/ssd_combined.py",
        f"def mamba_split_conv1d_scan_combined(x, initial_states=None{extra}): ...",
    )
    for title in ("fused op: initial conv states", "fused op: final conv states"):
        assert probe(title)(tmp_path) == found
