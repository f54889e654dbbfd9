"""Find out what becomes of compat when transformers changes: `python -m ci.futures`.

The sources of the installed transformers are copied, changed in one place (`mutations.py`) and put
in the place of the installed ones, in a process of its own. There tiny models of a family run
before `enable_vertical_chunking`, after it, and after `disable_vertical_chunking`, and are read in
chunks. The standard is what the mutated model gave before, in one pass. The verdicts are:

exact    forward, training, continuation and generation of the release are as they were before, and
         chunks give the results of one pass
slower   as exact, but the fast path was refused, in whole or in part
refused  the release is as it was before; chunks raise a VerticalChunkingError
BROKEN   something raises that did not, or gives a FutureWarning that it did not give
WRONG    numbers differ

Arguments are regular expressions, of which one must be found in "mutation, family". `--write` puts
the table into FUTURES.md beside this file, `--json` prints all results. The exit status is 1 where
something is broken or wrong, where a mutation does not find its place, and where a mutation does
not do what it claims: leave the numbers as they are, or change them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from ci.futures.mutations import HARMLESS, MUTATIONS, UNCHANGED
from ci.futures.rewrite import FAMILIES, Copy, DoesNotApply
from ci.tables import markers

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).parent / "FUTURES.md"
EXACT, SLOWER, REFUSED, BROKEN, WRONG = "exact", "slower", "refused", "BROKEN", "WRONG"
NOT_MADE = "not made"
NOWHERE = "-"  # The family has no place for the mutation.
FAULTS = (BROKEN, WRONG, NOT_MADE)
# These take long to import, and are not mutated.
SHARED = ["torch", "transformers.modeling_utils", "transformers.generation", "compat.hooks.switch"]
SHARED += ["compat.stream.loop", "sentence_transformers"]
ENABLED = "after enable"
SECONDS = 300  # The limit for one mutation of one family; two seconds are usual.
# The function of compat.ops that does the recurrence of a family whose code compat recognises.
FAST = {
    "mamba2": "mamba_split_conv1d_scan_combined",
    "bamba": "mamba_split_conv1d_scan_combined",
    "mamba": "selective_scan_fn",
    "rwkv": "rwkv_linear_attention",
}
# A limit that tokens reach on both sides.
LIMIT = {"time_step_limit": (0.03, 0.1)}
BESIDE = "lfm2"  # A family that is not mutated.
OVERRIDES: dict[str, dict[str, Any]] = {"mamba2": LIMIT, "bamba": LIMIT}
# The released scan of these begins each chunk of several tokens from zero; enable mends that.
MENDED = {"mamba"}
# Released models of these mix up the rows of a batch.
ONE_ROW = {"rwkv", "xlstm"}
LENGTH, LEFT, SIZES = 36, (0, 5), (7, 16)
NOTICEABLE = 1e-3  # The least change that a change of meaning makes, in outputs of size 3.


@dataclasses.dataclass
class Outcome:
    """The outcome of a mutation of a family.

    Attributes:
        mutation, family: The names of both.
        verdict: One of the five; empty where the mutation could not be made.
        reasons: Each reason why it is not exact or could not be made, with the verdict that it
            leads to.
        numbers: The mutated model's outputs before enable, which show the mutation's effect.
    """

    mutation: str
    family: str
    verdict: str = ""
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    numbers: list[float] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        """Return the name by which it is picked."""
        return f"{self.mutation}, {self.family}"

    def because(self) -> list[str]:
        """Return the reasons for the verdict."""
        return [reason for reason, verdict in self.reasons.items() if verdict == self.verdict]


class Mutated(importlib.abc.MetaPathFinder):
    """A finder that finds the mutated modules of a folder before the installed ones."""

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
        """Return the spec of a mutated module; None for any other."""
        if fullname not in self.files:
            return None
        return importlib.util.spec_from_file_location(fullname, self.files[fullname])


class Trial:
    """The models of a mutated family, for the same runs before, between and after.

    Args:
        copy: The family's sources, which have been put in place.
    """

    def __init__(self, copy: Copy) -> None:
        self.copy = copy
        self.families: Any = importlib.import_module("support.families")
        tolerances: Any = importlib.import_module("support.tolerances")
        import torch

        self.torch = torch
        self.right: float = tolerances.CHUNKED[torch.float32]
        self.ids = self.families.tokens(2, LENGTH)
        self.mask = (torch.arange(LENGTH) >= torch.tensor(LEFT)[:, None]).long()

    def model(self) -> Any:
        """Make a model without a head."""
        overrides = OVERRIDES.get(self.copy.family, {}) | self.copy.settings
        return self.families.tiny_model(self.copy.family, **overrides)

    def causal_lm(self) -> Any:
        """Make a model with a head."""
        from transformers import AutoModelForCausalLM

        body = self.model()
        self.torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(body.config).eval()
        model.base_model.load_state_dict(body.state_dict())
        return model

    def alone(self) -> list[Any]:
        """Return each row's hidden states, alone in one pass."""
        model = self.model()
        with self.torch.no_grad():
            rows = zip(self.ids, LEFT, strict=True)
            return [model(row[None, n:], use_cache=False)[0][0] for row, n in rows]

    def one_pass(self) -> list[Any]:
        """Run a plain forward without a cache."""
        with self.torch.no_grad():
            return [self.model()(self.ids, use_cache=False)[0]]

    def padded(self) -> list[Any]:
        """Run a plain forward with padding on the left."""
        with self.torch.no_grad():
            hidden = self.model()(self.ids, attention_mask=self.mask, use_cache=False)[0]
        return [row[n:] for row, n in zip(hidden, LEFT, strict=True)]

    def trained(self) -> list[Any]:
        """Return the loss with labels, and the gradients."""
        model = self.causal_lm().train()
        loss = model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        return [loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None]

    def continued(self) -> list[Any]:
        """Continue as a user would, from the model's own state: 14 tokens, 10, and one."""
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
        """Return greedy tokens, and their logits."""
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

    def chunks(self, size: int, names: set[str]) -> list[Any]:
        """Return compat's hidden states of both rows, with padding on the left.

        Args:
            size: Tokens in a chunk.
            names: Receives the names of the functions of compat.ops that ran.
        """
        import compat

        model = self.model()
        with noting_ops(names):
            stream = compat.iter_chunks(
                model, input_ids=self.ids, attention_mask=self.mask, vertical_chunk_size=size
            )
            hidden = self.torch.cat([piece for _, piece in stream], 1)
        return [row[n:] for row, n in zip(hidden, LEFT, strict=True)]

    def apart(self, found: list[Any], wanted: list[Any]) -> float:
        """Return the largest absolute error; infinite where shapes differ or a number is NaN."""
        if [x.shape for x in found] != [x.shape for x in wanted]:
            return float("inf")
        pairs = zip(found, wanted, strict=True)
        worst = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
        return worst if worst == worst else float("inf")


