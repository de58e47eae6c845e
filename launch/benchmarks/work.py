"""The work that everybody is timed on: SmolLM2-135M's shape with random weights, and prompts of random tokens."""

import dataclasses

import numpy as np

from pgrpo_jax.models.families import ModelConfig

MODEL = ModelConfig(
    num_layers=30, width=576, mlp_width=1536, num_heads=9, num_kv_heads=3, head_dim=64, vocab_size=49152, context_length=2048,
    rope_theta=1e5, norm_epsilon=1e-5, tied_embeddings=True,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """One batch of rollouts.

    Attributes:
        num_prompts: P.
        completions_per_prompt: G.
        prompt_tokens: tokens of every prompt.
        new_tokens: tokens of every completion.
    """

    num_prompts: int = 8
    completions_per_prompt: int = 8
    prompt_tokens: int = 64
    new_tokens: int = 64

    @property
    def num_sequences(self) -> int:
        """N = P * G."""
        return self.num_prompts * self.completions_per_prompt

    def prompts(self, seed: int) -> np.ndarray:
        """Returns [P, Tp] int32 token ids, the same for whoever asks."""
        shape = (self.num_prompts, self.prompt_tokens)
        return np.random.default_rng(seed).integers(10, MODEL.vocab_size, shape).astype(np.int32)
