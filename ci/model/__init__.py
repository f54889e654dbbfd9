"""The default model: its data, its training and its evaluation."""