Seen = tuple[list[Any] | Exception, set[str]]


def seen(run: Callable[[], list[Any]]) -> Seen:
    """Return the result or the error of a function, and the FutureWarnings that it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found: list[Any] | Exception = run()
        except Exception as error:
            found = error
    return found, {str(w.message) for w in caught if issubclass(w.category, FutureWarning)}


def said(error: Exception) -> str:
    """Describe an error in one line."""
    text = getattr(error, "found", "") or str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def noting_ops(names: set[str]) -> Iterator[None]:
    """Add the names of the functions of compat.ops that run."""
    import compat.ops

    folder = str(Path(compat.ops.__file__).parent)

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            names.add(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


class Judge:
    """A collector of findings, the worst of which is the verdict."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        # The places of each finding, by verdict and reason.
        self.found: dict[tuple[str, str], list[str]] = {}
        # The bound is 0, bit for bit, except where compat's ops may serve a pass without a cache,
        # which sum in another order.
        self.probes: dict[str, tuple[Callable[[], list[Any]], float]] = {
            "forward": (trial.one_pass, trial.right),
            "forward with padding": (trial.padded, trial.right),
            "training": (trial.trained, 0.0),
            "continuation": (trial.continued, 0.0),
            "generation": (trial.generated, 0.0),
        }
        self.alone = trial.alone()
        self.before: dict[str, list[Any]] = {}
        self.known: dict[str, set[str]] = {}
        for name, (run, _) in self.probes.items():
            found, self.known[name] = seen(run)
            if isinstance(found, Exception):
                raise found  # Upstream could not make such a mutation.
            self.before[name] = found

    def numbers(self) -> list[float]:
        """Return the mutated model's outputs in one pass, and where it continues."""
        hidden = [self.before["forward"][0], self.before["continuation"][0]]
        tensors = [*hidden, self.before["generation"][1]]
        return [float(x) for tensor in tensors for x in tensor.flatten()[-64:]]

    def outcome(self, mutation: str) -> Outcome:
        """Return all findings, in few words."""
        worst = (WRONG, BROKEN, REFUSED, SLOWER)
        found = {verdict for verdict, _ in self.found}
        verdict = next((verdict for verdict in worst if verdict in found), EXACT)
        reasons = {f"{', '.join(w)}: {why}": v for (v, why), w in self.found.items()}
        return Outcome(mutation, self.trial.copy.family, verdict, reasons, self.numbers())

    def add(self, verdict: str, where: str, why: str) -> None:
        """Note a finding."""
        places = self.found.setdefault((verdict, why), [])
        if where not in places:
            places.append(where)

    def released(self, when: str) -> None:
        """Check whether the release gives what it gave before."""
        for name, (run, bound) in self.probes.items():
            found, warned = seen(run)
            if isinstance(found, Exception):
                self.add(BROKEN, f"{name} {when}", said(found))
                continue
            error = self.trial.apart(found, self.before[name])
            enabled = when == ENABLED
            if enabled and name == "continuation" and self.trial.copy.family in MENDED:
                error = min(error, self.mended(found))
                bound = self.trial.right
            if error > (bound if enabled else 0):
                self.add(WRONG, f"{name} {when}", f"off by {error:.0e}")
            if new := warned - self.known[name]:
                self.add(BROKEN, f"{name} {when}", f"warns, {sorted(new)[0]}")

    def mended(self, continued: list[Any]) -> float:
        """Return the distance of a continuation from one pass, leaving out its single token."""
        parts = [[hidden[:1, :24] for hidden in x] for x in (continued, self.before["forward"])]
        return self.trial.apart(parts[0], parts[1])

    def chunks(self, when: str) -> None:
        """Check whether chunks give what one pass gave."""
        import compat

        fast = FAST.get(self.trial.copy.family)
        for size in SIZES:
            names: set[str] = set()
            found, warned = seen(functools.partial(self.trial.chunks, size, names))
            if isinstance(found, compat.VerticalChunkingError):
                self.add(REFUSED, f"chunks {when}", said(found))
            elif isinstance(found, Exception):
                self.add(BROKEN, f"chunks {when}", said(found))
            elif (error := self.trial.apart(found, self.alone)) > self.trial.right:
                self.add(WRONG, f"chunks {when}", f"off by {error:.0e}")
            elif fast and fast not in names:
                self.add(SLOWER, f"chunks {when}", f"without {fast}")
            if warned:
                self.add(BROKEN, f"chunks {when}", f"warns, {sorted(warned)[0]}")

    def another(self, when: str) -> None:
        """Check whether a family that was not mutated is still read in chunks."""
        import compat

        where, torch = f"chunks of {BESIDE} {when}", self.trial.torch
        model, ids = self.trial.families.tiny_model(BESIDE), self.trial.ids
        with torch.no_grad():
            whole = model(ids, use_cache=False)[0]
        try:
            stream = compat.iter_chunks(model, input_ids=ids, vertical_chunk_size=SIZES[0])
            error = self.trial.apart([torch.cat([piece for _, piece in stream], 1)], [whole])
        except Exception as failure:  # A refusal counts too, as this family was not mutated.
            self.add(BROKEN, where, said(failure))
        else:
            if error > self.trial.right:
                self.add(WRONG, where, f"off by {error:.0e}")


