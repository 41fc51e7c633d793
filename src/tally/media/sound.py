"""Decoding sound: any file that FFmpeg knows to one channel of samples, by PyAV."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from tally.errors import ItemError


def decode(content: bytes, rate: int) -> np.ndarray[Any, Any]:
    """The first sound of a file as ``float32[samples]`` in -1..1, mixed to one channel of ``rate`` samples a second.

    Raises ItemError (stage ``decode``) for what holds no sound, or is damaged.
    """
    import av

    try:
        with av.open(io.BytesIO(content), "r") as container:
            if not container.streams.audio:
                raise ItemError("there is no sound in the file", stage="decode")
            resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
            frames = [
                made for frame in container.decode(container.streams.audio[0]) for made in resampler.resample(frame)
            ]
            frames += resampler.resample(None)
    except av.error.FFmpegError as error:
        raise ItemError(f"damaged, or no sound: {error.strerror}", stage="decode") from None
    if not frames:
        raise ItemError("there is no sound in the file", stage="decode")
    samples: np.ndarray[Any, Any] = np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames])
    return samples
