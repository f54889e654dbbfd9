"""xLSTM-large of the xlstm package: the laws, and the settings that cannot be continued."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tolerances import CHUNKED, NO_WORSE_FACTOR, NO_WORSE_SLACK

import compat
from compat.families.lookup import backbone_of
from tests.laws.test_model import alone, batches, error, in_chunks, tokens
from tests.laws.test_shared_prefix import rows_go_on

xlstm = pytest.importorskip(
    "xlstm.xlstm_large.model", reason='needs the xlstm package: pip install ".[xlstm]"'
)

# torch itself warns when its compiler is imported, which these kernels do on first use.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")

CONFIG = xlstm.xLSTMLargeConfig(
    embedding_dim=32,
    num_heads=4,
    num_blocks=2,
    vocab_size=64,
    mode="inference",
    return_last_states=True,
    chunkwise_kernel="chunkwise--native_autograd",
    sequence_kernel="native_sequence__native",
    step_kernel="native",
    chunk_size=8,
)
FEW = settings().max_examples // 3


@functools.cache
def tiny(dtype=torch.float32, **settings):
    """Draw weights in float32 and round them to dtype; none is zero or one by default."""
    model = xlstm.xLSTMLarge(dataclasses.replace(CONFIG, **settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(1)
    return model.to(dtype)


class Hidden(torch.nn.Module):
    """The input of an xLSTMLarge's head, in one pass over the whole text."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        seen = []
        hook = self.model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        self.model(input_ids)
        hook.remove()
        return dataclasses.make_dataclass("Output", ["last_hidden_state"])(*seen)


@pytest.mark.parametrize("weight_mode", ["single", "fused"])
@settings(max_examples=FEW)
@given(batch=batches(), size=st.integers(1, 35))
def test_chunks_give_each_row_what_it_gives_alone(weight_mode, batch, size):
    model = tiny(weight_mode=weight_mode)
    found = in_chunks(model, *batch, size)
    assert error(found, alone(Hidden(model), *batch)) <= CHUNKED[torch.float32]


def test_rows_go_on_from_the_state_behind_what_they_share(monkeypatch):
    rows = tokens(3 * 12).view(3, 12)
    rows[:, :9] = rows[0, :9]
    whole = Hidden(tiny())
    rows_go_on(monkeypatch, tiny(), rows, lambda row: whole(row).last_hidden_state)


@settings(max_examples=FEW)
@given(batch=batches(), size=st.integers(1, 35))
def test_last_hidden_state_is_that_of_the_last_token(batch, size):
    model = tiny()
    input_ids, mask = batch
    found = compat.last_hidden_state(
        model, input_ids=input_ids, attention_mask=mask, vertical_chunk_size=size
    )
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    wanted = alone(Hidden(model), input_ids, mask)[torch.arange(len(last)), last]
    assert error(found, wanted) <= CHUNKED[torch.float32]


@settings(max_examples=FEW)
@given(batch=batches(max_rows=2), size=st.integers(1, 35))
def test_a_model_in_bfloat16_is_no_worse_than_its_full_pass(batch, size):
    """Compare with float32, as the package cannot run its native kernels in bfloat16 at all."""
    model = tiny(torch.bfloat16)
    same_weights = xlstm.xLSTMLarge(CONFIG).eval()
    same_weights.load_state_dict(model.state_dict())
    exact = alone(Hidden(same_weights), *batch)
    full = error(in_chunks(model, *batch, 1000), exact)
    chunked = in_chunks(model, *batch, size)
    assert chunked.dtype == torch.bfloat16
    assert error(chunked, exact) <= NO_WORSE_FACTOR * full + NO_WORSE_SLACK[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_state_is_carried_in_float32_and_nothing_is_left_behind(dtype):
    model = tiny(dtype)
    backbone, family = backbone_of(model)
    with torch.no_grad():
        _, state = family.forward(backbone, tokens(20).view(2, 10), 0, None)
        _, state = family.forward(backbone, tokens(20).view(2, 10), 10, state)
    assert {part.dtype for parts in state.values() for part in parts} == {torch.float32}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "setting",
    [
        {"mode": "train"},
        {"mode": "train_with_padding", "return_last_states": False},
        {"chunkwise_kernel": "parallel--native_autograd", "return_last_states": False},
        {"inference_state_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_settings_that_do_not_continue_are_refused(setting):
    name = next(iter(setting))
    with pytest.raises(compat.UnsupportedModelError, match=name) as caught:
        backbone_of(tiny(**setting))
    assert f"dataclasses.replace(model.config, {name}=" in caught.value.remedy
