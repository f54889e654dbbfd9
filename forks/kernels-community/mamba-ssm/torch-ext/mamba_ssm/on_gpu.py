"""The functions for a GPU, as mamba-ssm has them."""

from .ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn
from .ops.triton.selective_state_update import selective_state_update
from .ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined

__all__ = [
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "selective_scan_fn",
    "selective_state_update",
]
