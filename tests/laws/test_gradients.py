"""Law 5: a loss on embeddings in chunks has the gradients of one pass."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.modules import Pooling
from support import oracle
from support.families import FAMILIES, tiny_model, tokens
from support.tolerances import GRADIENTS, GRADIENTS_ROUNDED
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import compat
from compat.errors import UnsupportedModelError, UnsupportedPipelineError
from compat.families import carried, gradients
from compat.families.carried import CARRIERS
from compat.families.gradients import require_gradients, run
from compat.families.lookup import FAMILIES as REGISTRY
from compat.families.lookup import backbone_of
from compat.stream import training_size
from compat.stream.pooling import POOLING_MODES
from compat.stream.rows import windows

cached_model = functools.cache(tiny_model)
DOUBLE = torch.float64


@functools.cache
def double_model(model_type):
    """Return the tiny model in float64, of which as little as possible is rounded to float32."""
    options = {"rwkv": {}, "xlstm": {}}.get(model_type, {"residual_in_fp32": False})
    return tiny_model(model_type, DOUBLE, **options)


# The gradients of these parameters go through float32 in released code, whatever the dtype.
ROUNDED = {
    "falcon_mamba": ("",),  # All of them: so do the norms of B, C and the time step.
    "mamba": ("A_log", "D", "dt_proj.bias"),
    "mamba2": (),
    "rwkv": (),
    "xlstm": ("",),  # The whole scan.
}


@st.composite
def batches(draw, max_length=24):
    """Draw rows of tokens with padding on either side: (input_ids, attention_mask)."""
    lengths = draw(st.lists(st.integers(1, max_length), min_size=1, max_size=3))
    left = [draw(st.integers(0, 9)) for _ in lengths]
    width = max(a + n for a, n in zip(left, lengths, strict=True)) + draw(st.integers(0, 9))
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, (begin, length) in enumerate(zip(left, lengths, strict=True)):
        mask[row, begin : begin + length] = 1
    return tokens(len(lengths), width, seed=draw(st.integers(0, 5))), mask


def in_one_pass(model, input_ids, mask, modes):
    """Embed each row by itself, without its padding, in one pass under plain autograd."""
    backbone, family = backbone_of(model)
    rows = []
    for ids, real in zip(input_ids, mask.bool(), strict=True):
        hidden, _ = run(backbone, family, F.pad(ids[real], (0, 1))[None], 0, None)
        rows.append(pool(hidden[:, :-1], modes))  # A single token would take another path.
    return torch.cat(rows)


def pool(hidden, modes):
    features = {
        "token_embeddings": hidden,
        "attention_mask": hidden.new_ones(hidden.shape[:2], dtype=torch.int64),
    }
    return Pooling(hidden.shape[-1], modes)(features)["sentence_embedding"]


def gradients_of(embeddings, model):
    """Return the gradient of each parameter, by name, of a loss that tells all numbers apart."""
    weights = torch.linspace(-1, 2, embeddings.numel(), dtype=embeddings.dtype)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = (embeddings.flatten() * weights).sum() + (embeddings**2).sum()
    return dict(zip(named, torch.autograd.grad(loss, [*named.values()]), strict=True))


def off(found, wanted):
    """Return each gradient's error, as a share of its largest number, or of a thousandth of all."""
    floor = 1e-3 * max(float(w.abs().max()) for w in wanted.values())
    return {
        name: float((found[name].double() - w.double()).abs().max())
        / max(float(w.abs().max()), floor)
        for name, w in wanted.items()
    }


