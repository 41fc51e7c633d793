"""Ask an endpoint with KServe's client. Arguments: gRPC's address, the URL of HTTP, and a picture."""

import asyncio
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np

# The package's own beginning imports its server, which is not installed.
package = types.ModuleType("kserve")
package.__path__ = list(importlib.util.find_spec("kserve").submodule_search_locations)
sys.modules["kserve"] = package

from kserve.inference_client import InferenceGRPCClient, InferenceRESTClient, RESTConfig  # noqa: E402
from kserve.protocol.infer_type import InferInput, InferRequest  # noqa: E402

GRPC, URL, PICTURE = sys.argv[1:]


def request(*, pixels=None):
    if pixels is None:
        content = Path(PICTURE).read_bytes()
        given = InferInput("image", [2], "BYTES")
        given.set_data_from_numpy(np.array([content, content], dtype=object), binary_data=True)
    else:
        given = InferInput("image", list(pixels.shape), "UINT8")
        given.set_data_from_numpy(pixels, binary_data=False)
    return InferRequest("shapes", [given], request_id="seven")


def told(response):
    outputs = {each.name: each.as_numpy().tolist() for each in response.outputs}
    texts = {
        name: [str(value, "utf-8") if isinstance(value, bytes) else value for value in values]
        for name, values in outputs.items()
    }
    return {"outputs": texts, "names": [response.id, response.model_name, response.model_version]}


async def main():
    said = {}
    pixels = (np.arange(64 * 64 * 3, dtype=np.uint32).reshape(1, 64, 64, 3) % 251).astype(np.uint8)
    client = InferenceGRPCClient(GRPC)
    said["grpc"] = {
        "ready": [await client.is_server_live(), await client.is_server_ready(), await client.is_model_ready("shapes")],
        "bytes": told(await client.infer(request())),
        "pixels": told(await client.infer(request(pixels=pixels))),
    }
    await client.close()
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    said["rest"] = {
        "ready": [
            await client.is_server_live(URL),
            await client.is_server_ready(URL),
            await client.is_model_ready(URL, "shapes"),
        ],
        "bytes": told(await client.infer(URL, request(), model_name="shapes")),
        "pixels": told(await client.infer(URL, request(pixels=pixels), model_name="shapes")),
    }
    await client.close()
    print(json.dumps(said))


asyncio.run(main())
