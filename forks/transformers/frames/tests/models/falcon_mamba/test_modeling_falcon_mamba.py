"""Stands for the file of this name in upstream's repository, which the sdist leaves out."""

import unittest

import torch
from transformers import FalconMambaConfig, FalconMambaForCausalLM, FalconMambaModel
from transformers.testing_utils import require_torch, torch_device

from ...frame import ModelTester


@require_torch
class FalconMambaModelTest(unittest.TestCase):
    all_model_classes = (
        FalconMambaModel,
        FalconMambaForCausalLM,
    )

    def setUp(self):
        self.model_tester = ModelTester(
            FalconMambaConfig,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=8,
        )
