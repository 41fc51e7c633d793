"""Compile the messages of gRPC: the ``.proto`` files of ``tally.serving.protobuf`` into their descriptors.

    python scripts/protobuf.py

Run it after a change of these files; needs grpcio-tools.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "src" / "tally" / "serving" / "protobuf"


def compiled(folder: Path = FOLDER) -> bytes:
    """The descriptors of all files in the folder, and of what they import, as a FileDescriptorSet."""
    import grpc_tools
    from grpc_tools import protoc

    known = Path(grpc_tools.__file__).parent / "_proto"
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "descriptors")
        options = [f"-I{folder}", f"-I{known}", "--include_imports", f"--descriptor_set_out={out}"]
        if protoc.main(["protoc", *options, *sorted(path.name for path in folder.glob("*.proto"))]) != 0:
            raise SystemExit("the messages cannot be compiled")
        return out.read_bytes()


if __name__ == "__main__":
    (FOLDER / "descriptors.binpb").write_bytes(compiled())
