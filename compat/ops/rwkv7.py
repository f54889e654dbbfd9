"""RWKV-7's wkv with carried state, in chunks of time: plain torch, and native on a CPU.

The recurrence of "RWKV-7 Goose with Expressive Dynamic State Evolution" (arXiv 2503.14456, the
evolution of the weighted key value state in its section on time mixing), per head and with the
state S of (head_dim, head_v_dim), which is the transpose of the paper's:

    S_t = diag(exp(w_t)) S_{t-1} + b_t (a_t . S_{t-1}) + k_t v_t        o_t = r_t . S_t

There a = -kappa, the normalised removal key, and b = kappa times the in-context learning rate.
Write G_t for w_1 + ... + w_t, and u_t for a_t . S_{t-1}, what is removed at token t. A chunk of L
tokens that begins with the state S has

    u_t = (a_t exp(G_{t-1})) . S + sum over s < t of (a_t exp(G_{t-1} - G_s) . b_s) u_s
                                                   + (a_t exp(G_{t-1} - G_s) . k_s) v_s
    o_t = (r_t exp(G_t)) . S     + sum over s <= t of the same, with r_t exp(G_t - G_s)
    S'  = exp(G_L) S             + sum over s of exp(G_L - G_s) (b_s u_s + k_s v_s)

The first is a unit triangular system of equations in the u_t (the WY form of a product of such
transitions, arXiv 2406.06484, section 3), solved for all chunks at once; the rest are matrix
products, of which only those with S wait for the chunk before. exp(G_t - G_s) is the product of
two factors, which are taken from the chunk's middle: for 16 tokens and RWKV-7's decay, at least
exp(-0.606531) a token (e^-0.5, times a sigmoid), they lie between e^-4.9 and e^4.9.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from compat.ops import rwkv7_native
from compat.ops.chosen import is_native
from compat.ops.mamba2 import _Rows, _rows_of

CHUNK = 16  # Tokens.
_PIECE = 8  # Chunks that are solved at once; the result does not depend on it.
_LARGEST = 5.0  # Of a log decay: exp(CHUNK / 2 * _LARGEST) squared is far from float32's limits.


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute RWKV-7's outputs from a state, and the state after the last token.

    It is differentiable, also in the states, and runs on any device.

    Args:
        r: (batch, seqlen, nheads, head_dim), the receptance.
        w: As r, the logarithm of the decay, of size 5 at most; in RWKV-7 it is from -0.606531 to 0.
        k: As r, the key that replaces.
        v: (batch, seqlen, nheads, head_v_dim), the value.
        a: As r, the removal key, negated.
        b: As r, the removal key times the in-context learning rate.
        initial_state: (batch, nheads, head_dim, head_v_dim), of the sequence of the row's first
            token; None for zeros.
        seq_idx: (batch, seqlen) integers. The tokens of a sequence stand together and have the same
            id >= 0; ids never decrease. Negative ids are padding, at a row's ends only.

    Returns:
        The outputs (batch, seqlen, nheads, head_v_dim) in v's dtype, 0 at padding; and the state
        (batch, nheads, head_dim, head_v_dim) after the last token of each row's last sequence; a
        row without a token hands its state on. Arithmetic and the state are in float32, or in
        float64 where an input is.

    Raises:
        ValueError: Shapes do not fit; or, in plain torch, a log decay is larger than 5 in size.
    """
    check_shapes(r, {"w": w, "k": k, "a": a, "b": b}, v, initial_state, seq_idx)
    dtype = common_dtype(r, w, k, v, a, b)
    state = new_state(k, v, dtype) if initial_state is None else initial_state.to(dtype)
    if not v.numel():
        return torch.zeros_like(v), state
    if is_native(r, w, k, v, a, b, state):
        inputs = {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}
        return rwkv7_native.wkv(inputs, None, state, seq_idx)
    out, last = _torch_wkv((r, w, k, a, b, v), dtype, state, seq_idx)
    return out.to(v.dtype), last


