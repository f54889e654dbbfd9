"""Wrappers of PEFT and torch.compile are seen through where that is exact; else a remedy is named.

Stand-ins behave as PEFT's classes do; where PEFT is installed, it is tested as well.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.embedders import embedder, record_widths, save_checkpoint, text
from support.families import tiny_model, tokens
from support.tolerances import CHUNKED
from torch import nn

import compat

FAMILIES = ["mamba", "mamba2", "rwkv", "zamba2"]
METHODS = ["encode", "encode_query", "encode_document"]
ADAPTED = ("in_proj", "key")  # Every family here has a layer of one of these names.
TEXTS = [text(n) for n in (30, 17)]


@pytest.fixture(autouse=True)
def _nothing_is_compiled():
    """Run compiled models as they are, because tracing all of them would take minutes."""
    with torch.compiler.set_stance("force_eager"):
        yield


class AdaptedLinear(nn.Module):
    """A linear layer with a low-rank addition and dropout."""

    def __init__(self, layer):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base_layer = layer
        self.down = nn.Parameter(torch.randn(4, layer.in_features, generator=generator) / 4)
        self.up = nn.Parameter(torch.randn(layer.out_features, 4, generator=generator) / 4)
        self.dropout = nn.Dropout(0.5)
        self.train(layer.training)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.dropout(x) @ self.down.T @ self.up.T


class Tuner(nn.Module):
    """A tuner that puts the adapter's layers in, as PEFT's LoraModel does."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        for parent in list(model.modules()):
            for name, layer in list(parent.named_children()):
                if name in ADAPTED and isinstance(layer, nn.Linear):
                    setattr(parent, name, AdaptedLinear(layer))

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class DoublingTuner(Tuner):
    """A tuner that changes the output of the model."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output["last_hidden_state"] = 2 * output["last_hidden_state"]
        return output


class Adapted(nn.Module):
    """The wrapper itself, like PEFT's PeftModel."""

    def __init__(self, model, tuner=Tuner, **config):
        super().__init__()
        known = {"peft_type": SimpleNamespace(value="LORA"), "is_prompt_learning": False}
        self.peft_config = {"default": SimpleNamespace(**(known | config))}
        self.base_model = tuner(model)

    def get_base_model(self):
        return self.base_model.model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model").model, name)

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


class Around(nn.Module):
    """Another wrapper, such as DistributedDataParallel."""

    def __init__(self, model):
        super().__init__()
        self.module = model
        self.config = model.config

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def compiled(model):
    """Compile a model; the eager backend traces, and generates no code."""
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "adapted": Adapted,
    "compiled": compiled,
    "adapted and compiled": lambda model: compiled(Adapted(model)),
    "compiled and adapted": lambda model: Adapted(compiled(model)),
}


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=CHUNKED[torch.float32])


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_chunks_of_a_wrapped_model_are_exact(model_type, wrapper):
    model = tiny_model(model_type)
    ids = tokens(2, 30)
    with torch.no_grad():
        plain = model(ids).last_hidden_state
        wrapped = WRAPPERS[wrapper](model)
        full = wrapped(input_ids=ids).last_hidden_state
    assert ("adapted" in wrapper) == (not torch.allclose(plain, full, atol=1e-2))
    arguments = {"input_ids": ids, "vertical_chunk_size": 8}
    chunked = torch.cat([h for _, h in compat.iter_chunks(wrapped, **arguments)], 1)
    last = compat.last_hidden_state(wrapped, **arguments)
    torch.testing.assert_close(chunked, full, rtol=0, atol=CHUNKED[torch.float32])
    torch.testing.assert_close(last, full[:, -1], rtol=0, atol=CHUNKED[torch.float32])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_encode_reads_a_wrapped_model_in_chunks(model, wrapper, method):
    model[0].model = WRAPPERS[wrapper](model[0].model)
    full = getattr(model, method)(TEXTS)
    compat.enable_vertical_chunking()
    assert_close(getattr(model, method)(TEXTS, vertical_chunk_size=8), full)
    widths = record_widths(model)  # This includes the first check of the wrapper.
    assert_close(getattr(model, method)(TEXTS, vertical_chunk_size=8), full)
    assert widths == [8, 8, 8, 6]


def test_chunks_of_a_model_that_was_compiled_indeed_are_exact():
    wrapped, ids = compiled(tiny_model("mamba2")), tokens(2, 30)
    with torch.compiler.set_stance("default"), torch.no_grad():
        full = wrapped(input_ids=ids).last_hidden_state
    last = compat.last_hidden_state(wrapped, input_ids=ids, vertical_chunk_size=8)
    torch.testing.assert_close(last, full[:, -1], rtol=0, atol=CHUNKED[torch.float32])


