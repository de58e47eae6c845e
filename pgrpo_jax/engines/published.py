"""The weight versions that units of work may name, placed where an engine of this process generates."""

from typing import Any, Callable, Mapping

from pgrpo_jax.structs import Work


class Published:
    """Keeps each version placed once, for as long as the learner offers it.

    Args:
        place: from a version's weights, as the learner holds them, to what actors use. Called for each new version, in rising order, so
            that processes of one SPMD program may communicate in it.
    """

    def __init__(self, place: Callable[[Any], Any]):
        self._place = place
        self._versions: dict[int, tuple[Any, Any]] = {}  # the learner's tree beside its placement: a restore may offer the same number anew

    def replace(self, versions: Mapping[int, Any]) -> None:
        """Takes over the versions that the learner offers now; the others can not be named any more.

        Args:
            versions: version -> weights that no update touches.
        """
        earlier, self._versions = self._versions, {}
        for version, weights in sorted(versions.items()):
            known, placed = earlier.pop(version, (None, None))
            self._versions[version] = (weights, placed if known is weights else self._place(weights))

    def get(self, work: Work) -> Any:
        """Returns the placed weights of a unit.

        Raises:
            ValueError: its version is not published. Issuing the unit again would not help.
        """
        if work.version not in self._versions:
            raise ValueError(
                f"work unit {work.index} needs weight version {work.version}, published are {sorted(self._versions)}: "
                "publish it before submitting"
            )
        return self._versions[work.version][1]
