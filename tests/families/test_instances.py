"""Single models that differ from their class: each is exact in chunks, or refused."""

import copy
import functools
import threading

import pytest
import torch
from support.families import FAMILIES, tiny_model, tokens
from support.tolerances import CHUNKED
from torch import nn
from transformers import AutoModel

import compat
from compat.families import mamba1, tiny_models
from compat.families.lookup import FAMILIES as REGISTRY

HYBRIDS = [name for name in FAMILIES if REGISTRY[name].grows]
F32 = torch.float32


def chunked(model, ids, size=7, mask=None):
    chunks = compat.iter_chunks(model, input_ids=ids, attention_mask=mask, vertical_chunk_size=size)
    return torch.cat([hidden for _, hidden in chunks], 1)


@torch.no_grad()
def whole(model, ids):
    rows = [model(input_ids=row[None], use_cache=False).last_hidden_state for row in ids]
    return torch.cat(rows)


def is_exact(model, ids, wanted=None):
    wanted = whole(model, ids) if wanted is None else wanted
    return bool((chunked(model, ids) - wanted).abs().max() <= CHUNKED[F32])


# Modules with a forward of their own.


def on_disk(model_type, folder):
    """Put every other layer of a model on the disk; accelerate then wraps each module's forward."""
    tiny_model(model_type).save_pretrained(folder)
    plain = AutoModel.from_pretrained(folder)
    layers = next(name for name in ("layers", "blocks") if hasattr(plain, name))
    where = {name: "cpu" for name, _ in plain.named_children() if name != layers}
    count = len(getattr(plain, layers))
    where |= {f"{layers}.{n}": "disk" if n % 2 else "cpu" for n in range(count)}
    return plain, functools.partial(
        AutoModel.from_pretrained, folder, device_map=where, offload_folder=folder / "offload"
    )


OTHERS = ["bamba", "mamba2", "minimax", "recurrent_gemma", "rwkv", "xlstm"]


# zamba's layers share weights, which the release cannot load in this way.
@pytest.mark.parametrize("model_type", sorted({*mamba1.MIXERS, *OTHERS} - {"zamba"}))
@pytest.mark.parametrize("loaded", ["before", "while enabled"])
def test_a_model_that_is_offloaded_is_exact_whenever_it_was_loaded(tmp_path, model_type, loaded):
    plain, load = on_disk(model_type, tmp_path)
    ids = tokens(2, 30)
    wanted = whole(plain, ids)
    if loaded == "before":
        model = load()
        compat.enable_vertical_chunking()
    else:
        compat.enable_vertical_chunking()
        model = load()
    assert is_exact(model, ids, wanted)
    compat.disable_vertical_chunking()
    assert is_exact(model, ids, wanted)


@torch.no_grad()
def test_a_model_that_was_loaded_while_the_hooks_were_on_does_not_keep_them(tmp_path):
    """Continue from its own cache: that is the released behaviour, which begins from zeros."""
    plain, load = on_disk("mamba", tmp_path)
    with compat.vertical_chunking():
        model = load()
    ids = tokens(1, 16)

    def continued(model):
        output = model(ids[:, :9], use_cache=True)
        return model(ids[:, 9:], cache=output.cache, use_cache=True).last_hidden_state

    assert torch.equal(continued(model), continued(plain))


def calls_the_class(module):
    forward = type(module).forward
    module.forward = lambda *args, **kwargs: forward(module, *args, **kwargs)


def keeps_what_it_found(module):
    found = module.forward
    module.forward = lambda *args, **kwargs: found(*args, **kwargs)


def drops_the_state(module):
    found = module.forward
    module.forward = lambda *args, **kwargs: found(*args[:1] or [kwargs["hidden_states"]])


WRAPPERS = [calls_the_class, keeps_what_it_found, drops_the_state]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba", "mamba2", "rwkv"])
def test_a_mixer_behind_any_wrapper_is_exact_or_refused(model_type, wrap):
    model, ids = tiny_model(model_type), tokens(2, 30)
    wanted = whole(model, ids)
    *_, layer = model.blocks if model_type == "rwkv" else model.layers
    wrap(layer.attention if model_type == "rwkv" else layer.mixer)
    if wrap is drops_the_state:
        with pytest.raises(compat.VerticalChunkingError):
            chunked(model, ids)
    else:
        assert is_exact(model, ids, wanted)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "qwen3_next"])
def test_a_layer_that_stops_giving_its_state_in_the_middle_is_noticed(model_type):
    model, ids = tiny_model(model_type), tokens(2, 30)
    chunks = compat.iter_chunks(model, input_ids=ids, vertical_chunk_size=7)
    next(chunks)
    drops_the_state(getattr(model.layers[0], "mixer", None) or model.layers[0].linear_attn)
    with pytest.raises(compat.UnsupportedModelError, match="layer"):
        list(chunks)


# Classes that are not transformers' own.


def backwards(cls):
    class Backwards(cls):
        """A model that reads in both directions, with its parent's model type."""

        def forward(self, input_ids, **kwargs):
            output = super().forward(input_ids, **kwargs)
            back = super().forward(input_ids.flip(1)).last_hidden_state.flip(1)
            output.last_hidden_state = output.last_hidden_state + back
            return output

    return Backwards


def renamed(cls):
    class Renamed(cls):
        """A model that equals its parent."""

    return Renamed


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_subclass_is_asked_itself(model_type):
    model, ids = tiny_model(model_type), tokens(2, 21)
    released = type(model)
    model.__class__ = renamed(released)
    assert is_exact(model, ids)
    model.__class__ = backwards(released)
    with pytest.raises(compat.UnsupportedModelError, match=r"Backwards .* in chunks"):
        chunked(model, ids)
    assert "Backwards" in str(compat.status())


