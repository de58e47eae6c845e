"""The work that everybody is timed on, for us and for peers alike: its size, its prompts, and where completions end."""

import argparse
import dataclasses
import math

import numpy as np

VOCABULARY = 49152  # tokens of SmolLM2-135M
_FIRST_WORD = 10  # tokens below it are special to somebody
LEAST_LIMIT = 8  # tokens of the shortest completion of a ragged job
_SLICE = 16  # sequences of a peer's forward and backward pass, about; ours: benchmarks/update.py


@dataclasses.dataclass(frozen=True)
class Job:
    """One batch of rollouts.

    Attributes:
        num_prompts: P.
        completions_per_prompt: G.
        prompt_tokens: tokens of every prompt.
        new_tokens: tokens of every completion; of the longest that there may be where they are ragged.
        layers: of the model; 30 are SmolLM2-135M's.
        ragged: completions end at a length of their own (`limits`).

    Raises:
        ValueError: a size is below 1, or a ragged completion would be shorter than the shortest.
    """

    num_prompts: int = 8
    completions_per_prompt: int = 8
    prompt_tokens: int = 64
    new_tokens: int = 64
    layers: int = 30
    ragged: bool = False

    def __post_init__(self):
        least = {name: 1 for name in ("num_prompts", "completions_per_prompt", "prompt_tokens", "new_tokens", "layers")}
        if self.ragged:
            least["new_tokens"] = LEAST_LIMIT
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"--{name}={getattr(self, name)} is below {bound}: give {bound} or more")

    @property
    def num_sequences(self) -> int:
        """N = P * G."""
        return self.num_prompts * self.completions_per_prompt

    @property
    def prompts_per_slice(self) -> int:
        """Prompts whose completions a peer, and the ceiling, takes through a forward and backward pass together: 16 sequences or fewer, where that can be."""
        return math.gcd(self.num_prompts, max(1, _SLICE // self.completions_per_prompt))

    def prompts(self, seed: int) -> np.ndarray:
        """Returns [P, Tp] int32 token ids, the same for whoever asks."""
        return np.random.default_rng(seed).integers(_FIRST_WORD, VOCABULARY, (self.num_prompts, self.prompt_tokens)).astype(np.int32)

    def limits(self, seed: int) -> np.ndarray:
        """Returns [N] int32, tokens of each completion, the same for whoever asks: uniform in 8..new_tokens where they are ragged."""
        if not self.ragged:
            return np.full(self.num_sequences, self.new_tokens, np.int32)
        return np.random.default_rng([seed, 1]).integers(LEAST_LIMIT, self.new_tokens, self.num_sequences, endpoint=True).astype(np.int32)

    def options(self) -> list[str]:
        """Returns the command line that `of_options` reads."""
        sizes = [f"--{name}={value}" for name, value in dataclasses.asdict(self).items() if name != "ragged"]
        return sizes + ["--ragged"] * self.ragged


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the sizes of a job to a command line."""
    parser.add_argument("--num_prompts", type=int, help="prompts of a batch (8; ragged: 32)")
    parser.add_argument("--completions_per_prompt", type=int, help="completions of each prompt (8)")
    parser.add_argument("--prompt_tokens", type=int, help="tokens of every prompt (64)")
    parser.add_argument("--new_tokens", type=int, help="tokens of every completion (64; ragged: of the longest, 128)")
    parser.add_argument("--layers", type=int, help="of the model (30, SmolLM2-135M's)")
    parser.add_argument("--ragged", action="store_true", help="completions of lengths uniform in 8..new_tokens, by forced stop")


def of_options(arguments: argparse.Namespace) -> Job:
    """Returns the job of a parsed command line.

    Raises:
        ValueError: a size is too small.
    """
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Job)}
    usual = {"num_prompts": 32, "new_tokens": 128} if arguments.ragged else {}
    return Job(**usual | {name: value for name, value in given.items() if value is not None})
