"""A BlobStore over files: processes that share a folder share the blobs, mapped from the page cache without a copy."""

import itertools
import os
import pathlib
import threading
import time
from typing import Sequence

import numpy as np


class FolderStore:
    """Writes blobs under `name`, reads those of any name; keeps a list of what it was asked for."""

    def __init__(self, folder: pathlib.Path, name: str = "blob"):
        self._folder, self._name, self._numbers = folder, name, itertools.count()
        self._lock = threading.Lock()
        self.puts: list[str] = []
        self.gets: list[str] = []

    def put(self, array: np.ndarray) -> str:
        assert array.dtype == np.uint8 and array.ndim == 1 and array.flags.c_contiguous and array.size > 0
        with self._lock:
            handle = f"{self._name}-{next(self._numbers)}"
            self.puts.append(handle)
        array.tofile(self._folder / f"{handle}.part")
        os.rename(self._folder / f"{handle}.part", self._folder / handle)
        return handle

    def get(self, handles: Sequence[str], timeout_secs: float) -> list[np.ndarray]:
        with self._lock:
            self.gets.extend(handles)
        deadline = time.monotonic() + timeout_secs
        while not all((self._folder / handle).exists() for handle in handles):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{handles} in {timeout_secs} s")
            time.sleep(0.005)
        return [np.memmap(self._folder / handle, np.uint8, "r").view(np.ndarray) for handle in handles]

    def delete(self, handles: Sequence[str]) -> None:
        for handle in handles:
            (self._folder / handle).unlink()

    def files(self) -> set[str]:
        return {path.name for path in self._folder.iterdir()}
