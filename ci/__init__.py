"""The repository's tools: making the default model, measuring, and the demo."""
