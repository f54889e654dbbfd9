"""What the frames of upstream's files of tests have in common."""

import torch
from transformers.testing_utils import torch_device


class ModelTester:
    """Gives what the testers of upstream's files give to a test: a tiny config, and inputs."""

    def __init__(self, config_class, **settings):
        self.config_class, self.settings = config_class, settings

    def get_config(self):
        return self.config_class(vocab_size=99, pad_token_id=None, **self.settings)

    def prepare_config_and_inputs_for_common(self):
        """Return a config, and token ids (3, 12) with a mask of ones."""
        input_ids = torch.randint(3, 99, (3, 12), device=torch_device)
        mask = torch.ones_like(input_ids)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": mask}
