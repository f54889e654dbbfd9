"""Stands for the file of this name in upstream's repository, which the sdist leaves out."""

import unittest

import torch
from transformers import NemotronHConfig, NemotronHForCausalLM, NemotronHModel
from transformers.testing_utils import require_torch, torch_device

from ...frame import ModelTester


@require_torch
class NemotronHModelTest(unittest.TestCase):
    all_model_classes = (
        NemotronHModel,
        NemotronHForCausalLM,
    )

    def setUp(self):
        self.model_tester = ModelTester(
            NemotronHConfig,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            layers_block_type=["linear_attention", "mlp", "full_attention", "mlp"],
            mamba_num_heads=4,
            mamba_head_dim=16,
            n_groups=2,
            ssm_state_size=8,
            chunk_size=8,
        )
