"""The hub kernels as `python -m ci.forks propagate` built them, and models that run on them."""

import collections
import functools
import importlib
from contextlib import contextmanager

import kernels
import pytest
import torch
from kernels import LocalLayerRepository, Mode

from ci.forks import ROOT

HUB = ROOT / "forks" / "kernels-community"
# The layers of Mamba-2's mixers; those of Mamba-1's share two of them.
MAMBA2 = (
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba_chunk_scan_combined",
    "mamba_split_conv1d_scan_combined",
    "selective_state_update",
)
MAMBA1 = ("mamba_inner_fn", "selective_scan_fn")
LAYERS = {"mamba-ssm": (*MAMBA2, *MAMBA1), "causal-conv1d": MAMBA2[:2]}
# Model types whose mixers take them, in the transformers that fits `kernels`.
MODELS = {
    **dict.fromkeys(
        ["bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2"], MAMBA2
    ),
    **dict.fromkeys(
        ["falcon_mamba", "jamba", "mamba"],
        (*MAMBA2[:2], MAMBA2[-1], *MAMBA1),
    ),
}


def tree(name):
    return HUB / name / "tree"


@functools.cache
def kernel(name="mamba-ssm"):
    """Load the kernel as `kernels` loads it."""
    if not (tree(name) / "build").is_dir():
        pytest.fail(f"There is no {tree(name) / 'build'}; run `python -m ci.forks propagate`.")
    return kernels.get_local_kernel(tree(name))


def functions(model_type):
    """Return the functions of a model that `kernels` can replace, by the name of the layer."""
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    known = [f for f in vars(module).values() if not isinstance(f, type)]
    known = [f for f in known if hasattr(type(f), "kernel_layer_name")]
    return {type(f).kernel_layer_name: f for f in known}


def released_functions():
    """Put the models' own functions back, as kernelizing without a kernel does."""
    for model_type in MODELS:
        holder = torch.nn.Module()
        vars(holder)["_kernel_funcs"] = functions(model_type)
        with kernels.use_kernel_mapping({}, inherit_mapping=False):
            kernels.kernelize(holder, mode=Mode.INFERENCE, device="cpu")


def mapping(path, names):
    return {n: {"cpu": LocalLayerRepository(repo_path=path, layer_name=n)} for n in names}


def _counted(forward, calls, name):
    @functools.wraps(forward)
    def counted(*args, **kwargs):
        calls[name] += 1
        return forward(*args, **kwargs)

    return counted


@contextmanager
def kernelized(model, names=LAYERS["mamba-ssm"], path=None):
    """Run a model on a kernel's layers, by transformers' own switch; yield how often each ran."""
    calls = collections.Counter()
    path = path or tree("mamba-ssm")
    layers = kernels.get_local_kernel(path).layers
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            layer = getattr(layers, name)
            patch.setattr(layer, "forward", _counted(layer.forward, calls, name))
        with kernels.use_kernel_mapping(mapping(path, names)):
            model.set_use_kernels(True)
            try:
                yield calls
            finally:
                model.set_use_kernels(False)
                released_functions()
