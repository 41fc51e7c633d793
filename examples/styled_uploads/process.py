"""Starts the job of a clip by name: ``GET /process?video_name=clip.mp4``, as the watch does for each upload.

    uvicorn --app-dir examples/styled_uploads process:app --port 8080

Environment: CLIPS, where clips are (``s3://clips``); MODEL, the style; TALLY_SERVER and TALLY_KEY, an operator's.
"""

from __future__ import annotations

import os
from typing import Annotated

from fastapi import FastAPI, Query
from fastapi.responses import PlainTextResponse

import tally

server = tally.Client()
app = FastAPI(title="Styled uploads")


@app.get("/process", response_class=PlainTextResponse)
def process(video_name: Annotated[str, Query(pattern=r"^[^/\\]+$")]) -> str:
    """Start the clip's job, unless it has one: a link that is followed twice styles it once."""
    stem = video_name.rpartition(".")[0] or video_name
    clips = os.environ["CLIPS"]
    styled = f"{clips}/{stem}/{stem}_processed.mp4"
    if not any(job.out == styled and job.state not in ("failed", "cancelled") for job in server.list(text=styled).jobs):
        server.submit(source=f"{clips}/{stem}.mp4", model=os.environ["MODEL"], out=styled)
    return f"Processing {stem} in background..."
