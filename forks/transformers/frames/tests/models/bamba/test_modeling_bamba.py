"""Stands for the file of this name in upstream's repository, which the sdist leaves out."""

import unittest

import torch
from transformers import BambaConfig, BambaForCausalLM, BambaModel
from transformers.testing_utils import require_torch, torch_device

from ...frame import ModelTester


@require_torch
class BambaModelTest(unittest.TestCase):
    all_model_classes = (
        BambaModel,
        BambaForCausalLM,
    )

    def setUp(self):
        self.model_tester = ModelTester(
            BambaConfig,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_layer_indices=[1],
            mamba_n_heads=4,
            mamba_n_groups=2,
            mamba_d_head=16,
            mamba_d_state=8,
            mamba_chunk_size=8,
        )