def check_shapes(
    r: Tensor,
    others: dict[str, Tensor],
    v: Tensor,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    """Raise a ValueError that names the argument whose shape does not fit r's, or v's."""
    if r.ndim != 4:
        raise ValueError(
            f"r must be (batch, seqlen, nheads, head_dim); found a shape of {tuple(r.shape)}."
        )
    batch, seqlen, nheads, head_dim = r.shape
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        name: (other, tuple(r.shape)) for name, other in others.items()
    }
    wanted |= {
        "v": (v, (batch, seqlen, nheads, v.shape[-1])),
        "initial_state": (initial_state, (batch, nheads, head_dim, v.shape[-1])),
        "seq_idx": (seq_idx, (batch, seqlen)),
    }
    for name, (found, shape) in wanted.items():
        if found is not None and found.shape != shape:
            raise ValueError(f"{name} must be {shape}; found {tuple(found.shape)}.")


def common_dtype(*inputs: Tensor) -> torch.dtype:
    """Return the dtype of arithmetic and state: float32, or float64 where an input is."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def new_state(k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros (batch, nheads, head_dim, head_v_dim)."""
    return k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=dtype)


class Chunks(NamedTuple):
    """The part of a piece that each token of a chunk sees, of its chunk and of the state before.

    A token sees those of its own sequence alone. All are None where there is one in a row.

    Attributes:
        same: (batch, 1, chunks, CHUNK, CHUNK), True where two tokens are of one sequence.
        begun: (batch, 1, chunks, CHUNK, 1), True where a token is of the sequence before the chunk.
        ending: The same, True where it is of the sequence that the chunk ends with.
        kept: (batch, chunks), True where these two sequences are one.
    """

    same: Tensor | None = None
    begun: Tensor | None = None
    ending: Tensor | None = None
    kept: Tensor | None = None

    @classmethod
    def of(cls, ids: Tensor, before: Tensor) -> Chunks:
        """Make it of ids (batch, chunks * CHUNK), and of the id before them (batch, 1)."""
        now = ids.unflatten(1, (-1, CHUNK))
        last = now[..., -1]
        owner = torch.cat([before, last[:, :-1]], 1)
        return cls(
            (now[..., None] == now[..., None, :])[:, None],
            (now == owner[..., None])[:, None, ..., None],
            (now == last[..., None])[:, None, ..., None],
            last == owner,
        )


def masked(values: Tensor, seen: Tensor | None) -> Tensor:
    """Return values, 0 where they are not seen."""
    return values if seen is None else values.masked_fill(~seen, 0.0)


def pieces(
    inputs: tuple[Tensor, ...], dtype: torch.dtype, seq_idx: Tensor | None, chunks: int
) -> list[tuple[list[Tensor], Chunks]]:
    """Cut inputs of (batch, seqlen, nheads, dim) into pieces of so many chunks.

    What a piece lacks to whole chunks is filled up with zeros, which change no state; and so is
    padding.

    Returns:
        For each piece the inputs as (batch, nheads, chunks, CHUNK, dim) in dtype, and what its
        tokens see.
    """
    seqlen = inputs[0].shape[1]
    rows: _Rows | None = None if seq_idx is None else _rows_of(seq_idx)
    if rows is not None:
        inputs = tuple(x.masked_fill(~rows.real[..., None, None], 0.0) for x in inputs)
    found = []
    # All are split at once: the backward of a slice would fill a tensor of the whole length.
    split = [x.split(chunks * CHUNK, 1) for x in inputs]
    for index, parts in enumerate(zip(*split, strict=True)):
        start, length = index * chunks * CHUNK, parts[0].shape[1]
        missing = -length % CHUNK
        piece = [
            pad(x.to(dtype), (0, 0, 0, 0, 0, missing)).transpose(1, 2).unflatten(2, (-1, CHUNK))
            for x in parts
        ]
        seen = Chunks()
        if rows is not None:
            columns = torch.arange(start, start + length + missing, device=inputs[0].device)
            ids = rows.ids[:, columns.clamp(max=seqlen - 1)]
            seen = Chunks.of(ids, rows.ids[:, max(start - 1, 0), None])
        found.append((piece, seen))
    return found


