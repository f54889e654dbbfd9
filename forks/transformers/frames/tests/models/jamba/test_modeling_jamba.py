"""Stands for the file of this name in upstream's repository, which the sdist leaves out."""

import unittest

import torch
from transformers import JambaConfig, JambaForCausalLM, JambaModel
from transformers.testing_utils import require_torch, torch_device

from ...frame import ModelTester


@require_torch
class JambaModelTest(unittest.TestCase):
    all_model_classes = (
        JambaModel,
        JambaForCausalLM,
    )

    def setUp(self):
        self.model_tester = ModelTester(
            JambaConfig,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_layer_period=3,
            attn_layer_offset=1,
            num_experts=4,
            num_experts_per_tok=2,
            mamba_d_state=8,
        )
