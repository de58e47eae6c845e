"""P-GRPO in RLAX's layout: language models trained on the preferences of people who disagree."""
