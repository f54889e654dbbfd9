"""Stands for the file of this name in upstream's repository, which the sdist leaves out."""

import unittest

import torch
from transformers import RwkvConfig, RwkvForCausalLM, RwkvModel
from transformers.testing_utils import require_torch, torch_device

from ...frame import ModelTester


@require_torch
class RwkvModelTest(unittest.TestCase):
    all_model_classes = (
        RwkvModel,
        RwkvForCausalLM,
    )

    def setUp(self):
        self.model_tester = ModelTester(
            RwkvConfig,
            hidden_size=32,
            num_hidden_layers=3,
            context_length=64,
            rescale_every=2,
        )