@pytest.mark.parametrize("model_type", sorted(CARRIERS))
@settings(max_examples=8)
@given(
    batch=batches(),
    size=st.integers(1, 25),
    modes=st.lists(st.sampled_from(POOLING_MODES), min_size=1, max_size=3, unique=True),
)
def test_gradients_in_chunks_are_those_of_one_pass(model_type, batch, size, modes):
    model = double_model(model_type)
    found = compat.pooled(
        model,
        input_ids=batch[0],
        attention_mask=batch[1],
        pooling_mode=modes,
        vertical_chunk_size=size,
    )
    wanted = in_one_pass(model, *batch, tuple(modes))
    assert found.dtype == wanted.dtype
    errors = off(gradients_of(found, model), gradients_of(wanted, model))
    for name, error in errors.items():
        rounded = ROUNDED[model_type] and name.endswith(ROUNDED[model_type])
        assert error <= (GRADIENTS_ROUNDED if rounded else GRADIENTS[DOUBLE]), name


@pytest.mark.parametrize("model_type", sorted(CARRIERS))
def test_gradients_are_those_of_the_released_model(model_type):
    model = cached_model(model_type)
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.int64)
    found = compat.pooled(model, input_ids=ids, attention_mask=mask, vertical_chunk_size=7)
    wanted = pool(model(ids, use_cache=False).last_hidden_state, "mean")
    errors = off(gradients_of(found, model), gradients_of(wanted, model))
    assert max(errors.values()) <= GRADIENTS[torch.float32]


@settings(max_examples=5)
@given(length=st.integers(2, 12), size=st.integers(1, 8))
def test_gradients_of_mamba2_are_those_of_the_float64_recurrence(length, size):
    model = double_model("mamba2")
    ids = tokens(1, length)
    found = compat.pooled(model, input_ids=ids, vertical_chunk_size=size)
    hidden, _ = oracle.mamba2.__wrapped__(model, ids[0].tolist(), copied=False)
    errors = off(gradients_of(found, model), gradients_of(pool(hidden[None], "mean"), model))
    assert max(errors.values()) <= GRADIENTS_ROUNDED  # The released norms round to float32.


def checkpointed(model, ids, truncate=False):
    """Embed by lasttoken in chunks of 9, each of them in a non-reentrant checkpoint of torch."""
    backbone, family = backbone_of(model)

    def run_chunk(start, end, *state):
        return _flat(run(backbone, family, ids[:, start:end], start, state or None))

    state, pieces = [], []
    for start, end in windows(ids.shape[1], 9):
        if truncate:
            state = [part.detach() for part in state]
        hidden, *state = checkpoint(run_chunk, start, end, *state, use_reentrant=False)
        pieces.append(hidden)
    return pool(torch.cat(pieces, 1), "lasttoken")


@pytest.mark.parametrize("model_type", sorted(CARRIERS))
def test_checkpoints_of_torch_agree_and_truncation_does_not(model_type):
    model, ids = double_model(model_type), tokens(2, 40)
    found = gradients_of(embedded(model, ids, 9, pooling_mode="lasttoken"), model)
    errors = off(found, gradients_of(checkpointed(model, ids), model))
    assert max(errors.values()) <= (GRADIENTS_ROUNDED if ROUNDED[model_type] else GRADIENTS[DOUBLE])
    errors = off(found, gradients_of(checkpointed(model, ids, truncate=True), model))
    assert max(errors.values()) > 0.1


def _flat(result):
    return result[0], *result[1]


def embedded(model, ids, size=7, **kwargs):
    return compat.pooled(model, input_ids=ids, vertical_chunk_size=size, **kwargs)


def test_dropout_draws_the_same_masks_in_both_runs():
    model = tiny_model("mamba2", DOUBLE, residual_in_fp32=False).train()
    for layer in model.layers:
        layer.register_forward_hook(lambda _, __, out: F.dropout(out, 0.3))
    ids = tokens(1, 40)

    def seeded(embed, seed):
        torch.manual_seed(seed)
        embeddings = embed()
        torch.manual_seed(5)  # Whatever is drawn between forward and backward.
        return gradients_of(embeddings, model)

    found = seeded(lambda: embedded(model, ids, 9, pooling_mode="lasttoken"), 3)
    wanted = seeded(lambda: checkpointed(model, ids), 3)
    assert max(off(found, wanted).values()) <= GRADIENTS[DOUBLE]
    other = seeded(lambda: checkpointed(model, ids), 4)
    assert max(off(found, other).values()) > 0.1


