"""Floor 1: sampling completions, and scoring them under the same distribution."""
