"""Plain transformers: sampling with its own `generate`, float32, no stop token; where lengths are ragged, in batches, each sequence stopped at its own."""

import time
from typing import Any

import protocol  # beside this file
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

RAGGED_BATCH = 64  # sequences, in the order given


class Limits(StoppingCriteria):
    """Says of each sequence whether it has reached its own length.

    Args:
        prompt_tokens: of every sequence.
        limits: [B] new tokens.
    """

    def __init__(self, prompt_tokens: int, limits: torch.Tensor):
        self._prompt_tokens, self._limits = prompt_tokens, limits

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Returns [B] bool."""
        return input_ids.shape[1] - self._prompt_tokens >= self._limits


def generate(model: Any, ids: torch.Tensor, limits: torch.Tensor) -> None:
    """Samples one batch, until its longest sequence is at its length.

    Args:
        model: of transformers.
        ids: [B, Tp] prompts.
        limits: [B] new tokens of each.

    Raises:
        ValueError: as many tokens were not generated.
    """
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=int(limits.max()), do_sample=True, temperature=1.0, top_k=0,
        top_p=1.0, eos_token_id=None, pad_token_id=0, stopping_criteria=StoppingCriteriaList([Limits(ids.shape[1], limits)]),
    )  # fmt: skip
    if out.shape != (len(ids), ids.shape[1] + int(limits.max())):
        raise ValueError(f"generated {tuple(out.shape)}: not the tokens that were asked for")


def main() -> None:
    """Answers rounds."""
    _, job = protocol.asked()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**protocol.shape(job), bos_token_id=1, eos_token_id=None, pad_token_id=0)).float().eval()
    size = RAGGED_BATCH if job.ragged else job.num_sequences
    for seed in protocol.rounds():
        ids = torch.tensor(job.prompts(seed)).long().repeat_interleave(job.completions_per_prompt, dim=0)
        limits = torch.tensor(job.limits(seed))
        start = time.perf_counter()
        with torch.inference_mode():
            for batch in zip(ids.split(size), limits.split(size), strict=True):
                generate(model, *batch)
        protocol.answer(generation_tokens_per_sec=int(limits.sum()) / (time.perf_counter() - start))


if __name__ == "__main__":
    main()