class Averaging(nn.Module):
    """A mixer that looks at the whole text."""

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states.mean(1, keepdim=True).expand_as(hidden_states)


def test_a_model_whose_mixer_somebody_replaced_is_asked_itself():
    model, ids = tiny_model("mamba2"), tokens(2, 21)
    assert is_exact(model, ids)
    model.layers[1].mixer = Averaging()
    with pytest.raises(compat.UnsupportedModelError, match="off by"):
        chunked(model, ids)


# Arithmetic that depends on the rows and tokens that run together.


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "bamba"])
def test_activations_that_are_scaled_over_what_runs_together_are_refused(model_type):
    model = torch.ao.quantization.quantize_dynamic(tiny_model(model_type), {nn.Linear})
    with pytest.raises(compat.UnsupportedModelError, match="scales its inputs"):
        chunked(model, tokens(2, 21))


class Int8Weights(nn.Module):
    """A linear layer with weights in eight bits, and inputs as they are."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.stored = (linear.weight / self.scale).round().to(torch.int8)
        self.bias = linear.bias

    @property
    def weight(self):
        return self.stored * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "bamba"])
def test_quantized_weights_are_exact(model_type):
    model, ids = tiny_model(model_type), tokens(2, 21)
    before = whole(model, ids)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name in ("in_proj", "out_proj"):
                setattr(module, name, Int8Weights(child))
    wanted = whole(model, ids)
    assert (wanted - before).abs().max() > CHUNKED[F32]
    assert is_exact(model, ids, wanted)


# Positions whose base depends on the length of a call.

ROPE = {
    "linear": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 16},
    "dynamic": {"factor": 2.0},
    "longrope": {"original_max_position_embeddings": 16},
}


def with_rope(model_type, kind, limit):
    """Make a tiny model with rotary embeddings of a type, trained for `limit` tokens; or None."""
    config = tiny_models.config(model_type)
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return None
    config.max_position_embeddings = limit
    setting = ROPE[kind] | {"rope_type": kind, "original_max_position_embeddings": limit}
    by_type = {name: value for name, value in rope.items() if isinstance(value, dict)}
    for each in by_type.values() or [rope]:
        if by_type:
            each.pop("partial_rotary_factor", None)  # It belongs to the replaced type.
        width = getattr(config, "qk_rope_head_dim", None) or getattr(config, "head_dim", None)
        width = width or config.hidden_size // config.num_attention_heads
        if not hasattr(config, "qk_rope_head_dim"):
            width = int(width * each.get("partial_rotary_factor", 1.0))
        each.update(setting)
        if kind == "longrope":
            each["short_factor"] = [1.0] * (width // 2)
            each["long_factor"] = [3.0] * (width // 2)
    try:
        return tiny_models.build(config)
    except Exception as error:
        pytest.skip(f"the release takes no {kind} there: {type(error).__name__}")


@pytest.mark.parametrize("kind", ROPE)
@pytest.mark.parametrize("model_type", HYBRIDS)
def test_rotary_embeddings_of_any_type_are_exact(model_type, kind):
    model = with_rope(model_type, kind, limit=16)
    if model is None:
        pytest.skip("it has no rotary embeddings")
    # A row must give what it gives alone, in a model that has met no other text.
    rows = [(tokens(1, n), n) for n in (34, 15, 17)]
    wanted = [whole(copy.deepcopy(model), ids) for ids, _ in rows]
    batch = torch.zeros(len(rows), 34, dtype=torch.int64)
    mask = torch.zeros_like(batch)
    for row, (ids, length) in enumerate(rows):
        batch[row, :length], mask[row, :length] = ids, 1
    found = chunked(model, batch, 9, mask)
    for row, (_, length) in enumerate(rows):
        assert (found[row, :length] - wanted[row]).abs().max() <= CHUNKED[F32]


def test_positions_that_follow_the_length_in_an_unknown_way_are_refused():
    model = with_rope("bamba", "dynamic", limit=16)
    for module in model.modules():
        if hasattr(module, "rope_type"):
            module.rope_type = "default"
    assert is_exact(model, tokens(2, 15))
    with pytest.raises(compat.UnsupportedModelError, match="'dynamic'"):
        chunked(model, tokens(2, 30))


# A generator of chunks, across modes and threads.


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "bamba", "rwkv", "xlstm", "minimax"])
@pytest.mark.parametrize("begun", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("continued", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_chunks_that_are_begun_in_one_mode_go_on_in_another(model_type, begun, continued):
    model, ids = tiny_model(model_type), tokens(2, 30)
    wanted = whole(model, ids)
    with begun():
        chunks = compat.iter_chunks(model, input_ids=ids, vertical_chunk_size=7)
        pieces = [next(chunks)[1]]
    with continued():
        pieces += [hidden for _, hidden in chunks]
        found = torch.cat(pieces, 1)
    assert not found.requires_grad
    assert (found - wanted).abs().max() <= CHUNKED[F32]
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "rwkv", "recurrent_gemma"])
def test_chunks_may_go_on_in_another_thread_or_be_dropped(model_type):
    model, ids = tiny_model(model_type), tokens(2, 30)
    wanted = whole(model, ids)
    dropped = compat.iter_chunks(model, input_ids=ids, vertical_chunk_size=7)
    next(dropped)
    dropped.close()
    chunks = compat.iter_chunks(model, input_ids=ids, vertical_chunk_size=7)
    pieces = [next(chunks)[1]]
    thread = threading.Thread(target=lambda: pieces.extend(hidden for _, hidden in chunks))
    thread.start()
    thread.join()
    assert (torch.cat(pieces, 1) - wanted).abs().max() <= CHUNKED[F32]
    assert torch.equal(whole(model, ids), wanted)
