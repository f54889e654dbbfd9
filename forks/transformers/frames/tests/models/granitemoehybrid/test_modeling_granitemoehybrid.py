"""Stands for the file of this name in upstream's repository, which the sdist leaves out."""

import unittest

import torch
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, GraniteMoeHybridModel
from transformers.testing_utils import require_torch, torch_device

from ...frame import ModelTester


@require_torch
class GraniteMoeHybridModelTest(unittest.TestCase):
    all_model_classes = (
        GraniteMoeHybridModel,
        GraniteMoeHybridForCausalLM,
    )

    def setUp(self):
        self.model_tester = ModelTester(
            GraniteMoeHybridConfig,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=16,
            mamba_n_heads=4,
            mamba_n_groups=2,
            mamba_d_head=16,
            mamba_d_state=8,
            mamba_chunk_size=8,
        )