@pytest.mark.parametrize("begin", ["encode", "pool"])
def test_a_model_that_comes_from_its_training_is_read_without_dropout(model, begin):
    """Expect `encode`, and the checks of the model before it, to switch dropout off."""
    model[0].model = Adapted(model[0].model)
    full = model.encode(TEXTS)
    compat.enable_vertical_chunking()
    model.train()
    arguments = {"device": ["cpu"]} if begin == "pool" else {}
    assert_close(model.encode(TEXTS, vertical_chunk_size=8, **arguments), full)


def test_what_a_wrapper_was_asked_leaves_no_trace():
    wrapped = Adapted(tiny_model("mamba2")).train()
    wrapped.base_model.model.layers[0].eval()
    before = {name: module.training for name, module in wrapped.named_modules()}
    state = torch.get_rng_state()
    compat.iter_chunks(wrapped, input_ids=tokens(1, 9), vertical_chunk_size=4)
    assert {name: module.training for name, module in wrapped.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)


def with_a_hook(model):
    model.register_forward_hook(lambda *_: None)
    return model


def with_a_forward(model):
    released = model.forward
    model.forward = lambda *args, **kwargs: released(*args, **kwargs)
    return model


REFUSED = {
    "tokens before the text": (
        lambda model: Adapted(model, is_prompt_learning=True),
        "puts tokens of its own before the text",
        "encode without vertical_chunk_size",
    ),
    "tokens that wake it": (
        lambda model: Adapted(model, alora_invocation_tokens=[5]),
        "behind certain tokens of the whole text",
        "encode without vertical_chunk_size",
    ),
    "a tuner with an output of its own": (
        lambda model: Adapted(model, DoublingTuner),
        "Adapted of PEFT, which differs by",
        "add_adapter",
    ),
    "a hook on an adapter": (
        lambda model: with_a_hook(Adapted(model)),
        "Adapted with hooks of its own",
        "add_adapter",
    ),
    "a forward of an adapter": (
        lambda model: with_a_forward(Adapted(model)),
        "Adapted with a forward of its own",
        "add_adapter",
    ),
    "a hook on a compiled model": (
        lambda model: with_a_hook(compiled(model)),
        "OptimizedModule with hooks of its own",
        "model.compile()",
    ),
    "another wrapper": (
        Around,
        "a Around around a Mamba2Model",
        "put the model in its place, which is its .module",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrapper_that_cannot_be_seen_through_is_refused_with_what_helps(model, name):
    wrap, found, remedy = REFUSED[name]
    model[0].model = wrapped = wrap(model[0].model)
    compat.enable_vertical_chunking()
    calls = [
        lambda: compat.iter_chunks(wrapped, input_ids=tokens(1, 9), vertical_chunk_size=4),
        lambda: compat.last_hidden_state(wrapped, input_ids=tokens(1, 9), vertical_chunk_size=4),
        *(lambda m=m: getattr(model, m)(TEXTS, vertical_chunk_size=8) for m in METHODS),
    ]
    for call in calls:
        with pytest.raises(compat.UnsupportedModelError) as caught:
            call()
        assert found in caught.value.found
        assert remedy in caught.value.remedy


def test_the_remedy_for_another_wrapper_is_one(model):
    model[0].model = Around(model[0].model)
    full = model.encode(TEXTS)
    compat.enable_vertical_chunking()
    model[0].model = model[0].model.module
    assert_close(model.encode(TEXTS, vertical_chunk_size=8), full)


def test_inputs_that_cannot_be_cut_are_seen_behind_a_wrapper(model):
    preprocess = type(model[0]).preprocess

    def with_embeddings(*args, **kwargs):
        features = preprocess(model[0], *args, **kwargs)
        return {**features, "inputs_embeds": torch.zeros(*features["input_ids"].shape, 32)}

    model[0].model = Adapted(model[0].model)
    model[0].preprocess = with_embeddings
    compat.enable_vertical_chunking()
    with pytest.raises(compat.UnsupportedPipelineError, match="inputs_embeds"):
        model.encode(TEXTS, vertical_chunk_size=8)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT warns about transformers.
@pytest.mark.parametrize("task_type", [None, "FEATURE_EXTRACTION"])
def test_peft_itself(tmp_path, task_type):
    peft = pytest.importorskip("peft")
    model = embedder(save_checkpoint(tmp_path))
    plain = model.encode(TEXTS)
    config = peft.LoraConfig(
        target_modules=["in_proj"], init_lora_weights=False, lora_dropout=0.5, task_type=task_type
    )
    model[0].model = peft.get_peft_model(model[0].model, config)
    full = model.encode(TEXTS)
    assert np.abs(full - plain).max() > 1e-2
    model.train()
    compat.enable_vertical_chunking()
    assert_close(model.encode(TEXTS, vertical_chunk_size=8), full)
    prompts = peft.PromptTuningConfig(
        num_virtual_tokens=3, token_dim=32, num_layers=2, num_attention_heads=2
    )
    model = embedder(str(tmp_path))
    model[0].model = peft.PeftModel(model[0].model, prompts)
    with pytest.raises(compat.UnsupportedModelError, match="tokens of its own"):
        model.encode(TEXTS, vertical_chunk_size=8)
