"""TRL's GRPOTrainer on the demo's prompts and reward, float32: one JSON object a step, {"step", "reward"}, in --rewards.

Prompts come with the ids that we sample from, and are refused where TRL's tokenizer makes others of them. An answer earns the rating of the one
candidate that it names, in fifths (movielens_reward.py).
"""

import argparse
import copy
import json
import os
import pathlib
import tempfile
from typing import Any

import movielens_reward  # beside this file

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import datasets  # noqa: E402  (needs the environment above)
import transformers  # noqa: E402
import trl  # noqa: E402

_SLICE = 4  # prompts of a forward and backward pass


def options() -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser()
    for name in ("model", "prompts", "rewards"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    for name in ("steps", "seed", "prompts_per_step", "completions_per_prompt", "new_tokens", "warmup_steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--learning_rate", type=float, required=True)
    return parser.parse_args()


def reward(completions: list[Any], facts: list[str], **_: Any) -> list[float]:
    """Returns the rewards of a batch of conversations."""
    return [movielens_reward.rating(answer[0]["content"], json.loads(of_prompt)) for answer, of_prompt in zip(completions, facts, strict=True)]


class Rewards(transformers.TrainerCallback):
    """Writes down the mean reward of each step."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Appends a line."""
        del args, control
        if logs and "reward" in logs:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, "reward": float(logs["reward"])}) + "\n")


def model(source: dict[str, str]) -> Any:
    """Returns the model in float32, without the mark of a quantised file, which TRL refuses to train."""
    read = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype="float32")
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype="float32")
    plain.load_state_dict(read.state_dict())
    return plain


def main() -> None:
    """Trains."""
    given = options()
    source = {"pretrained_model_name_or_path": str(given.model.parent), "gguf_file": given.model.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source, padding_side="left")
    rows = [json.loads(line) for line in given.prompts.read_text().splitlines()]
    for row in rows:
        chat = [{"role": "user", "content": row["prompt"]}]
        if (ids := tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)) != row["ids"]:
            raise ValueError(f"TRL would sample from {tokenizer.decode(ids)!r}, {len(ids)} tokens, not from our {len(row['ids'])}")
    data = datasets.Dataset.from_list(
        [{"prompt": [{"role": "user", "content": row["prompt"]}], "facts": json.dumps(row)} for row in rows]
    )
    per_slice = min(_SLICE, given.prompts_per_step)
    arguments = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False,
        per_device_train_batch_size=per_slice * given.completions_per_prompt, gradient_accumulation_steps=given.prompts_per_step // per_slice,
        num_generations=given.completions_per_prompt, max_completion_length=given.new_tokens, beta=0.0, temperature=1.0, top_k=0, top_p=1.0,
        learning_rate=given.learning_rate, lr_scheduler_type="constant_with_warmup", warmup_steps=given.warmup_steps, max_steps=given.steps,
        loss_type="grpo", max_grad_norm=1.0, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, shuffle_dataset=False,
        dataloader_pin_memory=False, seed=given.seed,
    )  # fmt: skip
    trl.GRPOTrainer(
        model=model(source), reward_funcs=reward, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Rewards(given.rewards)]
    ).train()


if __name__ == "__main__":
    main()
