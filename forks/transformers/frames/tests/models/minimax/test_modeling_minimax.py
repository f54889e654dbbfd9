"""Stands for the file of this name in upstream's repository, which the sdist leaves out."""

import unittest

import torch
from transformers import MiniMaxConfig, MiniMaxForCausalLM, MiniMaxModel
from transformers.testing_utils import require_torch, torch_device

from ...frame import ModelTester


@require_torch
class MiniMaxModelTest(unittest.TestCase):
    all_model_classes = (
        MiniMaxModel,
        MiniMaxForCausalLM,
    )

    def setUp(self):
        self.model_tester = ModelTester(
            MiniMaxConfig,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            block_size=3,
        )
