"""Floor 1: the transformer, its weights and its tokenizer."""