@pytest.fixture
def few_borders(monkeypatch):
    """Let borders be made again where there are more than four."""
    monkeypatch.setattr(training_size, "BORDERS", 4)


@pytest.mark.parametrize("model_type", sorted(CARRIERS))
def test_borders_that_are_made_again(few_borders, model_type):
    model, ids = double_model(model_type), tokens(2, 40)
    embeddings = embedded(model, ids, 3, pooling_mode="lasttoken")
    # Of 26 chunks: each sixth.
    assert [len(b.steps) for b in embeddings.grad_fn.reading.borders] == [6, 6, 6, 6, 2]
    found = gradients_of(embeddings, model)
    errors = off(found, gradients_of(checkpointed(model, ids), model))
    assert max(errors.values()) <= (GRADIENTS_ROUNDED if ROUNDED[model_type] else GRADIENTS[DOUBLE])


def test_borders_that_are_made_again_with_the_same_dropout(few_borders):
    model = tiny_model("mamba2", residual_in_fp32=False).train()
    for layer in model.layers:
        layer.register_forward_hook(lambda _, __, out: F.dropout(out, 0.3))
    ids = tokens(1, 40)

    def seeded():
        torch.manual_seed(3)
        return gradients_of(embedded(model, ids, 3), model)

    again = seeded()
    training_size.BORDERS = 100
    wanted = seeded()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_a_run_has_no_more_tokens_than_a_chunk():
    model, runs = tiny_model("mamba2"), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: runs.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    mask = (torch.arange(40) < torch.tensor([[40], [5], [4], [5], [30], [5]])).long()
    with torch.no_grad():
        embedded(model, tokens(6, 40), 16, attention_mask=mask)
    assert max(rows * width for rows, width in runs) == 16
    assert (3, 5) in runs


@pytest.mark.parametrize("model_type", sorted(CARRIERS))
def test_what_a_token_and_a_state_cost(model_type):
    backbone, family = backbone_of(tiny_model(model_type))
    token, state = training_size.costs(backbone, family)
    ids = tokens(1, 20)
    _, tensors = run(backbone, family, ids, 0, None)
    assert state == sum(part.numel() * part.element_size() for part in tensors)
    small, large = (training_size._saved(backbone, family, n)[0] for n in (512, 1024))
    assert token == pytest.approx((large - small) / 512, rel=0.05)


@pytest.mark.parametrize(
    ("token", "state", "lengths", "size"),
    [
        (100, 100, [10_000], 256),
        (100, 10**6, [10_000], 16_384),  # A single chunk, whose border holds nothing yet.
        (10_000, 10**6, [100_000], 1024),
        (10_000, 10**6, [100_000] * 30, 4096),
    ],
)
def test_the_leanest_size(monkeypatch, token, state, lengths, size):
    monkeypatch.setattr(training_size, "costs", lambda *model: (token, state))
    assert training_size.leanest(None, None, torch.tensor(lengths)) == size


def test_the_size_that_is_chosen():
    model, ids = tiny_model("mamba2").train(), tokens(2, 600)
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    found = embedded(model, ids, "auto")
    assert torch.equal(torch.rand(3), wanted)
    errors = off(gradients_of(found, model), gradients_of(embedded(model, ids, 600), model))
    assert max(errors.values()) <= GRADIENTS[torch.float32]


def test_a_backward_leaves_the_random_numbers_alone():
    model = tiny_model("mamba2").train()
    loss = embedded(model, tokens(1, 20)).sum()
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    loss.backward()
    assert torch.equal(torch.rand(3), wanted)