def judge(mutation: str, family: str) -> Outcome:
    """Run a mutated family in this process, which has not imported any of it."""
    try:
        copy = MUTATIONS[mutation].applied(family)
    except DoesNotApply as error:
        return Outcome(mutation, family, NOT_MADE, {f"it does not apply: {error}": NOT_MADE})
    sys.path.append(str(ROOT / "tests"))
    import torch
    from transformers.utils import logging

    import compat

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".* has attention layers")
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),  # Undocumented arguments are printed.
    ):
        mutated = Mutated(Path(folder), copy.sources)
        sys.meta_path.insert(0, mutated)
        try:
            judged = Judge(Trial(copy))
        except Exception as error:
            return Outcome(
                mutation, family, NOT_MADE, {f"it does not run: {said(error)}": NOT_MADE}
            )
        for name, file in mutated.files.items():
            assert Path(str(sys.modules[name].__file__)) == file, f"{name} is not the mutated one"
        try:
            compat.enable_vertical_chunking()
        except compat.VerticalChunkingError as error:
            # This takes all families out, which is right only where all of them are concerned.
            judged.add(REFUSED if copy.is_shared else BROKEN, "enable", said(error))
        except Exception as error:
            judged.add(BROKEN, "enable", said(error))
        for when in (ENABLED, "after disable"):
            judged.released(when)
            judged.chunks(when)
            if not copy.is_shared:
                judged.another(when)
            compat.disable_vertical_chunking()
    return judged.outcome(mutation)


