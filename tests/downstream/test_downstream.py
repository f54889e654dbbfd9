"""Vertical chunking reaches the model through libraries that call `encode` for their users."""

import numpy as np
import pytest
import torch
from support.embedders import text
from support.tolerances import CHUNKED
from torch.nn.modules.module import register_module_forward_pre_hook

import compat
from compat.families.lookup import backbone_of

# Warnings about other libraries are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")

TEXTS = [text(20), text(5)]
PASSED = {"vertical_chunk_size": 8}


@pytest.fixture
def whole(model):
    """Return the embeddings of whole texts, by the released library."""
    return model.encode(TEXTS)


@pytest.fixture
def saved(model, whole, tmp_path):
    """Save the model without a default, and return the folder; compat's hooks are on."""
    compat.enable_vertical_chunking()
    return save(model, tmp_path / "saved")


@pytest.fixture
def saved_with_default(model, whole, tmp_path):
    """Save the model with a default of 8 tokens, and return the folder; compat's hooks are on."""
    compat.enable_vertical_chunking()
    model.vertical_chunk_size = 8
    return save(model, tmp_path / "saved")


@pytest.fixture
def widths(model):
    """Return a list that grows by the width of every batch of tokens that any model reads."""
    backbone_of(model.transformers_model)  # Which asks a model of its class once, on some tokens.
    found = []

    def note(module, arguments):
        if isinstance(module, torch.nn.Embedding):
            found.append(arguments[0].shape[1])

    hook = register_module_forward_pre_hook(note)
    yield found
    hook.remove()


def save(model, folder):
    model.save(str(folder), create_model_card=False)
    return str(folder)


def assert_chunked(found, whole, widths):
    assert max(widths) == 8
    np.testing.assert_allclose(found, whole, rtol=0, atol=CHUNKED[torch.float32])


def test_langchain_passes_encode_kwargs_on(saved, whole, widths):
    from langchain_huggingface import HuggingFaceEmbeddings

    embeddings = HuggingFaceEmbeddings(
        model_name=saved, model_kwargs={"device": "cpu"}, encode_kwargs=PASSED
    )
    assert_chunked(embeddings.embed_documents(TEXTS), whole, widths)
    del widths[:]
    assert_chunked(embeddings.embed_query(TEXTS[0]), whole[0], widths)


def test_langchain_takes_a_stored_default(saved_with_default, whole, widths):
    from langchain_huggingface import HuggingFaceEmbeddings

    embeddings = HuggingFaceEmbeddings(
        model_name=saved_with_default, model_kwargs={"device": "cpu"}
    )
    assert_chunked(embeddings.embed_documents(TEXTS), whole, widths)


def test_llama_index_takes_a_stored_default(saved_with_default, whole, widths):
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    embedding = HuggingFaceEmbedding(model_name=saved_with_default, device="cpu", normalize=False)
    assert_chunked(embedding.get_text_embedding_batch(TEXTS), whole, widths)
    del widths[:]
    assert_chunked(embedding.get_query_embedding(TEXTS[0]), whole[0], widths)


def test_haystack_passes_encode_kwargs_on(saved, whole, widths):
    from haystack import Document
    from haystack.utils import ComponentDevice
    from haystack_integrations.components.embedders.sentence_transformers import (
        SentenceTransformersDocumentEmbedder,
        SentenceTransformersTextEmbedder,
    )

    options = {"model": saved, "device": ComponentDevice.from_str("cpu"), "encode_kwargs": PASSED}
    documents = SentenceTransformersDocumentEmbedder(**options)
    documents.warm_up()
    found = documents.run([Document(content=words) for words in TEXTS])["documents"]
    assert_chunked([document.embedding for document in found], whole, widths)

    del widths[:]
    query = SentenceTransformersTextEmbedder(**options)
    query.warm_up()
    assert_chunked(query.run(TEXTS[0])["embedding"], whole[0], widths)


BOOK = "\n\n".join(" ".join(f"{text(20, 9 * p + s)}." for s in range(9)) for p in range(3))


def assert_passages(model, passages, texts):
    """Each is the mean of its own tokens, one a character, in one pass over the whole text."""
    tokens = model.encode(BOOK, output_value="token_embeddings").numpy()
    spans = [(BOOK.index(words), BOOK.index(words) + len(words)) for words in texts]
    whole = np.stack([tokens[start:end].mean(0) for start, end in spans])
    found = compat.encode_spans(model, BOOK, passages, vertical_chunk_size=8)
    assert len(found) > 3
    np.testing.assert_allclose(found, whole, rtol=0, atol=CHUNKED[torch.float32])


def test_documents_of_langchains_splitters_are_spans(model):
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    splitter = RecursiveCharacterTextSplitter(
        chunk_size=100, chunk_overlap=20, add_start_index=True
    )
    documents = splitter.create_documents([BOOK])
    assert_passages(model, documents, [document.page_content for document in documents])


def test_nodes_of_llama_indexes_parsers_are_spans(model):
    from llama_index.core import Document
    from llama_index.core.node_parser import SentenceSplitter

    splitter = SentenceSplitter(chunk_size=60, chunk_overlap=10)
    nodes = splitter.get_nodes_from_documents([Document(text=BOOK)])
    assert_passages(model, nodes, [node.get_content() for node in nodes])
