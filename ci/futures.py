"""Made futures: `python -m ci.futures` says what becomes of compat when transformers changes.

The sources of the installed transformers are copied, changed in one place (`ci.mutations`) and put
in the place of the installed ones, in a process of its own. There a tiny model of a family runs
before `enable_vertical_chunking`, after it, and after `disable_vertical_chunking`; and it is read in
chunks. What it computed before, in one pass, is what is right, whatever a mutation makes of it:

exact    the release's forward, training, continuation and generation are as they were, and chunks
         give what one pass gives
slower   the same, on the released code alone: the fast path was refused
refused  as they were; chunks raise a VerticalChunkingError
BROKEN   something raises that did not, or warns that did not
WRONG    numbers differ

Words as arguments pick the mutations and families that contain them. `--write` puts the table into
ci/FUTURES.md. Exit status 1 where something is broken or wrong, where a mutation does not find its
place, or where it does not do what it says: change the numbers, or leave them.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from ci import readme
from ci.mutations import FAMILIES, HARMLESS, MUTATIONS, UNCHANGED, Copy, DoesNotApply

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "ci" / "FUTURES.md"
EXACT, SLOWER, REFUSED, BROKEN, WRONG = "exact", "slower", "refused", "BROKEN", "WRONG"
FAULTS = (BROKEN, WRONG)
# What takes long to import, and is not mutated.
SHARED = ["torch", "transformers.modeling_utils", "transformers.generation", "compat._hooks"]
SHARED += ["compat._chunks", "sentence_transformers"]
SECONDS = 300  # For one mutation of one family; two are usual.
# The function of compat.ops that does a family's recurrence where compat knows what it is.
FAST = {
    "mamba2": "mamba_split_conv1d_scan_combined",
    "bamba": "mamba_split_conv1d_scan_combined",
    "mamba": "selective_scan_fn",
    "rwkv": "rwkv_linear_attention",
}
# A limit that tokens reach, on both sides.
LIMIT = {"time_step_limit": (0.03, 0.1)}
OVERRIDES: dict[str, dict[str, Any]] = {"mamba2": LIMIT, "bamba": LIMIT}
# The released scan of these begins a chunk of several tokens from zero; enable mends it.
MENDED = {"mamba"}
# Released models of these mix the rows of a batch up.
ONE_ROW = {"rwkv", "xlstm"}
LENGTH, LEFT, SIZES = 36, (0, 5), (7, 16)
NOTICEABLE = 1e-3  # What a change of meaning changes at least, in outputs of size 3.


@dataclasses.dataclass
class Outcome:
    """What became of a mutation of a family.

    Attributes:
        mutation, family: Which.
        verdict: One of the five; empty where the mutation could not be made.
        reasons: Why it is not exact; or why it could not be made.
        numbers: What the model computed before enable, to see what the mutation does.
    """

    mutation: str
    family: str
    verdict: str = ""
    reasons: list[str] = dataclasses.field(default_factory=list)
    numbers: list[float] = dataclasses.field(default_factory=list)


class Mutated(importlib.abc.MetaPathFinder):
    """Finds mutated modules in a folder, before the installed ones are found."""

    def __init__(self, folder: Path, sources: dict[str, str]) -> None:
        self.files: dict[str, Path] = {}
        for name, text in sources.items():
            assert name not in sys.modules, f"{name} was imported before it was mutated"
            file = folder.joinpath(*name.split(".")).with_suffix(".py")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            self.files[name] = file

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Where a module is; None for those that are not mutated."""
        file = self.files.get(fullname)
        return file and importlib.util.spec_from_file_location(fullname, file)


