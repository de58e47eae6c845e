"""What every driver shares: the turn-taking on standard input and output, and the model that all are timed on."""

import json
import os
import resource
import sys
from typing import Any, Iterator

import numpy as np

SHAPE = {
    "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1536,
    "vocab_size": 49152, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 100000, "max_position_embeddings": 2048,
}  # fmt: skip
NUM_PROMPTS, COMPLETIONS_PER_PROMPT, PROMPT_TOKENS, NEW_TOKENS = 8, 8, 64, 64

# Answers go where standard output was; whatever a library prints goes to the log.
_ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def prompts(seed: int) -> np.ndarray:
    """Returns [P, Tp] token ids, those of launch/benchmarks/work.py."""
    return np.random.default_rng(seed).integers(10, SHAPE["vocab_size"], (NUM_PROMPTS, PROMPT_TOKENS)).astype(np.int32)


def rounds() -> Iterator[int]:
    """Yields the seed of each round that is asked for, until standard input ends."""
    for line in sys.stdin:
        yield int(line.split()[1])


def answer(**measured: Any) -> None:
    """Answers a round."""
    measured["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    _ANSWERS.write(json.dumps(measured) + "\n")
    _ANSWERS.flush()