def fading(logarithms: Tensor, seen: Chunks) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Split a chunk's decay in two summands, (batch, nheads, dim, 1) for each chunk.

    For a decay near 1 they are 1 and the small rest: so it is as exact over thousands of tokens as
    its logarithm. logarithms is (batch, nheads, chunks, dim); what is not kept is faded to 0.
    """
    kept = None if seen.kept is None else seen.kept[:, None, :, None]
    slow = logarithms > -0.5
    fade = torch.where(slow, torch.expm1(logarithms), torch.exp(logarithms))
    parts = (masked(part, kept)[..., None].unbind(2) for part in (slow.to(fade.dtype), fade))
    return next(parts), next(parts)


def joined(outputs: list[Tensor], seqlen: int) -> Tensor:
    """Join pieces (batch, nheads, chunks, CHUNK, dim) to (batch, seqlen, nheads, dim)."""
    return torch.cat([y.flatten(2, 3).transpose(1, 2) for y in outputs], 1)[:, :seqlen]


def _torch_wkv(
    inputs: tuple[Tensor, ...], dtype: torch.dtype, state: Tensor, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    outputs = []
    for (r, w, k, a, b, v), seen in pieces(inputs, dtype, seq_idx, _PIECE):
        if not w.is_meta and (w.abs() > _LARGEST).any():
            raise ValueError(
                f"w must be the logarithm of a decay, of size {_LARGEST:g} at most; found "
                f"{float(w.abs().max()):.3g}. RWKV-7's is from -0.606531 to 0."
            )
        y, state = _piece(r, w, k, a, b, v, seen, state)
        outputs.append(y)
    return joined(outputs, inputs[0].shape[1]), state


def _piece(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    a: Tensor,
    b: Tensor,
    v: Tensor,
    seen: Chunks,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute some chunks; inputs are (batch, nheads, chunks, CHUNK, dim)."""
    sums = w.cumsum(-2)
    middle, end = sums[..., CHUNK // 2 - 1 : CHUNK // 2, :], sums[..., -1:, :]
    since = sums - middle
    readers = torch.cat([a * (since - w).exp(), r * since.exp()], -2)
    writers = torch.cat([b, k], -2) * (-since).exp().repeat(1, 1, 1, 2, 1)
    # (2 CHUNK, 2 CHUNK): what a and r read of b and k.
    earlier = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=w.device).tril(-1)
    earlier = torch.cat([earlier, earlier | torch.eye(CHUNK, dtype=torch.bool, device=w.device)])
    of_one = earlier if seen.same is None else earlier & seen.same.repeat(1, 1, 1, 2, 1)
    scores = masked(readers @ writers.transpose(-1, -2), torch.cat([of_one, of_one], -1))
    readers = masked(
        readers * middle.exp(), None if seen.begun is None else seen.begun.repeat(1, 1, 1, 2, 1)
    )
    writers = masked(
        writers * (end - middle).exp(),
        None if seen.ending is None else seen.ending.repeat(1, 1, 1, 2, 1),
    )

    of_a, of_r = scores.split(CHUNK, -2)
    right = torch.cat([readers[..., :CHUNK, :], of_a[..., CHUNK:] @ v], -1)
    solved = torch.linalg.solve_triangular(
        -of_a[..., :CHUNK], right, upper=False, unitriangular=True
    )
    from_state, own = solved.split([a.shape[-1], v.shape[-1]], -1)
    readers = torch.cat([from_state, readers[..., CHUNK:, :]], -2)
    outputs = []
    steps = zip(
        *(x.unbind(2) for x in (readers, own, v, of_r, writers.transpose(-1, -2))),
        *fading(end[..., 0, :], seen),
        strict=True,
    )
    for readers_, own_, v_, of_r_, writers_, keep, fade in steps:
        u, o = (readers_ @ state).split(CHUNK, -2)
        values = torch.cat([u + own_, v_], -2)
        outputs.append(o + of_r_ @ values)
        state = keep * state + fade * state + writers_ @ values
    return torch.stack(outputs, 2), state