def test_frozen_parameters_get_no_gradient_and_change_no_other():
    ids = tokens(2, 30)
    wanted = gradients_of(embedded(double_model("mamba2"), ids), double_model("mamba2"))
    model = tiny_model("mamba2", DOUBLE, residual_in_fp32=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0" in name)
    found = gradients_of(embedded(model, ids), model)
    assert found
    errors = off(found, {name: wanted[name] for name in found})
    assert max(errors.values()) <= GRADIENTS[DOUBLE]
    model.requires_grad_(False)
    assert not embedded(model, ids).requires_grad


class LowRank(torch.nn.Module):
    """A projection with an adapter of rank 2, of a class that no tiny model stands for."""

    def __init__(self, released):
        super().__init__()
        self.released = released
        self.down = torch.nn.Linear(released.in_features, 2, bias=False, dtype=DOUBLE)
        self.up = torch.nn.Linear(2, released.out_features, bias=False, dtype=DOUBLE)

    def forward(self, hidden):
        return self.released(hidden) + self.up(self.down(hidden))


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_adapters_of_a_frozen_model(model_type):
    options = {"residual_in_fp32": False}
    model = tiny_model(model_type, DOUBLE, **options).requires_grad_(False)
    for layer in model.layers:
        layer.mixer.in_proj = LowRank(layer.mixer.in_proj)
    ids = tokens(2, 30)
    found = gradients_of(embedded(model, ids, pooling_mode="lasttoken"), model)
    wanted = gradients_of(in_one_pass(model, ids, torch.ones_like(ids), "lasttoken"), model)
    assert len(found) == 2 * len(model.layers)
    assert max(off(found, wanted).values()) <= GRADIENTS[DOUBLE]


@pytest.mark.parametrize("model_type", sorted(CARRIERS))
def test_autocast_in_bfloat16(model_type):
    model = cached_model(model_type)
    ids = tokens(2, 30)
    exact = gradients_of(embedded(model, ids), model)
    with torch.autocast("cpu", torch.bfloat16):
        found = embedded(model, ids)
        whole = pool(model(ids, use_cache=False).last_hidden_state, "mean")
    errors = off(gradients_of(found.float(), model), exact)
    full = off(gradients_of(whole.float(), model), exact)
    # No worse than one pass, over all parameters: each for itself has errors of its own.
    assert sum(errors.values()) <= 2 * sum(full.values())


def test_each_hook_of_a_parameter_is_called_once():
    model = tiny_model("mamba2")
    calls = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
    embedded(model, tokens(2, 30)).sum().backward()
    assert sorted(calls) == sorted(name for name, _ in model.named_parameters())


def test_gradients_add_up_in_bfloat16_too():
    """Add many chunks' gradients: in 16 bits, small ones would be lost beside their sum."""
    model = tiny_model("mamba2", torch.bfloat16)
    ids = tokens(1, 400)
    exact = gradients_of(embedded(cached_model("mamba2"), ids, 100), cached_model("mamba2"))
    many, few = (off(gradients_of(embedded(model, ids, size), model), exact) for size in (4, 400))
    assert sum(many.values()) <= 1.5 * sum(few.values())


@pytest.mark.parametrize("model_type", sorted(CARRIERS))
def test_borders_keep_states_alone(model_type):
    """Look for views of a chunk, which would keep all of it."""
    reading = embedded(cached_model(model_type), tokens(2, 60), 20).grad_fn.reading
    kept = [part for border in reading.borders for part in border.state]
    assert kept
    for part in kept:
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()


def test_without_gradients_nothing_is_kept_and_the_embedding_is_the_same():
    model, ids = cached_model("mamba2"), tokens(2, 30)
    with torch.no_grad():
        found = embedded(model, ids)
    assert not found.requires_grad
    assert torch.equal(found, embedded(model, ids).detach())


# What is refused, each with its reason.


def test_a_second_backward():
    loss = embedded(cached_model("mamba2"), tokens(1, 20)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(UnsupportedPipelineError, match="second backward"):
        loss.backward()


def test_a_gradient_of_the_gradient():
    model = cached_model("mamba2")
    loss = embedded(model, tokens(1, 20)).sum()
    with pytest.raises(UnsupportedPipelineError, match="create_graph"):
        torch.autograd.grad(loss, [*model.parameters()], create_graph=True)


@pytest.mark.parametrize("change", ["step", "eval"])
def test_a_model_that_changes_before_the_backward(change):
    model = tiny_model("mamba2").train()
    loss = embedded(model, tokens(1, 20)).sum()
    if change == "eval":
        model.eval()
    else:
        with torch.no_grad():
            model.norm_f.weight.mul_(2)
    with pytest.raises(UnsupportedPipelineError, match="changed between forward and backward"):
        loss.backward()


def test_gradient_checkpointing():
    model = tiny_model("mamba2").train()
    model.activation_checkpointing_enable()
    with pytest.raises(UnsupportedModelError, match="activation_checkpointing_disable"):
        embedded(model, tokens(1, 20))


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - set(CARRIERS)))
def test_other_families(model_type):
    """Refuse those of the gated delta rule, too: all of them have attention layers."""
    family = REGISTRY[model_type]
    reason = "attention layers, which keep|attention layers keep" if family.grows else "not known"
    with pytest.raises(UnsupportedModelError, match=reason):
        require_gradients(tiny_model(model_type), family)


