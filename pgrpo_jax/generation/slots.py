"""The host's side of generation: which completion each slot of the batch works on, and when the batch becomes smaller.

A slot that has ended is given the next completion at once. Slots lie in blocks, and a block holds few prompts: as long as the completions of
a prompt last they go to the block that holds it, so that its cache is read once for all of them. Longest first: what may become long begins early,
so that all end at about the same time, in caches that have become narrow; of a block, and of all prompts where every slot is a block of its own.
"""

import numpy as np

from pgrpo_jax.generation.decoding import SlotState

class Slots:
    """B slots and the completions that wait for one. Prompt p has the completions p * G ... p * G + G - 1.

    Args:
        prompt_lengths: [P] int32, tokens.
        last_tokens: [P] int32, the last token of each prompt: the first input of its completions.
        limits: [P, G] int32, most tokens of each completion.
        adapters: [P] int32, which of the model's adapters each prompt is answered with.
        blocks: blocks.
        rows_per_block: slots in each.
        places: prompts that a block holds.
        smallest: the batch is not made smaller than this.

    Attributes:
        state: what the slots work on; NumPy arrays.
        table: [blocks, places] int32, the prompt at each place, -1 at first.
        began: [B] int64, the step at which each slot began.
    """

    def __init__(
        self, prompt_lengths: np.ndarray, last_tokens: np.ndarray, limits: np.ndarray, adapters: np.ndarray, *, blocks: int,
        rows_per_block: int, places: int, smallest: int,
    ):  # fmt: skip
        rows, self._smallest = blocks * rows_per_block, smallest
        self._prompt_lengths, self._last_tokens, self._limits, self._adapters = prompt_lengths, last_tokens, limits, adapters
        # Of equal limits the first comes first.
        self._waiting = [np.argsort(-of_prompt, kind="stable").tolist() for of_prompt in limits]
        self._rows_per_block = rows_per_block
        names = ("completions", "inputs", "positions", "ages", "limits", "places", "adapters")
        values = {name: np.zeros(rows, np.int32) for name in names}
        self.state = SlotState(**values, running=np.zeros(rows, bool), prompt_lengths=np.ones(rows, np.int32))
        self.table = np.full((blocks, places), -1, np.int32)
        self.began = np.zeros(rows, np.int64)

    @property
    def waiting(self) -> int:
        """Completions that no slot has taken up yet."""
        return sum(map(len, self._waiting))

    def oldest(self) -> int:
        """Returns the tokens that the oldest running slot has drawn."""
        return int(self.state.ages.max(where=self.state.running, initial=0))

    def refill(self, step: int) -> list[tuple[int, int, int]]:
        """Gives every slot that has ended the next completion its block can take up.

        Args:
            step: the step that comes next.

        Returns:
            (block, place, prompt) for each prompt that a block now holds in place of another.
        """
        moves = []
        for row in np.flatnonzero(~self.state.running):
            block = int(row) // self._rows_per_block
            place = self._place(block)
            if place is None:
                continue
            prompt = held = int(self.table[block, place])
            if self._rows_per_block == 1 or held < 0 or not self._waiting[held]:
                prompt = self._next_prompt()
            if prompt != held:
                self.table[block, place] = prompt
                moves.append((block, place, prompt))
            self._begin(row, prompt, place, step)
        return moves

    def _place(self, block: int) -> int | None:
        """The block's place whose prompt, or whose next prompt, has a completion for a slot; None where there is none."""
        for place, prompt in enumerate(self.table[block]):
            if prompt >= 0 and self._waiting[prompt]:
                return place
        if not self.waiting:
            return None
        rows = slice(block * self._rows_per_block, (block + 1) * self._rows_per_block)
        used = set(self.state.places[rows][self.state.running[rows]].tolist())
        return next((place for place in range(self.table.shape[1]) if place not in used), None)

    def _next_prompt(self) -> int:
        """Of the prompts with waiting completions the one with the longest, prompts that no block holds before others."""
        held = set(self.table.ravel().tolist()) if self._rows_per_block > 1 else set()
        candidates = [p for p, waiting in enumerate(self._waiting) if waiting]
        return max(candidates, key=lambda p: (p not in held, self._limits[p, self._waiting[p][0]], -p))

    def _begin(self, row: int, prompt: int, place: int, step: int) -> None:
        which, length = self._waiting[prompt].pop(0), self._prompt_lengths[prompt]
        values = {
            "completions": prompt * self._limits.shape[1] + which, "inputs": self._last_tokens[prompt], "positions": length - 1, "ages": 0,
            "limits": self._limits[prompt, which], "running": True, "places": place, "prompt_lengths": length,
            "adapters": self._adapters[prompt],
        }  # fmt: skip
        for name, value in values.items():
            getattr(self.state, name)[row] = value
        self.began[row] = step

    def smaller(self) -> tuple[int, int]:
        """Returns (slots per block, blocks) of half the batch, 0 for what can not be halved: running ones must fit into one of the two."""
        rows, blocks = len(self.began), len(self.table)
        if self.waiting or rows // 2 < self._smallest:
            return 0, 0
        return (self._rows_per_block // 2 if self._rows_per_block % 2 == 0 else 0), (blocks // 2 if blocks % 2 == 0 else 0)

    def shrink(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Halves the batch where its running slots allow it; the last completions then take less time.

        Returns:
            (rows [B / 2], blocks [blocks or blocks / 2], int32: those that are kept, in this order), or None where it stays as it is.
        """
        per_block, few = self.smaller()
        running = self.state.running.reshape(len(self.table), -1)
        rows = np.arange(running.size, dtype=np.int32).reshape(running.shape)
        blocks = np.arange(len(running), dtype=np.int32)
        if running.sum(axis=1).max() <= per_block:
            rows = np.take_along_axis(rows, np.argsort(~running, axis=1, kind="stable")[:, :per_block], axis=1)
            self._rows_per_block = per_block
        elif running.any(axis=1).sum() <= few:
            blocks = np.sort(np.argsort(~running.any(axis=1), kind="stable")[:few]).astype(np.int32)
            rows = rows[blocks]
        else:
            return None
        rows = rows.reshape(-1)
        self.state = SlotState(**{name: value[rows] for name, value in vars(self.state).items()})
        self.table, self.began = self.table[blocks], self.began[rows]
        return rows, blocks
