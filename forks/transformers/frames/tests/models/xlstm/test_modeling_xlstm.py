"""Stands for the file of this name in upstream's repository, which the sdist leaves out."""

import unittest

import torch
from transformers import xLSTMConfig, xLSTMForCausalLM, xLSTMModel
from transformers.testing_utils import require_torch, torch_device

from ...frame import ModelTester


@require_torch
class xLSTMModelTest(unittest.TestCase):
    all_model_classes = (
        xLSTMModel,
        xLSTMForCausalLM,
    )

    def setUp(self):
        self.model_tester = ModelTester(
            xLSTMConfig,
            hidden_size=128,
            num_hidden_layers=2,
            num_heads=2,
            chunk_size=4,
        )
