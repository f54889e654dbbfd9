"""Make the default model: its data, its training and its evaluation."""
