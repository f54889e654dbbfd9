"""The benchmark of needles is about what it says; no test looks at what is learned."""

import re

import pytest
import torch
from support.tolerances import GRADIENTS
from torch.nn.functional import normalize

from ci.bench import needles
from ci.bench.needles import NAMES, SMOKE, Found
from ci.tables import markers
from compat.families.gradients import run
from compat.families.lookup import backbone_of

LENGTH = 512


def made(which, **slots):
    return needles.texts(which, LENGTH, torch.Generator().manual_seed(0), **slots)


def test_a_text_tells_its_name_once_in_its_first_half_and_where_it_is_said():
    which = torch.arange(NAMES)
    tokens, at = made(which)
    assert torch.equal((tokens == needles.TELL).nonzero(), torch.cat([which[:, None], at], 1))
    assert torch.equal(tokens.gather(1, at + torch.tensor([[1, 2]])), needles.names(which))
    assert int(at.max()) + 2 < LENGTH // 2 <= LENGTH - LENGTH // SMOKE.share
    assert (tokens[:, -1] == needles.END).all()
    assert ((tokens == needles.SAID).sum(1) == LENGTH // needles.SLOT - 1).all()
    assert torch.equal(
        made(which, slots=torch.ones(NAMES, dtype=int))[1] // needles.SLOT, 0 * at + 1
    )


def test_nothing_else_in_a_text_depends_on_its_name():
    tokens, at = made(torch.arange(NAMES))
    others, same = made(torch.arange(NAMES) ^ 0b10001)  # Both halves are others.
    assert torch.equal(at, same)
    places = (tokens != others).nonzero()[:, 1].view(NAMES, 2)
    assert torch.equal(places, at + torch.tensor([[1, 2]]))


def test_names_and_queries_are_all_different():
    assert len(needles.names(torch.arange(NAMES)).unique(dim=0)) == NAMES
    assert len(needles.queries().unique(dim=0)) == NAMES


def test_a_cut_text_keeps_its_beginning_and_its_end():
    tokens, _ = made(torch.arange(3))
    short = needles.cut(tokens, 100)
    assert torch.equal(short[:, :99], tokens[:, :99])
    assert torch.equal(short[:, 99], tokens[:, -1])
    assert torch.equal(needles.cut(tokens, LENGTH), tokens)
    assert torch.equal(needles.cut(tokens, 2 * LENGTH), tokens)


def test_exact_gradients_are_those_of_autograd_and_truncated_ones_do_not_reach_the_needle():
    model = needles.make_model(SMOKE, 0)
    tokens, _ = made(torch.arange(3))
    wanted = normalize(run(*backbone_of(model), tokens, 0, None)[0][:, -1], dim=1)
    ways = [wanted, needles.exact(model, tokens, 100), needles.truncated(model, tokens, 128)]
    assert all(torch.allclose(way, wanted, atol=1e-5) for way in ways)
    weights = torch.linspace(-1, 2, wanted.numel()).view_as(wanted)
    gradients = [torch.autograd.grad((way * weights).sum(), [*model.parameters()]) for way in ways]
    plain, exact, truncated = gradients
    for one, other in zip(plain, exact, strict=True):
        assert (one - other).abs().max() <= GRADIENTS[torch.float32] * one.abs().max()
    off = [(a - b).abs().max() / a.abs().max() for a, b in zip(plain, truncated, strict=True)]
    assert max(off) > 0.1
    of_needle = [
        dict(zip(dict(model.named_parameters()), way, strict=True))["embeddings.weight"]
        for way in gradients
    ]
    found = [bool(table[needles.TELL].any()) for table in of_needle]
    assert found == [True, True, False]


def test_all_begin_from_the_same_weights():
    one, other = (needles.make_model(SMOKE, 0).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_ranks_are_counted_and_texts_that_are_all_alike_are_not_found(monkeypatch):
    model = needles.make_model(SMOKE, 0)
    monkeypatch.setattr(needles, "exact", lambda model, tokens, chunk: torch.ones(len(tokens), 1))
    assert [set(found.ranks) for found in needles.find(model, SMOKE)] == [{NAMES}, {NAMES}]
    found = Found(256, [1, 2, 4, 1])
    assert found.recall() == 0.5
    assert found.recall(slice(0, 1)) == 1
    assert found.reciprocal() == pytest.approx(2.75 / 4)


def test_the_right_text_is_first_where_a_model_reads_the_needle(monkeypatch):
    """Stand in for a model that has learned it."""

    def exact(model, tokens, chunk):
        told = (tokens == needles.TELL) | (tokens == needles.ASK)
        columns = told.int().argmax(1, keepdim=True) + torch.tensor([[1, 2]])
        halves = torch.nn.functional.one_hot(tokens.gather(1, columns), needles.END).flatten(1)
        return halves.float() * told.any(1, keepdim=True)

    monkeypatch.setattr(needles, "exact", exact)
    assert [found.recall() for found in needles.find(None, SMOKE)] == [1, 1]
    cut = needles.find(None, SMOKE, SMOKE.cut)
    # Of 512 tokens, 128 show the needles of the first of two slots.
    assert cut[1].recall(slice(0, NAMES // 2)) > 0.9
    assert cut[1].recall(slice(NAMES // 2, NAMES)) < 0.1


def test_it_trains_and_writes_its_tables(tmp_path, monkeypatch, capsys):
    path = tmp_path / "NEEDLES.md"
    sections = [f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in needles.TABLES]
    path.write_text("\nbetween\n".join(sections))
    monkeypatch.setattr(markers, "NEEDLES", path)
    needles.main(["--smoke", "--readme"])
    parts = path.read_text().split("\nbetween\n")
    printed = capsys.readouterr().out
    ways = [needles.EXACT, needles.TRUNCATED, "texts cut to 128", needles.WHOLE]
    ways.append("truncated gradients, 2 times the steps")
    for name, part, begin in zip(needles.TABLES, parts, ([], [needles.START]), strict=True):
        text = part.removeprefix(f"<!-- {name} -->\n").removesuffix(f"\n<!-- /{name} -->\n")
        assert text.startswith("**Smoke sizes")
        assert f"{text}\n" in printed
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
        rows = [row for row in rows if row and re.fullmatch(r"[\d,]+", row[3])]
        assert [row[0] for row in rows if row[0]] == begin + ways
        assert [row[3] for row in rows] == ["256", "512"] * len(begin + ways)
        assert all(0 <= float(number) <= 1 for row in rows for number in row[4:])
