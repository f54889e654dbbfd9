"""Frames of files of tests that the sdist leaves out, and tests put into upstream's own."""

import shutil
import subprocess

import pytest

from ci import forks
from ci.forks import __main__, _tree
from tests.ci.test_forks import commit, make_sdist, pin
from tests.ci.test_requests import PAGE, RELEASE, make_clone

FRAME = """import unittest

from frame import thing


class CoreTest(unittest.TestCase):
    def test_there(self):
        pass
"""
TEN = """
    def test_ten(self):
        with open("tiny/core.py") as file:
            self.assertIn('"ten"', file.read(), thing)
"""
TWENTY = TEN.replace("ten", "twenty")
UPSTREAM = '''import unittest


class CoreTest(unittest.TestCase):
    """As upstream has it."""

    def test_other(self):
        pass


class MoreTest(unittest.TestCase):
    pass
'''
PATH = "tests/test_core.py"


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Make a fork with a frame, and two patches with a test in it each, at the same place."""
    root = tmp_path_factory.mktemp("frames") / "root"
    folder = root / "forks" / "tiny"
    (folder / "frames" / "tests").mkdir(parents=True)
    (folder / "frames" / PATH).write_text(FRAME)
    (folder / "pull_requests").mkdir()
    (folder / "PULL_REQUEST.md").write_text("<!-- requests -->\n<!-- /requests -->\n")
    pin(root, make_sdist(folder / "tiny_lib-1.0.tar.gz", RELEASE))
    tree = forks.patched("tiny", root)
    text = FRAME
    for number, (word, test) in enumerate([("ten", TEN), ("twenty", TWENTY)], 1):
        text += test
        changes = {"tiny/core.py": {number * 10: f'    "{word}",'}, PATH: text.encode()}
        commit(tree, changes, f"Say {word}\n\nIt was not said.")
        page = folder / "pull_requests" / f"{number:02d}-say-{word}.md"
        page.write_text(PAGE.format(word=word).lstrip())
    forks.export("tiny", root)
    forks.write_index("tiny", root)
    return root


@pytest.fixture
def root(made, tmp_path):
    return shutil.copytree(made, tmp_path / "root")


@pytest.fixture
def clone(tmp_path):
    """Upstream's main in somebody's clone, with the file that the frame stands for."""
    return make_clone(tmp_path / "clone", RELEASE | {PATH: UPSTREAM.encode()})


def test_tests_at_the_same_place_are_each_alone(root):
    assert forks.check("tiny", root, quick=True) == []


def test_a_patch_is_written_on_the_frame(root):
    tree = forks.patched("tiny", root)
    assert _tree.git(tree, "show", f"base:{PATH}") == FRAME
    assert f"b/{PATH}" in "".join(p.read_text() for p in root.glob("patches/tiny/*.patch"))


def test_a_file_of_the_release_needs_no_frame(root):
    folder = root / "forks" / "tiny"
    (folder / "tiny_lib-1.0.tar.gz").unlink()
    shutil.rmtree(root / "patches")
    pin(root, make_sdist(folder / "tiny_lib-1.0.tar.gz", RELEASE | {PATH: UPSTREAM.encode()}))
    forks.sync("tiny", root, force=True)
    assert (folder / "tree" / PATH).read_text() == UPSTREAM


def test_a_request_puts_its_tests_into_upstreams_class(root, clone, capsys):
    assert __main__.main(["request", "tiny", "say-twenty", "--onto", str(clone)], root) == 0
    first, more = UPSTREAM.split("\n\n\nclass MoreTest")
    wanted = f"{first}\n{TWENTY}\n\nclass MoreTest{more}"
    assert (clone / PATH).read_text() == wanted
    assert f"{PATH}: test_twenty wants an import of thing" in capsys.readouterr().out
    assert not _tree.git(clone, "status", "--porcelain")

    # Once more, as after a change of the test: it is replaced.
    _tree.git(clone, "branch", "-m", "done")
    assert __main__.main(["request", "tiny", "say-ten", "--onto", str(clone)], root) == 0
    assert (clone / PATH).read_text().count("def test_") == 3


@pytest.mark.parametrize(
    ("text", "said"), [("X = 1\n", "no class CoreTest for test_ten"), ("", "no such file here")]
)
def test_what_is_not_there_is_said(root, clone, capsys, text, said):
    (clone / PATH).write_text(text)
    if not text:
        (clone / PATH).unlink()
    subprocess.run(["git", "commit", "-qam", "Another"], cwd=clone, check=True)
    assert __main__.main(["request", "tiny", "say-ten", "--onto", str(clone)], root) == 0
    assert f"{PATH}: {said}" in capsys.readouterr().out
    assert '"ten"' in (clone / "tiny" / "core.py").read_text()