def _answer(mutation: str, family: str, answers: Connection) -> None:
    answers.send(judge(mutation, family))


def run(pairs: Iterable[tuple[str, str]]) -> list[Outcome]:
    """Judge mutations of families, each in a process of its own."""
    # The server has imported all modules that no mutation of a single family changes; each process
    # is a fork of it.
    forks, fresh = multiprocessing.get_context("forkserver"), multiprocessing.get_context("spawn")
    forks.set_forkserver_preload(SHARED)

    def one(pair: tuple[str, str]) -> Outcome:
        try:
            is_shared = MUTATIONS[pair[0]].applied(pair[1]).is_shared
        except DoesNotApply:
            is_shared = False  # The process will report the error.
        context = fresh if is_shared else forks
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

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(one, pairs))


def _dead(pair: tuple[str, str], why: str) -> Outcome:
    return Outcome(*pair, BROKEN, {why: BROKEN})


def pairs(patterns: Sequence[str] = ()) -> list[tuple[str, str]]:
    """List the mutations of families in which a pattern is found, and those families unchanged."""
    names = [(name, family) for name, m in MUTATIONS.items() for family in m.families]
    wanted = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    picked = [pair for pair in names if wanted.search(", ".join(pair))]
    families = {family for _, family in picked}
    return [p for p in names if p in picked or (p[0] == UNCHANGED and p[1] in families)]


def faults(outcomes: Sequence[Outcome]) -> list[str]:
    """List what is broken or wrong, and the mutations that do not do what they claim."""
    plain = {o.family: o.numbers for o in outcomes if o.mutation == UNCHANGED}
    found = []
    for o in outcomes:
        if o.verdict in FAULTS:
            found.append(f"{o.name}: {o.verdict}. {'; '.join(o.because())}")
        if o.numbers and plain.get(o.family):
            differ = max(abs(a - b) for a, b in zip(o.numbers, plain[o.family], strict=True))
            harmless = MUTATIONS[o.mutation].kind == HARMLESS
            if (differ > 0) if harmless else (differ < NOTICEABLE):
                found.append(f"{o.name}: the mutation itself changes numbers by {differ:.0e}")
    return found


def table(outcomes: Sequence[Outcome]) -> str:
    """Write the outcomes as Markdown, with the reasons for refusals below the table."""
    cells = {(o.mutation, o.family): o.verdict for o in outcomes}
    lines = [
        f"| what changes | numbers | {' | '.join(FAMILIES)} |",
        "|---|---|" + "---|" * len(FAMILIES),
    ]
    for name, mutation in MUTATIONS.items():
        row = [cells.get((name, family), NOWHERE) for family in FAMILIES]
        if set(row) != {NOWHERE}:
            kind = "the same" if mutation.kind == HARMLESS else "others"
            lines.append(f"| {name} | {kind} | {' | '.join(row)} |")
    refused: dict[str, list[str]] = {}
    for o in outcomes:
        if o.verdict == REFUSED:
            refused.setdefault("; ".join(o.because()), []).append(o.name)
    if refused:
        lines += ["", "Refused:", ""]
        lines += [f"- {'; '.join(names)}: {reason}" for reason, names in refused.items()]
    return "\n".join(lines)


def versions() -> str:
    """Return the date, and the versions of what was mutated."""
    return f"{date.today()}, transformers {version('transformers')}, torch {version('torch')}"


def main(arguments: Sequence[str]) -> int:
    """Print the table, write it if asked to, and return the exit status."""
    patterns = [argument for argument in arguments if not argument.startswith("--")]
    if patterns and "--write" in arguments:
        print("--write is about the whole table: leave out what picks lines.", file=sys.stderr)
        return 2
    outcomes = run(pairs(patterns))
    if "--json" in arguments:
        print(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes]))
    else:
        print(table(outcomes))
    if "--write" in arguments:
        markers.put("futures", f"{versions()}\n\n{table(outcomes)}", TABLE)
    found = faults(outcomes)
    for fault in found:
        print(fault, file=sys.stderr)
    return int(bool(found))
