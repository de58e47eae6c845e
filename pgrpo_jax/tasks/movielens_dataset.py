"""The TFDS data set of MovieLens prompts: built once for each (source files, code, seed, K), read by random access.

No TensorFlow is needed: the records are array_record files, read through `as_data_source`. A record is one text, the prompt as
JSON: records of several features are maps to protobuf, which writes a map in another order in each process, and two builds would
differ in their bytes.
"""

import contextlib
import hashlib
import io
import json
import pathlib
import tempfile
from typing import Any, Iterator

from etils import epath
import tensorflow_datasets as tfds

from pgrpo_jax.tasks import movielens_prompts
from pgrpo_jax.tasks import movielens_tables
from pgrpo_jax.tasks import preference_groups
from pgrpo_jax.tasks import streams
from pgrpo_jax.tasks import title_matching

SPLITS = ("train", "test")
_DECIDING_MODULES = (movielens_prompts, movielens_tables, preference_groups, streams, title_matching)


class MovieLensPrompts(tfds.core.GeneratorBasedBuilder):
    """MovieLens-100k as prompts: films a user liked and four he must choose from (see `movielens_prompts`)."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, source_dir: str, seed: int, num_preference_groups: int, **kwargs: Any):
        """Sets up the builder; nothing is read yet.

        Args:
            source_dir: directory of the three MovieLens files.
            seed: of the run.
            num_preference_groups: K.
            **kwargs: of `tfds.core.GeneratorBasedBuilder`, `data_dir` above all.
        """
        self._source_dir = source_dir
        self._seed = seed
        self._num_preference_groups = num_preference_groups
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Prompts over MovieLens-100k: films a user liked, and films he rated to choose from.",
            homepage="https://grouplens.org/datasets/movielens/100k/",
            features=tfds.features.FeaturesDict({"prompt": tfds.features.Text()}),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # the files are already here: launch/local.sh checks and unpacks them
        tables = movielens_tables.read(self._source_dir)
        preparation = movielens_prompts.prepare(tables, seed=self._seed, num_preference_groups=self._num_preference_groups)
        self.info.metadata["preference_group_names"] = list(preparation.clustering.names)
        return {split: self._generate_examples(tables, preparation, split) for split in SPLITS}

    def _generate_examples(
        self, tables: movielens_tables.Tables, preparation: movielens_prompts.Preparation, split: str
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        records = list(movielens_prompts.write_prompts(tables, preparation, seed=self._seed, split=split))
        if not records:
            raise ValueError(
                f"split {split!r} holds 0 prompts from {len(tables.users)} users and {len(tables.rating)} ratings, at least 1 is needed: "
                "give more ratings for each user"
            )
        for number, record in enumerate(records):
            yield number, {"prompt": json.dumps(record, ensure_ascii=False, sort_keys=True)}


def prepared_dir(source_dir: str, *, cache_dir: str, seed: int, num_preference_groups: int) -> str:
    """Returns the directory of the built data set, building it first where it is missing.

    A build happens in a directory of its own and is moved into place when it is complete: a killed build leaves no data set
    behind (only a directory "building-..." that may be deleted), and of two processes that build at once the later one drops its copy.

    Args:
        source_dir: directory of the three MovieLens files.
        cache_dir: where built data sets are kept, one directory for each (source files, code, seed, K).
        seed: of the run.
        num_preference_groups: K.

    Returns:
        A directory for `tfds.builder_from_directory`.

    Raises:
        FileNotFoundError: a source file is missing.
        ValueError: a line is malformed, K does not fit the data, or a split comes out empty.
    """
    streams.check_seed(seed)
    key = f"seed{seed}-k{num_preference_groups}-{_fingerprint(source_dir)}"
    final = epath.Path(cache_dir) / "movielens_prompts" / key
    if final.exists():
        return str(final)
    tfds.disable_progress_bar()  # the build takes seconds, and a run has a progress bar of its own
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"building-{key}-", dir=final.parent, ignore_cleanup_errors=True) as workplace:
        builder = MovieLensPrompts(source_dir=source_dir, seed=seed, num_preference_groups=num_preference_groups, data_dir=workplace)
        with contextlib.redirect_stdout(io.StringIO()):  # it would announce a download; nothing is downloaded
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        try:
            pathlib.Path(builder.data_dir).rename(final)
        except OSError:
            if not final.exists():  # then nobody else was faster, and the failure is a real one
                raise
    return str(final)


def _fingerprint(source_dir: str) -> str:
    """A digest of the source files and of the code that decides what is written: when either changes, so does the data set."""
    digest = hashlib.sha256()
    for path in movielens_tables.source_files(source_dir).values():
        digest.update(path.read_bytes())
    for code in (__file__, *(module.__file__ for module in _DECIDING_MODULES)):
        digest.update(pathlib.Path(code).read_bytes())
    return digest.hexdigest()[:12]
