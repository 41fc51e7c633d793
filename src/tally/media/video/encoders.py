"""Which encoders work on this machine, for each kind of video. Each is tried before it is offered."""

from __future__ import annotations

import io
from contextlib import suppress
from fractions import Fraction
from functools import cache

import numpy as np

from tally.errors import SpecError, TallyError
from tally.media.video.container import error_text
from tally.media.video.encode import FORMATS, Encoder, Encoding, segment_format, settings
from tally.media.video.join import Segment, join
from tally.media.video.metadata import Colour, Video
from tally.storage import temporary
from tally.text import did_you_mean

_WIDTH, _HEIGHT = 256, 144
_FAR_OFF = 48
"""By how much the samples of a picture may differ on average from what was encoded: more, and it is another picture."""


def encoders(kind: str) -> dict[str, str]:
    """The encoders that work on this machine for a kind of video (a key of :data:`FORMATS`): name to description."""
    return {codec: name for codec, name in _candidates(kind).items() if _why_unusable(codec, kind) is None}


def check(encoding: Encoding, kind: str) -> None:
    """Raises SpecError if the encoder cannot be used here for that kind of video, or has no such quality."""
    codec, scale = encoding.codec, settings(encoding.codec).scale
    if codec not in _candidates(kind):
        problem = f"there is no encoder {codec!r} for .{kind}"
    elif (reason := _why_unusable(codec, kind)) is not None:
        problem = f"the encoder {codec!r} does not work on this machine: {reason}"
    elif encoding.crf is None or (scale is not None and scale.low <= encoding.crf <= scale.high):
        return
    elif scale is None:
        raise SpecError(f"the encoder {codec!r} has no scale of quality", hint="Leave --crf out.")
    else:
        raise SpecError(
            f"the quality {encoding.crf:g} is not on the scale of {codec!r}",
            hint=f"Its --crf goes from {scale.low:g} (best) to {scale.high:g}; without it, {scale.default:g} is taken.",
        )
    known = encoders(kind)
    raise SpecError(problem + did_you_mean(codec, known), hint=f"There are {', '.join(known)}.")


def _candidates(kind: str) -> dict[str, str]:
    import av

    with av.open(io.BytesIO(), "w", format=FORMATS[kind]) as container:
        allowed = {name for name in container.supported_codecs if segment_format(name)}
    found = {}
    for name in sorted(allowed & av.codecs_available):
        with suppress(ValueError):  # decoders
            codec = av.Codec(name, "w")
            if codec.name == name and codec.type == "video" and not codec.experimental:
                found[name] = codec.long_name
    return found


@cache
def _why_unusable(codec: str, kind: str) -> str | None:
    """Why the encoder does not work here for that kind of video, by a trial; None if it does."""
    import av

    rate = Fraction(25)
    light = np.broadcast_to(np.linspace(0, 255, _WIDTH, dtype=np.uint8)[None, :, None], (_HEIGHT, _WIDTH, 3))
    try:
        with temporary.folder("trial") as folder:
            video = Video(
                "", str(folder), "none", 0, 0, "", 1 / rate, 0, rate, _WIDTH, _HEIGHT, (), Fraction(1), Colour(), 2
            )
            encoder = Encoder(Encoding(codec), video, (_WIDTH, _HEIGHT))
            for tick, picture in enumerate((light, light[:, ::-1])):
                encoder.add(picture, tick)
            segment, made = folder / "segment.mp4", folder / f"made.{kind}"
            segment.write_bytes(encoder.close())
            join(made, kind, video, [Segment(segment, 0)], audio=False)
            with av.open(str(made)) as container:
                shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except TallyError as error:
        return error.message
    except (av.FFmpegError, ValueError) as error:
        return f"trying it for .{kind} failed: {error_text(error)}"
    if len(shown) != 2 or any(
        found.shape != light.shape or np.abs(found.astype(int) - wanted).mean() > _FAR_OFF
        for found, wanted in zip(shown, (light, light[:, ::-1]), strict=True)
    ):
        return f"what it writes to .{kind} files is read as other pictures"
    return None
