import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tolerances import COSINE

import compat
from ci import corpus
from ci.bench.measure import measure
from compat.default_model import FOLDER, load_default_model

END, PAD = 2, 0


@pytest.fixture(scope="module")
def model():
    return load_default_model(device="cpu")


@pytest.fixture(scope="module")
def topic_embeddings(model):
    texts = [text.strip() for text in corpus.topics().values()]
    with compat.vertical_chunking():  # In one pass a batch of them would take gigabytes.
        return model.encode(texts, batch_size=4, vertical_chunk_size=512)


@pytest.fixture(scope="module")
def tokenizer(model):
    return model.tokenizer


def digest(model):
    """Return a hash of all weights."""
    found = hashlib.sha256()
    for name, weight in model.state_dict().items():
        found.update(name.encode() + weight.numpy().tobytes())
    return found.hexdigest()


def test_embeds(model):
    embeddings = model.encode(["a text", "another one", ""], convert_to_tensor=True)
    assert embeddings.shape == (3, 256)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))


def test_chunks_give_the_embedding_of_the_full_pass(model):
    texts = [corpus.text_of_length(9000), ""]
    full = model.encode(texts, convert_to_tensor=True)
    with compat.vertical_chunking():
        chunked = model.encode(texts, vertical_chunk_size=512, convert_to_tensor=True)
    distance = 1 - torch.cosine_similarity(full.double(), chunked.double())
    assert distance.max() <= COSINE[torch.float32]


def digest_of_default_model(_subject):
    torch.manual_seed(5)
    return digest(load_default_model(device="cpu"))


def test_the_weights_are_the_same_in_another_process(model):
    there = measure(int, digest_of_default_model).result
    assert there == digest(model)


def test_the_callers_random_numbers_are_not_touched():
    before = torch.get_rng_state()
    load_default_model(device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_keyword_arguments_reach_sentence_transformers():
    model = load_default_model(device="cpu", model_kwargs={"dtype": torch.bfloat16})
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) <= 15e6


def test_the_model_is_in_float32_unless_told_otherwise(model):
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    loaded = load_default_model(device="cpu", model_kwargs={"dtype": "auto"})
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("text", "like_it", "unlike_it"),
    [
        ("How do I delete a file?", "rm removes each given name", "plays songs from a playlist"),
        ("a game of chess", "a board game for two players", "a server for electronic mail"),
        ("compress an archive", "make files smaller", "draw a line between two points"),
        ("change a password", "user accounts and their login", "the weather in the mountains"),
    ],
)
def test_texts_of_like_meaning_are_closer_than_others(model, text, like_it, unlike_it):
    first, like, unlike = model.encode([text, like_it, unlike_it], convert_to_tensor=True)
    assert first @ like > first @ unlike + 0.1


@pytest.mark.parametrize(
    ("question", "topic"),
    [
        ("how do I define a generator", "yield"),
        ("what happens when an error occurs", "exceptions"),
        ("loop over a list", "for"),
        ("import a module from a package", "import"),
    ],
)
def test_a_question_finds_its_topic(model, topic_embeddings, question, topic):
    scores = topic_embeddings @ model.encode(question)
    names = list(corpus.topics())
    assert topic in [names[place] for place in scores.argsort()[-3:]]


def test_a_text_in_the_end_of_a_long_one_still_counts(model):
    """Expect mean pooling to see all of a text; the teacher's window would not."""
    long = corpus.long_text()[:20_000]
    question, fact = "how is the soup cooked", "The soup needs two onions and a spoon of paprika. "
    texts = [long, long + "\n\n" + 20 * fact]
    with compat.vertical_chunking():
        without, with_it = model.encode(texts, vertical_chunk_size=512, convert_to_tensor=True)
    asked = model.encode(question, convert_to_tensor=True)
    assert asked @ with_it > asked @ without


@given(text=st.text())
def test_no_text_is_without_tokens(tokenizer, text):
    assert tokenizer(text)["input_ids"][-1] == END


def test_no_real_text_has_unknown_tokens(tokenizer):
    for text in corpus.topics().values():
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_every_text_ends_with_the_end_token_also_in_a_padded_batch(tokenizer):
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (END, PAD)
    assert tokenizer("")["input_ids"] == [END]
    batch = tokenizer(["", "three of them"], padding=True)
    short, long = batch["input_ids"]
    assert short == [END] + [PAD] * (len(long) - 1)
    assert long[-1] == END
    assert END not in long[:-1]
    assert batch["attention_mask"] == [[1] + [0] * (len(long) - 1), [1] * len(long)]


def test_the_length_of_a_text_has_no_limit(tokenizer):
    text = corpus.long_text()
    assert len(text) > 400_000
    assert len(tokenizer(text)["input_ids"]) > 80_000  # A warning would be an error here.


def test_the_corpus_has_texts_of_any_length():
    for length in (0, 1, 2, 999, 600_000):
        assert len(corpus.text_of_length(length)) == length
    assert corpus.text_of_length(5000) == corpus.long_text()[:5000]
