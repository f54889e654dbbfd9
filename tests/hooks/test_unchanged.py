"""Things that enable must not change: generation, training, and the released objects."""

import functools
import importlib
import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.families import FAMILIES, tiny_model, tokens
from support.tolerances import CHUNKED
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

import compat
from compat.families import mamba2
from compat.installed.recurrent_cache import state_argument

MAMBA = {
    "mamba": "MambaMixer",
    "falcon_mamba": "FalconMambaMixer",
    "jamba": "JambaMambaMixer",
    "zamba": "ZambaMambaMixer",
}
# Of the gated delta rule: one with a gate of each head, and one with gates of channels.
RULES = {
    "qwen3_next": "torch_chunk_gated_delta_rule",
    "kimi_linear": "chunk_kimi_delta_attention",
}
# Every family that compat patches, sets hooks in, or has a cache of its own for; and one that it
# leaves alone.
TOUCHED = [*MAMBA, "xlstm", "rwkv", "recurrent_gemma", "minimax", "mamba2", *RULES]
# The families of which transformers has a language model.
WITH_HEAD = [name for name in FAMILIES if CONFIG_MAPPING[name] in MODEL_FOR_CAUSAL_LM_MAPPING]
# Released models of these mix up the rows of a batch, or let padding through.
ONE_ROW = {"rwkv", "xlstm", "recurrent_gemma"}


def modeling(model_type):
    return importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")


def contents(model_type):
    """Return every attribute of the model's module and of its classes."""
    module = modeling(model_type)
    classes = [value for value in vars(module).values() if inspect.isclass(value)]
    return {
        (owner.__name__, name): value
        for owner in [module, *classes]
        for name, value in vars(owner).items()
    }


def changed(before, after):
    """Return the names that are gone or name another object, and those of new functions."""
    # transformers itself keeps what it has looked up as new attributes, which are not functions.
    new = {name for name in after.keys() - before.keys() if callable(after[name])}
    return new | {name for name in before if before[name] is not after.get(name)}


@pytest.fixture
def released():
    """Fail the test if it leaves one released attribute that is another object."""
    before = {model_type: contents(model_type) for model_type in TOUCHED}

    def patched():
        return {
            name
            for model_type in TOUCHED
            for name in changed(before[model_type], contents(model_type))
        }

    yield patched
    compat.disable_vertical_chunking()
    assert patched() == set()


def causal_lm(model_type):
    body = tiny_model(model_type)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(body.config).eval()
    model.base_model.load_state_dict(body.state_dict())
    return model


def streamed(model, ids, size=7):
    chunks = compat.iter_chunks(model, input_ids=ids, vertical_chunk_size=size)
    return torch.cat([hidden for _, hidden in chunks], 1)


