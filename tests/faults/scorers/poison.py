from __future__ import annotations

import ctypes
import os
import time

import tally


class Poison(tally.Scorer):
    """Does what the file says: ``crash``, ``hang``, ``eat``, ``raise``, or else scores it."""

    input = "bytes"
    batch_size = 8

    def score(self, batch):
        for data in batch:
            if data == b"crash":
                ctypes.string_at(0)
            elif data == b"exit":
                os._exit(3)
            elif data == b"hang":
                ctypes.PyDLL(None).sleep(1000)  # holds the interpreter: no Python thread runs meanwhile
            elif data == b"eat":
                held = []
                while True:
                    held.append(bytearray(8 << 20))
                    time.sleep(0.001)
            elif data == b"raise":
                raise ValueError("this file says raise")
        return [{"bytes": len(data)} for data in batch]
