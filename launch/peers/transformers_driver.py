"""Plain transformers: sampling with its own `generate`, float32, no stop token."""

import time

import protocol  # beside this file
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    """Answers rounds."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**protocol.SHAPE, bos_token_id=1, eos_token_id=None, pad_token_id=0)).float().eval()
    for seed in protocol.rounds():
        ids = torch.tensor(protocol.prompts(seed)).long().repeat_interleave(protocol.COMPLETIONS_PER_PROMPT, dim=0)
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=protocol.NEW_TOKENS, do_sample=True, temperature=1.0,
                top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        secs = time.perf_counter() - start
        if out.shape != (len(ids), protocol.PROMPT_TOKENS + protocol.NEW_TOKENS):
            raise ValueError(f"generated {tuple(out.shape)}: not the tokens that were asked for")
        protocol.answer(generation_tokens_per_sec=len(ids) * protocol.NEW_TOKENS / secs)


if __name__ == "__main__":
    main()
