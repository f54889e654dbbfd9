"""Stands for the file of this name in upstream's repository, which the sdist leaves out."""

import unittest

import torch
from transformers import ZambaConfig, ZambaForCausalLM, ZambaModel
from transformers.testing_utils import require_torch, torch_device

from ...frame import ModelTester


@require_torch
class ZambaModelTest(unittest.TestCase):
    all_model_classes = (
        ZambaModel,
        ZambaForCausalLM,
    )

    def setUp(self):
        self.model_tester = ModelTester(
            ZambaConfig,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            layers_block_type=["linear_attention", "hybrid", "hybrid"],
            n_mamba_heads=2,
            mamba_d_state=8,
        )
