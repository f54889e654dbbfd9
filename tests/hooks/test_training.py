"""A model in training mode with a training_chunk_size: losses have the gradients of one pass."""

import subprocess
import sys

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling
from support.embedders import embedder, record_widths, save_checkpoint, text
from support.stack import FORKS
from support.tolerances import GRADIENTS

import compat
from compat.errors import UnsupportedModelError, UnsupportedPipelineError
from compat.stream.pooling import POOLING_MODES

pytestmark = pytest.mark.skipif(FORKS, reason="the forks have no training in chunks")
LENGTHS = ((30, 4, 17), (9, 41, 25))


@pytest.fixture(autouse=True)
def _hooks():
    compat.enable_vertical_chunking()


def columns(model, first=0):
    """Return the features of two columns of texts, as a trainer gives them to a loss."""
    texts = [[text(n, seed) for n in column] for seed, column in enumerate(LENGTHS, first)]
    return [model.preprocess(column) for column in texts]


def gradients(model, loss, batch=None):
    model.zero_grad()
    loss(batch or columns(model), None).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def require_near(found, wanted):
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        off = float((found[name] - one).abs().max() / one.abs().max())
        assert off <= GRADIENTS[torch.float32], name


def require_same(model, loss, size=7, dropout=True):
    """Compare the gradients of a loss in chunks with those of the released way."""
    model.train()
    model.transformers_model.train(dropout)
    model.training_chunk_size = None
    wanted = gradients(model, loss)
    model.training_chunk_size = size
    widths = record_widths(model)
    found = gradients(model, loss)
    assert widths
    assert max(widths) <= size + 1
    require_near(found, wanted)


def test_a_model_whose_dropout_is_off_is_trained_in_chunks(model):
    require_same(model, losses.MultipleNegativesRankingLoss(model), dropout=False)


@pytest.mark.parametrize(
    "make",
    [
        losses.MultipleNegativesRankingLoss,
        lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
        lambda model: losses.MatryoshkaLoss(
            model, losses.MultipleNegativesRankingLoss(model), [16, 8]
        ),
    ],
    ids=["in batch", "cached", "matryoshka"],
)
def test_losses(model, make):
    require_same(model, make(model))


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_pooling_modes_without_the_prompt(mamba2_checkpoint, mode):
    model = embedder(mamba2_checkpoint, pooling=mode, include_prompt=False)
    released = model.preprocess
    model.preprocess = lambda texts: released(texts, prompt="ab ")
    require_same(model, losses.MultipleNegativesRankingLoss(model))


@pytest.mark.parametrize(("model_type", "side"), [("mamba", "left"), ("rwkv", "right")])
def test_families_and_sides_of_padding(tmp_path, model_type, side):
    """Read padding where the released model does not: on the left in Mamba, behind RWKV's texts."""
    model = embedder(save_checkpoint(tmp_path, model_type, padding_side=side))
    require_same(model, losses.MultipleNegativesRankingLoss(model))


def test_modules_around_pooling(mamba2_checkpoint):
    def dense(into, out, name):
        return Dense(into, out, module_input_name=name, module_output_name=name)

    model = embedder(
        mamba2_checkpoint,
        dense(32, 12, "token_embeddings"),
        Pooling(12, "mean"),
        dense(12, 6, "sentence_embedding"),
        Normalize(),
    )
    loss = losses.MultipleNegativesRankingLoss(model)
    require_same(model, loss)
    model.transformers_model.requires_grad_(False)
    require_same(model, loss)


def test_steps_add_up(model):
    model.train()
    model.training_chunk_size = 7
    loss = losses.MultipleNegativesRankingLoss(model)
    once = gradients(model, loss)
    loss(columns(model), None).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name])


def test_distributed_data_parallel_sees_each_parameter_once(model):
    """Run it in one process: a parameter whose hook fires twice is an error of its own."""
    model.train()
    model.training_chunk_size = 7
    wanted = gradients(model, losses.MultipleNegativesRankingLoss(model))
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(
            losses.MultipleNegativesRankingLoss(model)
        )
        found = gradients(model, parallel)
    finally:
        torch.distributed.destroy_process_group()
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        torch.testing.assert_close(found[name], one)


ONE_OF_TWO = """
import datetime
import sys

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import compat

rank, folder = int(sys.argv[1]), sys.argv[2]
compat.enable_vertical_chunking()
torch.distributed.init_process_group(
    "gloo",
    init_method=f"file://{folder}/store",
    rank=rank,
    world_size=2,
    timeout=datetime.timedelta(minutes=2),  # Where the other process has failed.
)
model = SentenceTransformer(f"{folder}/model", device="cpu").train()
model.training_chunk_size = 7
loss = torch.nn.parallel.DistributedDataParallel(MultipleNegativesRankingLoss(model))
loss(torch.load(f"{folder}/batch{rank}.pt", weights_only=False), None).backward()
gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
torch.save(gradients, f"{folder}/gradients{rank}.pt")
"""


def test_distributed_data_parallel_takes_the_mean_over_two_processes(model, tmp_path):
    model.save_pretrained(f"{tmp_path}/model")
    model.train()
    parts = []
    for rank in range(2):
        batch = columns(model, first=2 * rank)
        torch.save(batch, tmp_path / f"batch{rank}.pt")
        parts.append(gradients(model, losses.MultipleNegativesRankingLoss(model), batch))
    command = [sys.executable, "-c", ONE_OF_TWO]
    runs = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    wanted = {name: (one + parts[1][name]) / 2 for name, one in parts[0].items()}
    for rank in range(2):
        found = torch.load(tmp_path / f"gradients{rank}.pt")
        require_near(found, wanted)
        assert any(not torch.allclose(found[name], parts[rank][name]) for name in found)


def test_it_is_for_training_alone(model):
    model.training_chunk_size = 7
    model.eval()
    widths = record_widths(model)
    found = model(columns(model)[0])["sentence_embedding"]
    model.encode(text(30))
    assert widths == [30, 30]
    assert found.requires_grad


def test_it_is_never_stored(model, tmp_path):
    model.training_chunk_size = 7
    model.save_pretrained(str(tmp_path))
    stored = (tmp_path / "config_sentence_transformers.json").read_text()
    assert "chunk_size" not in stored
    assert SentenceTransformer(str(tmp_path), device="cpu").training_chunk_size is None


@pytest.mark.parametrize(
    ("size", "error"), [(0, ValueError), ("all", ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_sizes_that_are_none(model, size, error):
    with pytest.raises(error, match="training_chunk_size"):
        model.training_chunk_size = size


def test_gradient_checkpointing_is_refused(model):
    model.train()
    model.training_chunk_size = 7
    model.transformers_model.activation_checkpointing_enable()
    with pytest.raises(UnsupportedModelError, match="activation_checkpointing_disable"):
        model(columns(model)[0])


def test_a_hybrid_is_refused(tmp_path):
    model = embedder(save_checkpoint(tmp_path, "bamba")).train()
    model.training_chunk_size = 7
    with pytest.raises(UnsupportedModelError, match="attention"):
        model(columns(model)[0])


def test_a_module_that_needs_the_whole_text_is_refused(mamba2_checkpoint):
    class Whole(torch.nn.Identity):
        pass

    model = embedder(mamba2_checkpoint, Whole(), Pooling(32, "mean")).train()
    model.training_chunk_size = 7
    with pytest.raises(UnsupportedPipelineError, match="Whole"):
        model(columns(model)[0])