class Trial:
    """One mutated family, before, between and after.

    Args:
        copy: Its sources, which have been put in place.
    """

    def __init__(self, copy: Copy) -> None:
        self.copy = copy
        self.families: Any = importlib.import_module("families")
        tolerances: Any = importlib.import_module("tolerances")
        import torch

        self.torch = torch
        self.right: float = tolerances.CHUNKED[torch.float32]
        self.ids = self.families.tokens(2, LENGTH)
        self.mask = (torch.arange(LENGTH) >= torch.tensor(LEFT)[:, None]).long()

    def model(self) -> Any:
        """A model without a head."""
        overrides = OVERRIDES.get(self.copy.family, {})
        return self.families.tiny_model(self.copy.family, **overrides)

    def causal_lm(self) -> Any:
        """A model with a head."""
        from transformers import AutoModelForCausalLM

        body = self.model()
        self.torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(body.config).eval()
        model.base_model.load_state_dict(body.state_dict())
        return model

    def alone(self) -> list[Any]:
        """Each row's hidden states, alone in one pass."""
        model = self.model()
        with self.torch.no_grad():
            rows = zip(self.ids, LEFT, strict=True)
            return [model(row[None, n:], use_cache=False)[0][0] for row, n in rows]

    def one_pass(self) -> list[Any]:
        """A plain forward without a cache."""
        with self.torch.no_grad():
            return [self.model()(self.ids, use_cache=False)[0]]

    def padded(self) -> list[Any]:
        """The same, with padding on the left."""
        with self.torch.no_grad():
            hidden = self.model()(self.ids, attention_mask=self.mask, use_cache=False)[0]
        return [row[n:] for row, n in zip(hidden, LEFT, strict=True)]

    def trained(self) -> list[Any]:
        """The loss with labels, and the gradients."""
        model = self.causal_lm().train()
        loss = model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        return [loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None]

    def continued(self) -> list[Any]:
        """A user's own continuation from their own state: 14 tokens, 10, and one."""
        model, state, found = self.model(), None, []
        rows = 1 if self.copy.family in ONE_ROW else 2
        with self.torch.no_grad():
            for start, end in ((0, 14), (14, 24), (24, 25)):
                past = {self.copy.argument: state} if start else {}
                output = model(self.ids[:rows, start:end], use_cache=True, **past)
                state = output[self.copy.output]
                found.append(output.last_hidden_state)
        return [self.torch.cat(found, 1)]

    def generated(self) -> list[Any]:
        """Greedy tokens, and their logits."""
        rows = 1 if self.copy.family in ONE_ROW else 2
        output = self.causal_lm().generate(
            self.ids[:rows, :12],
            attention_mask=self.mask[:rows, :12],
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return [output.sequences, *output.logits]

    def chunks(self, size: int) -> list[Any]:
        """compat's hidden states of both rows, with padding on the left."""
        import compat

        stream = compat.iter_chunks(
            self.model(), input_ids=self.ids, attention_mask=self.mask, vertical_chunk_size=size
        )
        hidden = self.torch.cat([piece for _, piece in stream], 1)
        return [row[n:] for row, n in zip(hidden, LEFT, strict=True)]

    def apart(self, found: list[Any], wanted: list[Any]) -> float:
        """The largest absolute error; infinite where shapes differ or a number is none."""
        if [x.shape for x in found] != [x.shape for x in wanted]:
            return float("inf")
        pairs = zip(found, wanted, strict=True)
        worst = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
        return worst if worst == worst else float("inf")


Seen = tuple[list[Any] | Exception, set[str]]


def seen(run: Callable[[], list[Any]]) -> Seen:
    """What a function gives, or raises; and the warnings of the future that it gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found: list[Any] | Exception = run()
        except Exception as error:
            found = error
    return found, {str(w.message) for w in caught if issubclass(w.category, FutureWarning)}


def said(error: Exception) -> str:
    """An error in one line."""
    text = getattr(error, "found", "") or str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"


def names_of_ops(run: Callable[[], list[Any]]) -> tuple[list[Any], set[str]]:
    """What a function gives, and which functions of compat.ops ran."""
    import compat.ops

    folder, names = str(Path(compat.ops.__file__).parent), set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            names.add(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        return run(), names
    finally:
        sys.setprofile(None)


class Judge:
    """Collects what is found, the worst of which is the verdict."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.found: list[tuple[str, str]] = []
        # Bit for bit, but where compat's ops may serve a pass without a cache, in their own order.
        self.probes: dict[str, tuple[Callable[[], list[Any]], float]] = {
            "a forward": (trial.one_pass, trial.right),
            "a forward with padding": (trial.padded, trial.right),
            "training": (trial.trained, 0.0),
            "a continuation": (trial.continued, 0.0),
            "generate": (trial.generated, 0.0),
        }
        self.alone = trial.alone()
        self.before = {name: seen(run) for name, (run, _) in self.probes.items()}
        for _, (found, _) in self.before.items():
            if isinstance(found, Exception):
                raise found  # The mutation is not one that upstream could make.

    def numbers(self) -> list[float]:
        """What the mutated model computes in one pass, and where it continues."""
        hidden = [self.before[name][0] for name in ("a forward", "a continuation", "generate")]
        tensors = [hidden[0][0], hidden[1][0], hidden[2][1]]  # type: ignore[index]
        return [float(x) for tensor in tensors for x in tensor.flatten()[-64:]]

    def verdict(self) -> str:
        """The worst of all."""
        verdicts = [verdict for verdict, _ in self.found]
        worst = (WRONG, BROKEN, REFUSED, SLOWER)
        return next((verdict for verdict in worst if verdict in verdicts), EXACT)

    def add(self, verdict: str, reason: str) -> None:
        """Note something."""
        if (verdict, reason) not in self.found:
            self.found.append((verdict, reason))

    def released(self, when: str, mended: bool) -> None:
        """See whether the release does what it did before."""
        for name, (run, bound) in self.probes.items():
            (wanted, known), (found, warned) = self.before[name], seen(run)
            assert isinstance(wanted, list)
            if isinstance(found, Exception):
                self.add(BROKEN, f"{name} {when}: {said(found)}")
                continue
            error = self.trial.apart(found, wanted)
            if name == "a continuation" and mended and error > bound:
                # It is to be one pass then, but for a single token.
                whole = [part[:, :24] for part in self.before["a forward"][0]]  # type: ignore[union-attr]
                error, bound = self.trial.apart([part[:, :24] for part in found], whole), self.trial.right
            if error > (bound if when == "after enable" else 0):
                self.add(WRONG, f"{name} {when}: {error:.1g}")
            if new := warned - known:
                self.add(BROKEN, f"{name} {when} warns: {sorted(new)[0]}")

    def chunks(self, when: str, fast: str | None) -> None:
        """See whether chunks give what one pass gave."""
        import compat

        for size in SIZES:
            names: set[str] = set()

            def run(size: int = size, names: set[str] = names) -> list[Any]:
                found, ran = names_of_ops(lambda: self.trial.chunks(size))
                names |= ran
                return found

            found, warned = seen(run)
            if isinstance(found, compat.VerticalChunkingError):
                self.add(REFUSED, f"chunks {when}: {said(found)}")
            elif isinstance(found, Exception):
                self.add(BROKEN, f"chunks {when}: {said(found)}")
            elif (error := self.trial.apart(found, self.alone)) > self.trial.right:
                self.add(WRONG, f"chunks {when}: {error:.1g}")
            elif fast and fast not in names:
                self.add(SLOWER, f"chunks {when} without {fast}")
            if warned:
                self.add(BROKEN, f"chunks {when} warn: {sorted(warned)[0]}")


def judge(mutation: str, family: str) -> Outcome:
    """Run a mutated family in this process, in which nothing of it has been imported."""
    outcome = Outcome(mutation, family)
    try:
        copy = MUTATIONS[mutation].applied(family)
    except DoesNotApply as error:
        outcome.reasons.append(f"does not apply: {error}")
        return outcome
    sys.path.append(str(ROOT / "tests"))
    import torch
    from transformers.utils import logging

    import compat

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        mutated = Mutated(Path(folder), copy.sources)
        sys.meta_path.insert(0, mutated)
        try:
            judged = Judge(Trial(copy))
        except Exception as error:
            outcome.reasons.append(f"does not run: {said(error)}")
            return outcome
        for name, file in mutated.files.items():
            assert Path(str(sys.modules[name].__file__)) == file, f"{name} is not the mutated one"
        try:
            compat.enable_vertical_chunking()
        except Exception as error:  # Of compat's or not: other families could not be enabled either.
            judged.add(BROKEN, f"enable: {said(error)}")
        judged.released("after enable", family in MENDED)
        judged.chunks("after enable", FAST.get(family))
        compat.disable_vertical_chunking()
        judged.released("after disable", mended=False)
        judged.chunks("after disable", FAST.get(family))
    outcome.verdict, outcome.numbers = judged.verdict(), judged.numbers()
    outcome.reasons = [reason for _, reason in judged.found]
    return outcome


def _answer(mutation: str, family: str, answers: Connection) -> None:
    answers.send(judge(mutation, family))


def run(pairs: Iterable[tuple[str, str]], workers: int = 2) -> list[Outcome]:
    """Judge mutations of families, each in a process of its own."""
    # The server has imported what is not mutated; each process is a fork of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SHARED)

    def one(pair: tuple[str, str]) -> Outcome:
        answers, asked = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(*pair, asked))
        process.start()
        asked.close()
        try:
            outcome: Outcome = answers.recv() if answers.poll(SECONDS) else _dead(pair, "no answer")
        except EOFError:
            outcome = _dead(pair, "the process died")
        process.kill()
        process.join()
        return outcome

    with ThreadPoolExecutor(workers) as threads:
        return list(threads.map(one, pairs))


