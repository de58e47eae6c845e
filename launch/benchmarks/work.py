"""The model that everybody is timed on: SmolLM2-135M's shape with random weights. The job is launch/peers/job.py's."""

from launch.peers.job import Job, VOCABULARY
from pgrpo_jax.models.config import ModelConfig


def model_config(job: Job) -> ModelConfig:
    """Returns the sizes of the model: launch/peers/protocol.py has them under transformers' names."""
    return ModelConfig(
        num_layers=job.layers, width=576, mlp_width=1536, num_heads=9, num_kv_heads=3, head_dim=64, vocab_size=VOCABULARY,
        context_length=max(2048, job.prompt_tokens + job.new_tokens), rope_theta=1e5, norm_epsilon=1e-5, tied_embeddings=True,
    )  # fmt: skip
