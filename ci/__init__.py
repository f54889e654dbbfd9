"""The repository's tools: the default model's making, measuring, and the demo."""
