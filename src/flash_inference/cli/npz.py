"""NumPy archives that are written as results come, and appear whole or not at all."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.lib import format as npy
from torch import Tensor

PART = ".part"


class Npz:
    """An .npz file of records: `names` [R], `lengths` [R], and an array of the rows of all, one record after another.

    Only names and lengths are held. The file stands beside its place, with a suffix .part, until it is complete.
    """

    def __init__(self, path: str, array: str, shape: tuple[int, ...], dtype: str) -> None:
        self._path, self._dtype = Path(path), np.dtype(dtype)
        self._names, self._lengths, self._left = list[str](), list[int](), shape[0]
        self._part = self._path.with_name(self._path.name + PART)
        self._archive = zipfile.ZipFile(self._part, "w")
        self._rows = self._archive.open(f"{array}.npy", "w", force_zip64=True)
        header = {"descr": npy.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_2_0(self._rows, header)

    def write(self, name: str, rows: Tensor) -> None:
        """The rows [N, ..] of the next record."""
        self._names.append(name)
        self._lengths.append(len(rows))
        self._left -= len(rows)
        self._rows.write(rows.double().numpy().astype(self._dtype).tobytes())

    def __enter__(self) -> Npz:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rows.close()
        if kind is None:
            assert self._left == 0, f"{self._left} rows are missing"
            for name, values in {"names": np.array(self._names), "lengths": np.array(self._lengths)}.items():
                with self._archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                    npy.write_array(stream, values, allow_pickle=False)
        self._archive.close()
        if kind is None:
            os.replace(self._part, self._path)
        else:
            self._part.unlink()
