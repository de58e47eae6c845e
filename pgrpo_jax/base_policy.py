"""Floor 5: the policy before training: its network and tokenizer at once, its parameters where and when they are asked for."""

import dataclasses
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from pgrpo_jax import parallel
from pgrpo_jax.models import lora, transformer, weights
from pgrpo_jax.models.parameters import trainable_shapes
from pgrpo_jax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Base:
    """The policy before training.

    Attributes:
        model: the network, as actors and evaluation run it.
        tokenizer: its tokenizer and chat template.
        path: where its parameters are; "" = they are drawn.
        seed: of the run; names what is drawn.
        sha256: digest of the files they come from; "random" without.
    """

    model: transformer.Transformer
    tokenizer: Tokenizer
    path: str
    seed: int
    sha256: str

    def trainable(self, shardings: Any = None) -> Any:
        """Returns what is trained of it: adapters that change nothing, or all its parameters.

        Args:
            shardings: of each leaf of `trainable_shapes`; of a Hugging Face directory each process then reads what its devices hold, piece by
                piece. None = on the host, or where they are drawn.
        """
        config = self.model.config
        if config.lora is None:
            return self._parameters(shardings, "float32")
        key = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(b"lora"))
        adapters = lora.initial(config.lora, trainable_shapes(config), key)
        return adapters if shardings is None else parallel.place(adapters, shardings)

    def frozen(self, shardings: Any = None) -> dict[str, Any]:
        """Returns what is not trained of it: the model that adapters are added to, in the type it is computed in; {} without adapters.

        Args:
            shardings: as `trainable`, of each leaf of `frozen_shapes`.
        """
        return {} if self.model.config.lora is None else self._parameters(shardings, self.model.dtype)

    def _parameters(self, shardings: Any, matrices: Any) -> dict[str, Any]:
        """The parameters without adapters: norms and routers in float32, as they are computed with, matrices in a type."""

        def dtype_of(name: str) -> np.dtype:
            return np.dtype(np.float32) if "norm" in name or name == "router" else jnp.dtype(matrices)

        if self.path:
            params = weights.load(self.path, shardings, dtype_of)[1]
        else:
            bare = dataclasses.replace(self.model, config=dataclasses.replace(self.model.config, lora=None))
            drawn = transformer.initialise(bare, jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(b"model.random")))
            params = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf.astype(dtype_of(path[-1].key)), drawn)
        return params if shardings is None else parallel.place(params, shardings)
