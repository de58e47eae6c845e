"""A stop that is requested at an exact moment, in this process: what a signal at that moment would do."""

from pgrpo_jax.preemption import Stop


class StopAt(Stop):
    """Asks to stop when the program looks for the n-th time, and goes on asking."""

    def __init__(self, count):
        super().__init__()
        self._left = count

    def check(self, phase):
        self._left -= 1
        self.requested = self.requested or self._left == 0
        super().check(phase)
