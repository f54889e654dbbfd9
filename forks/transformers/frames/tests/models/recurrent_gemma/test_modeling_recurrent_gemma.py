"""Stands for the file of this name in upstream's repository, which the sdist leaves out."""

import unittest

import torch
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM, RecurrentGemmaModel
from transformers.testing_utils import require_torch, torch_device

from ...frame import ModelTester


@require_torch
class RecurrentGemmaModelTest(unittest.TestCase):
    all_model_classes = (
        RecurrentGemmaModel,
        RecurrentGemmaForCausalLM,
    )

    def setUp(self):
        self.model_tester = ModelTester(
            RecurrentGemmaConfig,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            lru_width=32,
            attention_window_size=8,
        )
