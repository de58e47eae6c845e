"""A JSON item of an Orbax step whose content is computed while the step is written, so that nobody waits for it; the commit does."""

import dataclasses
from typing import Any, Callable

import orbax.checkpoint as ocp
from etils import epath


class LateRecordHandler(ocp.JsonCheckpointHandler):
    """As Orbax's handler of JSON, but for a function that returns the content: called in Orbax's thread of writes, before the step is committed."""

    async def _save_fn(self, x: Callable[[], Any], directory: epath.Path) -> None:
        await super()._save_fn(x(), directory)


@ocp.args.register_with_handler(LateRecordHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class LateRecordSave(ocp.args.CheckpointArgs):
    """What Orbax is to save.

    Attributes:
        item: returns the content, JSON-serialisable; what it raises keeps the step from being committed.
    """

    item: Callable[[], Any]