def test_a_replica_of_data_parallel():
    model = tiny_model("mamba2")
    model._is_replica = True
    with pytest.raises(UnsupportedModelError, match="one process for each device"):
        embedded(model, tokens(1, 20))


@pytest.fixture
def one_rank():
    """Let this process be the only one of a group."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning")  # It does not shard among one.
@pytest.mark.parametrize("original", [False, True])
def test_the_former_fsdp(one_rank, original):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = tiny_model("mamba2")
    for place, layer in enumerate(model.layers):
        model.layers[place] = FullyShardedDataParallel(
            layer, device_id=torch.device("cpu"), use_orig_params=original
        )
    with pytest.raises(UnsupportedModelError, match="FSDP"):
        require_gradients(model, REGISTRY["mamba2"])


def test_fsdp(one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny_model("mamba2")
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(UnsupportedModelError, match="FSDP"):
        require_gradients(model, REGISTRY["mamba2"])


def test_zero_3():
    model = tiny_model("mamba2")
    model.norm_f.weight.ds_id = 0
    with pytest.raises(UnsupportedModelError, match="ZeRO-3"):
        embedded(model, tokens(1, 20))


@pytest.mark.parametrize(
    ("model_type", "remedy"), [("mamba2", "Remedy: run"), ("mamba", "selective-scan-states")]
)
def test_layers_that_ignore_the_gradient_of_their_last_state(model_type, remedy, monkeypatch):
    """Stand in for a kernel that gives out a state and takes no gradient for it."""

    class Truncated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, state):
            return state.clone()

        @staticmethod
        def backward(ctx, gradient):
            return torch.zeros_like(gradient)

    layer = carried._layer_classes()[1]
    released = layer.assign

    def assign(self, state_idx, conv=None, recurrent=None):
        recurrent = None if recurrent is None else Truncated.apply(recurrent)
        released(self, state_idx, conv, recurrent)

    monkeypatch.setattr(layer, "assign", assign)
    monkeypatch.setattr(gradients.verdicts, "classes", {})
    with pytest.raises(UnsupportedModelError, match=f"gradient of its state.*{remedy}"):
        embedded(cached_model(model_type), tokens(1, 20))


def test_a_row_without_a_token():
    mask = torch.tensor([[1, 1], [0, 0]])
    with pytest.raises(ValueError, match="Row 1"):
        embedded(cached_model("mamba2"), tokens(2, 2), attention_mask=mask)
