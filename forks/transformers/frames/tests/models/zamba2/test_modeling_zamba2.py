"""Stands for the file of this name in upstream's repository, which the sdist leaves out."""

import unittest

import torch
from transformers import Zamba2Config, Zamba2ForCausalLM, Zamba2Model
from transformers.testing_utils import require_torch, torch_device

from ...frame import ModelTester


@require_torch
class Zamba2ModelTest(unittest.TestCase):
    all_model_classes = (
        Zamba2Model,
        Zamba2ForCausalLM,
    )

    def setUp(self):
        self.model_tester = ModelTester(
            Zamba2Config,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            layers_block_type=["linear_attention", "hybrid", "hybrid"],
            n_mamba_heads=4,
            mamba_ngroups=2,
            mamba_d_state=8,
            chunk_size=8,
        )
