"""Stands for the file of this name in upstream's repository, which the sdist leaves out."""

import unittest

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, Mamba2Model
from transformers.testing_utils import require_torch, torch_device

from ...frame import ModelTester


@require_torch
class Mamba2ModelTest(unittest.TestCase):
    all_model_classes = (
        Mamba2Model,
        Mamba2ForCausalLM,
    )

    def setUp(self):
        self.model_tester = ModelTester(
            Mamba2Config,
            hidden_size=32,
            num_hidden_layers=2,
            num_heads=4,
            head_dim=16,
            n_groups=2,
            state_size=8,
            chunk_size=8,
        )
