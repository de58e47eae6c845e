"""TRL's GRPOTrainer: one step a round, float32, KL to a reference, exactly as many new tokens as everybody samples."""

import contextlib
import os
import pathlib
import sys
import tempfile
import time
from typing import Any, Callable

import protocol  # beside this file

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import datasets  # noqa: E402  (needs the environment above)
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from tokenizers import models, pre_tokenizers, Tokenizer  # noqa: E402

_, JOB = protocol.asked()  # a step does it all, whatever the benchmark
MICRO = JOB.prompts_per_slice * JOB.completions_per_prompt  # sequences of a forward and backward pass
MAX_STEPS = 1000
_SPECIAL = ("<pad>", "<eos>", "<unk>")  # TRL takes prompts as text: token n is the word "tn"


def tokenizer() -> Any:
    """A tokenizer of one word a token."""
    words = {_SPECIAL[i] if i < len(_SPECIAL) else f"t{i}": i for i in range(protocol.shape(JOB)["vocab_size"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def even_share(completions: list[str], **_: Any) -> list[float]:
    """A trivial reward: the share of even tokens."""
    return [sum(word[-1] in "02468" for word in text.split()) / max(1, len(text.split())) for text in completions]


class Turns(transformers.TrainerCallback):
    """Waits for its turn before each step, and answers after it."""

    def __init__(self):
        self.asked, self.secs, self.new_tokens = protocol.rounds(), {}, 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Waits."""
        if next(self.asked, None) is None:
            os._exit(0)  # nobody asks any more; the trainer has no other way out
        self.secs = {"generation": 0.0, "reward": 0.0}
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Answers."""
        step = time.perf_counter() - self._start
        if self.new_tokens != JOB.num_sequences * JOB.new_tokens:
            raise ValueError(f"generated {self.new_tokens} tokens: not those that were asked for")
        protocol.answer(
            generation_tokens_per_sec=self.new_tokens / self.secs["generation"], step_secs=step,
            step_tokens_per_sec=self.new_tokens / step, learner_secs=step - self.secs["generation"] - self.secs["reward"],
        )  # fmt: skip


def timed(trainer: Any, method: str, name: str, turns: Turns) -> None:
    """Adds up the seconds of a method of the trainer."""
    inner: Callable[..., Any] = getattr(trainer, method)

    def outer(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        found = inner(*arguments, **named)
        turns.secs[name] += time.perf_counter() - start
        if name == "generation":
            turns.new_tokens = sum(len(tokens) for tokens in found[0])
        return found

    setattr(trainer, method, outer)


def main() -> None:
    """Trains, a step a round."""
    directory = pathlib.Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**protocol.shape(JOB), bos_token_id=None, eos_token_id=1, pad_token_id=0)
    transformers.LlamaForCausalLM(config).float().save_pretrained(directory / "model")
    rows = [" ".join(f"t{token}" for token in row) for seed in range(8) for row in JOB.prompts(seed)] * (MAX_STEPS // 8)
    arguments = trl.GRPOConfig(
        output_dir=str(directory / "out"), use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=JOB.num_sequences // MICRO, num_generations=JOB.completions_per_prompt, max_completion_length=JOB.new_tokens,
        beta=0.04, temperature=1.0, top_k=0, top_p=1.0, learning_rate=1e-6, lr_scheduler_type="constant", max_steps=MAX_STEPS, loss_type="grpo",
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, model_init_kwargs={"dtype": "float32"}, shuffle_dataset=False,
        dataloader_pin_memory=False, generation_kwargs={"min_new_tokens": JOB.new_tokens},
    )  # fmt: skip
    turns = Turns()
    trainer = trl.GRPOTrainer(
        model=str(directory / "model"), reward_funcs=even_share, args=arguments, train_dataset=datasets.Dataset.from_dict({"prompt": rows}),
        processing_class=tokenizer(), callbacks=[turns],
    )  # fmt: skip
    timed(trainer, "_generate_single_turn", "generation", turns)
    timed(trainer, "_calculate_rewards", "reward", turns)
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()


if __name__ == "__main__":
    main()