def _dead(pair: tuple[str, str], why: str) -> Outcome:
    return Outcome(*pair, BROKEN, [why])


def pairs(words: Sequence[str] = ()) -> list[tuple[str, str]]:
    """The mutations and families whose names contain all of the words; all that are unchanged."""
    return [
        (name, family)
        for name, mutation in MUTATIONS.items()
        for family in mutation.families
        if name == UNCHANGED or all(word in f"{name} {family}" for word in words)
    ]


def faults(outcomes: Sequence[Outcome]) -> list[str]:
    """What is broken, wrong, or not the mutation that it says it is."""
    plain = {o.family: o.numbers for o in outcomes if o.mutation == UNCHANGED}
    found = []
    for outcome in outcomes:
        said = f"{outcome.mutation}, {outcome.family}"
        if outcome.verdict in FAULTS or not outcome.verdict:
            why = "; ".join(outcome.reasons)
            found.append(f"{said}: {outcome.verdict} {why}".replace("  ", " "))
        if not outcome.numbers:
            continue
        differ = max(abs(a - b) for a, b in zip(outcome.numbers, plain[outcome.family], strict=True))
        if (differ > 0) if MUTATIONS[outcome.mutation].kind == HARMLESS else differ < NOTICEABLE:
            found.append(f"{said}: the mutation changes numbers by {differ:.1g}")
    return found


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as Markdown, and below the table why they are not all exact."""
    cells = {(o.mutation, o.family): o for o in outcomes}
    lines = [f"| what changes | numbers | {' | '.join(FAMILIES)} |", "|---" * (len(FAMILIES) + 2) + "|"]
    for name, mutation in MUTATIONS.items():
        own = [cells.get((name, family)) for family in FAMILIES]
        if any(own):
            row = ["–" if o is None else o.verdict or "not made" for o in own]
            kind = "the same" if mutation.kind == HARMLESS else "others"
            lines.append(f"| {name} | {kind} | {' | '.join(row)} |")
    reasons: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.verdict == REFUSED or outcome.verdict in FAULTS:
            for reason in outcome.reasons:
                reasons.setdefault(reason, []).append(f"{outcome.mutation} ({outcome.family})")
    return "\n".join(lines)


def versions() -> str:
    """The day, and what was changed."""
    return f"{date.today()}, transformers {version('transformers')}, torch {version('torch')}"


def main(arguments: Sequence[str]) -> int:
    """Print the table, write it if asked to, and return the exit status."""
    words = [word for word in arguments if not word.startswith("--")]
    outcomes = run(pairs(words), min(2, os.cpu_count() or 1))
    if "--json" in arguments:
        print(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes]))
        return 0
    print(table(outcomes))
    if "--write" in arguments:
        if words:
            raise SystemExit("Found words beside --write; needed: the whole table. Leave them out.")
        readme.put("futures", f"{versions()}\n\n{table(outcomes)}", TABLE)
    found = faults(outcomes)
    for outcome in outcomes:
        if outcome.verdict == REFUSED:
            print(f"{outcome.mutation}, {outcome.family}: {outcome.reasons[0]}", file=sys.stderr)
    for fault in found:
        print(fault, file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
