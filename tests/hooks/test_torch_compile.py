"""torch.compile of a model, of a part of it, or of what calls it: chunks run as they are, exactly.

The released scan of Mamba-1 begins each chunk from zeros, so what is compiled all the same shows.
"""

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from support.embedders import embedder, record_widths, save_checkpoint, text
from support.families import tiny_model, tokens
from support.stack import FORKS
from support.tolerances import CHUNKED, GRADIENTS

import compat

pytestmark = pytest.mark.skipif(FORKS, reason="the forks have no training in chunks")
TEXTS = [text(n) for n in (30, 4, 17)]
F32 = torch.float32


@pytest.fixture(autouse=True)
def _hooks():
    torch.compiler.reset()
    compat.enable_vertical_chunking()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("mamba"), "mamba")


def compiled(function, **options):
    """Compile; this backend traces, and generates no code."""
    return torch.compile(function, backend="eager", **options)


def compile_in_place(*modules):
    for module in modules:
        module.compile(backend="eager")


def with_its_transformer_compiled(model):
    model[0] = compiled(model[0])
    return model


def with_its_own_model_compiled(model):
    model[0].model = compiled(model[0].model)
    return model


def in_place(of):
    def compile_it(model):
        compile_in_place(*of(model))
        return model

    return compile_it


# What is compiled; each returns what is called with features.
ENTRIES = {
    "the model": compiled,
    "the model, in place": in_place(lambda model: [model]),
    "its Transformer": with_its_transformer_compiled,
    "its Transformer, in place": in_place(lambda model: [model[0]]),
    "its transformers model": with_its_own_model_compiled,
    "its transformers model, in place": in_place(lambda model: [model[0].model]),
    "its layers, in place": in_place(lambda model: model[0].model.layers),
    "its Pooling, in place": in_place(lambda model: [model[1]]),
    "a function that calls it": lambda model: compiled(lambda features: model(features)),
}


def gradients(model, embed):
    embeddings = embed(model.preprocess(TEXTS))["sentence_embedding"]
    weights = torch.linspace(-1, 2, embeddings.numel()).view_as(embeddings)
    return torch.autograd.grad((embeddings * weights).sum(), [*model.parameters()])


@pytest.mark.parametrize("entry", ENTRIES)
def test_training_in_chunks(checkpoint, entry):
    model = embedder(checkpoint).train()
    wanted = gradients(model, model)
    widths = record_widths(model)
    embed = ENTRIES[entry](model)
    model.training_chunk_size = 7
    found = gradients(model, embed)
    assert widths
    assert max(widths) <= 7
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= GRADIENTS[F32] * other.abs().max()


@pytest.mark.parametrize("entry", ENTRIES)
def test_encode_and_a_call_with_the_size(checkpoint, entry):
    model = embedder(checkpoint).eval()
    wanted = model.encode(TEXTS, convert_to_tensor=True)
    widths = record_widths(model)
    embed = ENTRIES[entry](model)
    encode = getattr(embed, "encode", model.encode)
    found = encode(TEXTS, convert_to_tensor=True, vertical_chunk_size=7)
    assert (found - wanted).abs().max() <= CHUNKED[F32]
    if not entry.startswith("a function"):
        found = embed(model.preprocess(TEXTS), vertical_chunk_size=7)["sentence_embedding"]
        assert (found - wanted).abs().max() <= CHUNKED[F32]
    assert widths
    assert max(widths) <= 7


def test_a_trainer_that_compiles(checkpoint, tmp_path):
    """Take a step on whole texts, and a compiled one in chunks, from the same weights."""
    pairs = Dataset.from_dict({"anchor": TEXTS, "positive": [text(n, 1) for n in (9, 41, 25)]})

    def trained(size, **options):
        model = embedder(checkpoint)
        model.training_chunk_size = size
        widths = record_widths(model)
        arguments = SentenceTransformerTrainingArguments(
            str(tmp_path),
            max_steps=1,
            learning_rate=1.0,
            optim="sgd",
            report_to="none",
            save_strategy="no",
            dataloader_pin_memory=False,
            **options,
        )
        loss = losses.MultipleNegativesRankingLoss(model)
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=pairs, loss=loss)
        trainer.train()
        return max(widths), dict(model.named_parameters())

    longest, wanted = trained(None)
    found_longest, found = trained(7, torch_compile=True, torch_compile_backend="eager")
    assert (longest, found_longest) == (41, 7)
    before = dict(embedder(checkpoint).named_parameters())
    for name, one in wanted.items():
        step = (one - before[name]).abs().max()
        assert step > 0
        assert (found[name] - one).abs().max() <= GRADIENTS[F32] * step + 1e-7, name


@pytest.mark.parametrize("how", ["wrapped", "in place", "layers", "a function"])
def test_a_plain_model(how):
    model, ids = tiny_model("mamba"), tokens(2, 30)
    wanted = model(ids, use_cache=False).last_hidden_state
    wanted_gradients = torch.autograd.grad(wanted.mean(1).square().sum(), [*model.parameters()])
    passed = compiled(model) if how == "wrapped" else model
    if how != "wrapped":
        compile_in_place(*{"in place": [model], "layers": model.layers}.get(how, []))

    def read(ids):
        pieces = [
            hidden for _, hidden in compat.iter_chunks(passed, input_ids=ids, vertical_chunk_size=8)
        ]
        last = compat.last_hidden_state(passed, input_ids=ids, vertical_chunk_size=8)
        return pieces, last, compat.pooled(passed, input_ids=ids, vertical_chunk_size=8)

    pieces, last, embedding = (compiled(read) if how == "a function" else read)(ids)
    assert (torch.cat(pieces, 1) - wanted).abs().max() <= CHUNKED[F32]
    assert (last - wanted[:, -1]).abs().max() <= CHUNKED[F32]
    found = torch.autograd.grad(embedding.square().sum(), [*model.parameters()])
    for one, other in zip(found, wanted_gradients, strict=True):
        assert (one - other).abs().max() <= GRADIENTS[F32] * other.abs().max()


def test_one_graph_is_refused_with_the_reason(checkpoint):
    model = embedder(checkpoint).train()
    model.training_chunk_size = 7
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile it without fullgraph=True"):
        compiled(model, fullgraph=True)(model.preprocess(TEXTS))


@pytest.mark.parametrize("training", [False, True])
def test_what_is_read_at_once_is_still_one_graph(model, training):
    model.train(training)
    wanted = model(model.preprocess(TEXTS))["sentence_embedding"]
    found = compiled(model, fullgraph=True)(model.preprocess(TEXTS))["sentence_embedding"]
    assert (found - wanted).abs().max() <= CHUNKED[F32]


def test_what_was_compiled_is_compiled_again_behind_the_chunks(checkpoint):
    model, ids, runs = tiny_model("mamba2"), tokens(1, 20), []

    def backend(graph, _):
        runs.append(graph)
        return graph.forward

    compat.last_hidden_state(model, input_ids=ids, vertical_chunk_size=8)
    torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(2))
    assert len(runs) == 1
