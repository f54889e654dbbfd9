"""Stands for the file of this name in upstream's repository, which the sdist leaves out."""

import unittest

import torch
from transformers import MambaConfig, MambaForCausalLM, MambaModel
from transformers.testing_utils import require_torch, torch_device

from ...frame import ModelTester


@require_torch
class MambaModelTest(unittest.TestCase):
    all_model_classes = (
        MambaModel,
        MambaForCausalLM,
    )

    def setUp(self):
        self.model_tester = ModelTester(
            MambaConfig,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=8,
        )