@pytest.mark.parametrize("model_type", WITH_HEAD)
def test_generated_tokens_are_identical(released, model_type):
    rows = 1 if model_type in ONE_ROW else 2
    ids = tokens(rows, 9)
    mask = torch.ones_like(ids)
    mask[1:, :4] = 0

    def generate():
        model = causal_lm(model_type)
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )

    without = generate()
    with compat.vertical_chunking():
        found = generate()
    assert without.sequences.shape == (rows, 9 + 12)
    assert torch.equal(found.sequences, without.sequences)
    for a, b in zip(found.logits, without.logits, strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_goes_on_from_a_users_own_state_is_identical(released, model_type):
    """Leave out Mamba-1, whose released scan begins from zeros: enable mends that."""
    model, ids = tiny_model(model_type), tokens(1, 16)
    name = state_argument(model.forward)

    def states():
        state, start = None, 0
        for size in (9, 5, 1, 1):
            output = model(ids[:, start : start + size], use_cache=True, **{name: state})
            yield output.last_hidden_state
            state, start = output.get(name), start + size
            if state is None:  # recurrent_gemma returns none.
                return

    without = list(states())
    with compat.vertical_chunking():
        found = list(states())
    if model_type in MAMBA:
        whole = model(ids, use_cache=False).last_hidden_state
        assert (torch.cat(found, 1) - whole).abs().max() <= CHUNKED[torch.float32]
        assert (torch.cat(without, 1) - whole).abs().max() > CHUNKED[torch.float32]
    else:
        assert all(torch.equal(a, b) for a, b in zip(found, without, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "use_cache"),
    [
        *((name, True) for name in [*MAMBA, *mamba2.MIXERS, "rwkv", "xlstm", "qwen3_next"]),
        *((name, False) for name in ["falcon_mamba", "mamba2", "rwkv", "xlstm"]),  # One of a hook.
    ],
)
def test_what_the_release_compiles_is_compiled_and_identical(model_type, use_cache):
    model, ids = tiny_model(model_type), tokens(2, 12)
    model(ids)  # rwkv prepares its weights in the first forward.

    def compiled():
        torch.compiler.reset()
        run = torch.compile(model, backend="eager", fullgraph=True)
        return run(ids, use_cache=use_cache).last_hidden_state

    try:
        without = compiled()
    except Exception as error:
        pytest.skip(f"the release is not compiled in one graph: {type(error).__name__}")
    with compat.vertical_chunking():
        assert torch.equal(compiled(), without)


@pytest.mark.parametrize("model_type", WITH_HEAD)
def test_training_gradients_are_identical_to_the_last_bit(released, model_type):
    ids = tokens(2, 20)

    def gradients():
        model = causal_lm(model_type).train()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    without = gradients()
    with compat.vertical_chunking():
        found = gradients()
    assert len(without) > 5
    assert found.keys() == without.keys()
    assert all(torch.equal(found[name], without[name]) for name in found)


@pytest.mark.parametrize("model_type", MAMBA)
def test_gradients_through_the_carried_state_are_those_of_one_pass(model_type):
    """Expect a gradient: the released scan drops the state and the gradient; enable mends both."""
    model, ids = tiny_model(model_type), tokens(2, 20)
    cache = state_argument(model.forward)
    weight = torch.randn(2, 20, model.config.hidden_size)

    def gradients(sizes):
        model.zero_grad()
        state, start, loss = None, 0, 0.0
        for size in sizes:
            end = start + size
            output = model(input_ids=ids[:, start:end], use_cache=True, **{cache: state})
            state = output[cache]
            loss, start = loss + (output.last_hidden_state * weight[:, start:end]).sum(), end
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    with compat.vertical_chunking():
        whole, found = gradients([20]), gradients([9, 11])
    for name, wanted in whole.items():
        bound = CHUNKED[torch.float32] * wanted.abs().max().clamp(min=1)
        assert (found[name] - wanted).abs().max() <= bound, name


def test_enable_patches_what_is_known_and_disable_puts_the_very_objects_back(released):
    compat.enable_vertical_chunking()
    scans = {
        (f"transformers.models.{name}.modeling_{name}", "mamba_selective_scan") for name in MAMBA
    }
    mixers = {(mixer, "forward") for mixer in [*MAMBA.values(), "Mamba2Mixer"]}
    rwkv = {
        ("transformers.models.rwkv.modeling_rwkv", "rwkv_linear_attention"),
        ("RwkvModel", "_rescale_layers"),
    }
    scans |= {("transformers.models.mamba2.modeling_mamba2", "mamba2_chunk_scan")}
    rules = {
        (f"transformers.models.{name}.modeling_{name}", function)
        for name, rule in RULES.items()
        for function in (rule, "causal_conv1d_fn")
    }
    assert released() == scans | mixers | rwkv | rules | {("xLSTMBackend", "forward")}
    compat.enable_vertical_chunking()
    compat.disable_vertical_chunking()
    assert released() == set()


@pytest.mark.parametrize("model_type", TOUCHED)
@pytest.mark.parametrize("ending", ["read to the end", "left half way", "the model raises"])
def test_a_stream_without_enable_leaves_nothing_behind(released, model_type, ending):
    model, ids = tiny_model(model_type), tokens(2, 28)
    streamed(model, ids)  # rwkv prepares its weights in the first forward.
    modules = {
        name: {key: value for key, value in vars(module).items() if key != "_buffers"}
        for name, module in model.named_modules()
    }
    hooks = {name: _hooks_of(module) for name, module in model.named_modules()}
    chunks = compat.iter_chunks(model, input_ids=ids, vertical_chunk_size=7)
    next(chunks)
    assert released() == set(), "between two chunks"
    if ending == "read to the end":
        assert len(list(chunks)) == 4 - 1
    elif ending == "the model raises":
        *_, last = (m for m in model.modules() if isinstance(m, torch.nn.Linear))
        handle = last.register_forward_pre_hook(_fail)
        with pytest.raises(ZeroDivisionError):
            next(chunks)
        handle.remove()
    assert released() == set()
    assert {name: _hooks_of(module) for name, module in model.named_modules()} == hooks
    for name, module in model.named_modules():
        for key, value in modules[name].items():
            assert vars(module)[key] is value, f"{name}.{key}"


def _fail(*_):
    raise ZeroDivisionError


def _hooks_of(module):
    return list(module._forward_pre_hooks), list(module._forward_hooks)


@pytest.mark.parametrize("model_type", ["mamba", "minimax", "recurrent_gemma", "xlstm"])
def test_streams_read_in_turn_do_not_mix(model_type):
    model = tiny_model(model_type)
    texts = [tokens(2, 33, seed=1), tokens(3, 40, seed=2)]
    alone = [streamed(model, ids) for ids in texts]
    streams = [compat.iter_chunks(model, input_ids=x, vertical_chunk_size=7) for x in texts]
    found = [[], []]
    for first, second in zip(*streams, strict=False):
        found[0].append(first[1])
        found[1].append(second[1])
    found[1] += [hidden for _, hidden in streams[1]]
    for pieces, wanted in zip(found, alone, strict=True):
        assert torch.equal(torch.cat(pieces, 1), wanted)


@torch.no_grad()
def test_recurrent_gemma_keeps_the_state_that_its_modules_had():
    model = tiny_model("recurrent_gemma")
    ids = tokens(2, 12)

    def states():
        blocks = [m for m in model.modules() if hasattr(m, "rg_lru")]
        return [x for b in blocks for x in (b.conv1d_state, b.rg_lru.recurrent_states)]

    model(input_ids=ids, use_cache=True)
    before = states()
    values = [state.clone() for state in before]
    streamed(model, tokens(3, 30))
    assert len(before) == 4
    for after, state, value in zip(states(), before, values, strict=True):
        assert after is state
        assert torch.equal(after, value)


@pytest.mark.parametrize("model_type", ["mamba", "minimax", "recurrent_gemma", "xlstm"])
def test_two_threads_on_one_model(released, model_type):
    model = tiny_model(model_type)
    texts = [tokens(2, 40 + 3 * seed, seed) for seed in range(8)]
    alone = [streamed(model, ids) for ids in texts]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(functools.partial(streamed, model), texts))
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
