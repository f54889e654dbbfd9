"""Read a model with OpenVINO, exported by optimum-intel.

The exporter needs an older transformers than compat, so that it has an environment of its own,
which is made once; the runtime alone is installed beside compat.
"""

from __future__ import annotations

import venv
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ci.bench.contenders import HYBRID
from ci.bench.peers.common import Peer, Place, Read, run, saved

REQUIREMENTS = (
    "optimum-intel==2.2.0",
    "transformers==5.2.0",
    "torch==2.13.0",
    "openvino==2026.4.1",
)
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}

# Arguments: the folder of the model, and that to write.
_EXPORT = """
import sys
from optimum.exporters.openvino import main_export
model, folder = sys.argv[1:]
main_export(model, folder, task="text-generation-with-past",
            model_loading_kwargs={"torch_dtype": "float32"})
"""


def exporter(tools: Path) -> Path:
    """Return the Python that has optimum-intel, whose environment is made once."""
    folder = tools / "optimum-intel"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        venv.create(folder, with_pip=True, clear=True)
        pip = [f"{python}", "-m", "pip"]
        run([*pip, "install", "-q", *REQUIREMENTS], "installing optimum-intel")
        # PyPI's is built for CUDA: beside torch for a CPU it cannot be imported, nor transformers.
        run([*pip, "uninstall", "-q", "-y", "torchvision"], "leaving torchvision out")
        ready.touch()
    return python


def reader(model: PreTrainedModel, place: Place) -> Read:
    """Export the model, and return OpenVINO's way of reading it."""
    import openvino

    folder = place.scratch / "exported"
    python, plain = exporter(place.tools), saved(model, place.scratch / "model")
    run([python, "-c", _EXPORT, plain, folder], "the export by optimum-intel")
    precision = PRECISIONS[model.dtype]
    settings = {"INFERENCE_NUM_THREADS": place.threads, "INFERENCE_PRECISION_HINT": precision}
    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", settings)
    names = {name for port in compiled.inputs for name in port.get_names()}
    request = compiled.create_infer_request()

    def read(ids: Tensor) -> Tensor:
        request.reset_state()
        count = ids.shape[1]
        positions = torch.arange(count)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": positions[None],
            "cache_position": positions,
            "beam_idx": torch.zeros(1, dtype=torch.int32),
        }
        request.infer({name: value.numpy() for name, value in inputs.items() if name in names})
        return torch.from_numpy(request.get_tensor("logits").data[0, -1].copy()).float()

    return read


PEER = Peer("openvino", "openvino", frozenset({"mamba", HYBRID}), True, reader)
