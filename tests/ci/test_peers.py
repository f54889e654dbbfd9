"""The comparison with other packages is of the same work; none of them is needed here."""

import sys

import pytest
import torch

from ci.bench.contenders import SMOKE, make_model
from ci.bench.peers import __main__ as peers
from ci.bench.peers import by_llama, by_rwkv, common
from ci.tables import markers

IDS = torch.arange(3, 43)[None]


def names_of_fla(layers):
    """List the names of the weights of fla's `RWKV7Model`."""
    yield from ["embeddings.weight", "norm.weight", "norm.bias"]
    for layer in range(layers):
        own = f"layers.{layer}"
        norms = ["attn_norm", "ffn_norm", "attn.g_norm"] + ["pre_norm"] * (layer == 0)
        yield from (f"{own}.{norm}.{part}" for norm in norms for part in ("weight", "bias"))
        vectors = "x_r x_w x_k x_v x_a x_g k_k k_a r_k"
        yield from (f"{own}.attn.{name}" for name in vectors.split())
        yield from (f"{own}.attn.{name}_proj.weight" for name in "rkvo")
        for name in "wag" + "v" * (layer > 0):
            yield from (f"{own}.attn.{name}_lora.lora.{place}.weight" for place in (0, 2))
            if name != "g":
                yield f"{own}.attn.{name}_lora.lora.2.bias"
        yield from (f"{own}.ffn.{name}" for name in ("x_k", "key.weight", "value.weight"))


def names_of_rwkv(layers):
    """List the names that the rwkv package looks up."""
    yield from ["emb.weight", "head.weight", "ln_out.weight", "ln_out.bias"]
    for layer in range(layers):
        own = f"blocks.{layer}"
        norms = ["ln1", "ln2", "att.ln_x"] + ["ln0"] * (layer == 0)
        yield from (f"{own}.{norm}.{part}" for norm in norms for part in ("weight", "bias"))
        words = "x_r x_w x_k x_v x_a x_g k_k k_a r_k w0 w1 w2 a0 a1 a2 g1 g2"
        words += " receptance.weight key.weight value.weight output.weight"
        words += " v0 v1 v2" * (layer > 0)
        yield from (f"{own}.att.{word}" for word in words.split())
        yield from (f"{own}.ffn.{word}" for word in ("x_k", "key.weight", "value.weight"))


def test_weights_of_rwkv7_get_other_names_and_none_is_lost():
    names = list(names_of_fla(2))
    weights = {name: torch.full((2, 3), float(place)) for place, name in enumerate(names)}
    biases = {name: value[0] for name, value in weights.items() if name.endswith("bias")}
    found = by_rwkv.renamed(weights | biases)
    assert sorted(found) == sorted(names_of_rwkv(2))
    head = found.pop("head.weight")
    assert head is found["emb.weight"]
    assert sorted(value.flatten()[0].item() for value in found.values()) == [*range(len(names))]
    turned = {name.split(".")[-1] for name, value in found.items() if value.shape == (3, 2)}
    assert turned == {f"{name}{place}" for name in "wavg" for place in "12"}
    assert found["blocks.1.att.v2"][0, 0] == names.index("layers.1.attn.v_lora.lora.2.weight")


@pytest.mark.parametrize("model_type", ["mamba2", "qwen3_5_text"])
def test_the_head_is_the_embeddings_so_that_logits_can_be_compared(model_type):
    model = make_model(model_type, SMOKE, "float32")
    with torch.no_grad():
        whole = common.causal(model)
        logits = whole(input_ids=IDS).logits[0, -1]
        before = whole(input_ids=IDS[:, :-1]).logits[0, -1]
    own = peers.ours(model, 16, IDS)
    assert peers.distance(model, own, logits, True) < 1e-6
    assert peers.distance(model, own, before, True) > 1e-3


def reader_of(change):
    def reader(model, place):
        return lambda ids: change(peers.ours(model, place.chunk, ids))

    return reader


def refuse(model, place):
    common.run([sys.executable, "-c", "print('first'); raise SystemExit('last')"], "the export")


def test_peers_are_compared_refused_or_named(tmp_path, monkeypatch, capsys):
    page = tmp_path / "RESULTS.md"
    page.write_text("before\n<!-- peers -->\n<!-- /peers -->\nbehind\n")
    monkeypatch.setattr(markers, "BENCH", page)
    both = frozenset({"mamba2", "mamba"})
    found = [
        common.Peer("torch", "torch", both, False, reader_of(lambda hidden: hidden)),
        common.Peer("numpy", "numpy", both, False, reader_of(lambda hidden: hidden.flip(0))),
        common.Peer("tqdm", "tqdm", both, False, refuse),
        common.Peer("packaging", "packaging", frozenset({"mamba"}), False, refuse),
        common.Peer("no-such", "no_such_package", both, False, refuse),
    ]
    monkeypatch.setattr(peers, "PEERS", found)
    folder = ["--output", str(tmp_path / "out")]
    peers.main(["--smoke", "--readme", "--models", "mamba2", *folder])
    text = page.read_text()
    assert "**Smoke sizes" in text
    assert text.startswith("before\n")
    assert text.endswith("behind\n")
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| Mamba2")]
    read = ["compat", "torch", "numpy"]
    assert [line[1:3] for line in lines] == [
        [dtype, name] for dtype in ("float32", "bfloat16") for name in read
    ]
    assert [line[5] for line in lines[::3]] == ["1.00", "1.00"]
    assert ["**" in line[-1] for line in lines] == [False, False, True] * 2
    assert text.count("the export failed: last.") == 2
    assert "- no-such: not installed." in text
    assert "- packaging has no Mamba2 130M." in text
    peers.main(["--smoke", "--models", "mamba", "--only", "tqdm", *folder])
    assert "no-such" not in capsys.readouterr().out.rpartition("Smoke sizes")[2]


def test_ratios_are_medians_of_rounds_in_the_same_turn():
    seconds = {"floor": [1.0, 2.0, 4.0], "compat": [2.0, 2.0, 8.0], "far": [8.0, 4.0, 16.0]}
    seconds["near"] = seconds["compat"]
    distances = {"compat": 0.0, "far": float("nan"), "near": 0.01}
    assert peers.rows("m", "float32", 100, seconds, distances, 0.05) == [
        ["m", "float32", "compat", "50", "2.00", "1.00", "0e+00"],
        ["m", "float32", "far", "12", "4.00", "2.00", "**nan**"],
        ["m", "float32", "near", "50", "2.00", "1.00", "1e-02"],
    ]


def test_another_release_of_llama_cpp_python_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(by_llama, "version", lambda name: "0.0.1")
    with pytest.raises(common.CannotReadError, match=r"0\.0\.1 is installed"):
        by_llama.source(tmp_path)


def test_a_source_with_another_digest_is_not_unpacked(tmp_path, monkeypatch):
    def download(command, what):
        (tmp_path / f"llama_cpp_python-{by_llama.VERSION}.tar.gz").write_bytes(b"other")

    monkeypatch.setattr(by_llama, "version", lambda name: by_llama.VERSION)
    monkeypatch.setattr(by_llama, "run", download)
    with pytest.raises(common.CannotReadError, match="has the digest"):
        by_llama.source(tmp_path)


def test_what_is_saved_has_the_head(tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = make_model("mamba2", SMOKE, "bfloat16")
    folder = common.saved(model, tmp_path / "model")
    assert common.saved(model, folder) == folder
    assert load_file(folder / "model.safetensors")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(folder)(input_ids=IDS).logits
        assert torch.equal(again, common.causal(model)(input_ids=IDS).logits)
