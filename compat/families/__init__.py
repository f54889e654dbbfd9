"""How each family of models carries its state, and which are supported."""
