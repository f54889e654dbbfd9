"""Stands for the file of this name in upstream's repository, which the sdist leaves out."""

import unittest

import torch
from transformers import Lfm2Config, Lfm2ForCausalLM, Lfm2Model
from transformers.testing_utils import require_torch, torch_device

from ...frame import ModelTester


@require_torch
class Lfm2ModelTest(unittest.TestCase):
    all_model_classes = (
        Lfm2Model,
        Lfm2ForCausalLM,
    )

    def setUp(self):
        self.model_tester = ModelTester(
            Lfm2Config,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=["full_attention", "conv"],
            block_auto_adjust_ff_dim=False,
        )
