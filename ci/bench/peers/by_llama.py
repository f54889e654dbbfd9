"""Read a model with llama.cpp, by way of llama-cpp-python.

The converter comes with the package's source, which pip downloads; nothing of it is kept here. The
models have token ids and no texts, so that no tokenizer is converted.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ci.bench.contenders import HYBRID, RWKV7
from ci.bench.peers.common import CannotReadError, Peer, Place, Read, run, saved

VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}

# Arguments: llama.cpp's folder, that of the model, the type, and the file to write.
_CONVERT = """
import json, runpy, sys
tools, model, kind, path = sys.argv[1:]
sys.path[:0] = [tools, f"{tools}/gguf-py"]
from conversion import get_model_class
config = json.load(open(f"{model}/config.json"))
def set_vocab(self):
    self._set_vocab_none()
    self.gguf_writer.add_vocab_size(config["vocab_size"])
converter = get_model_class(config["architectures"][0])
converter.set_vocab, converter.no_mtp = set_vocab, True  # No layers that predict further tokens.
sys.argv = ["convert_hf_to_gguf.py", model, "--outtype", kind, "--outfile", path]
runpy.run_path(f"{tools}/convert_hf_to_gguf.py", run_name="__main__")
"""


def source(tools: Path) -> Path:
    """Return the folder of llama.cpp in the package's source, which is downloaded once.

    Raises:
        CannotReadError: Another version is installed, or what was downloaded is something else.
    """
    found = version("llama-cpp-python")
    if found != VERSION:
        raise CannotReadError(f"llama-cpp-python {found} is installed, and {VERSION} was looked at")
    path = tools / f"llama_cpp_python-{VERSION}"
    if not path.exists():
        wanted = f"llama-cpp-python=={VERSION}"
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        run([*pip, "--dest", tools, wanted], f"the download of {wanted}")
        archive = tools / f"{path.name}.tar.gz"
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != SHA256:
            raise CannotReadError(f"{archive.name} has the digest {digest}, and not {SHA256}")
        with tarfile.open(archive) as files:
            files.extractall(tools, filter="data")
    return path / "vendor" / "llama.cpp"


def reader(model: PreTrainedModel, place: Place) -> Read:
    """Convert the model, and return llama.cpp's way of reading it, of one sequence at a time."""
    import llama_cpp as llama

    path = place.scratch / "model.gguf"
    folder = saved(model, place.scratch / "model")
    convert = [sys.executable, "-c", _CONVERT, f"{source(place.tools)}", f"{folder}"]
    run([*convert, TYPES[model.dtype], f"{path}"], "the conversion to GGUF")
    llama.llama_log_set(_silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    weights = llama.llama_model_load_from_file(bytes(path), llama.llama_model_default_params())
    if not weights:
        raise CannotReadError("llama.cpp does not load what its converter wrote")
    place.stack.callback(llama.llama_model_free, weights)
    settings = llama.llama_context_default_params()
    settings.n_ctx = 8192
    settings.n_batch = settings.n_ubatch = place.chunk
    settings.n_threads = settings.n_threads_batch = place.threads
    settings.embeddings = True
    settings.pooling_type = llama.LLAMA_POOLING_TYPE_NONE
    if model.dtype == torch.float32:  # Of attention, in a hybrid; it is half by default.
        settings.type_k = settings.type_v = llama.GGML_TYPE_F32
    context = llama.llama_init_from_model(weights, settings)
    if not context:
        raise CannotReadError("llama.cpp makes no context for the model")
    place.stack.callback(llama.llama_free, context)
    width = llama.llama_model_n_embd(weights)

    def read(ids: Tensor) -> Tensor:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        for part in ids[0].split(place.chunk):
            tokens: Any = (llama.llama_token * len(part))(*part.tolist())
            if llama.llama_decode(context, llama.llama_batch_get_one(tokens, len(part))):
                raise CannotReadError("llama.cpp does not read the tokens")
        return torch.tensor(llama.llama_get_embeddings_ith(context, -1)[:width])

    return read


# It takes a line of llama.cpp's log, and must outlive all calls.
_silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


MODELS = frozenset({"mamba2", "mamba", HYBRID, RWKV7})
PEER = Peer("llama-cpp-python", "llama_cpp", MODELS, False, reader)
