"""Ask an endpoint with Triton's client. Arguments: gRPC's address, HTTP's, and a picture."""

import json
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

GRPC, HTTP, PICTURE = sys.argv[1:]


def asked(module, address, *, binary=None):
    """What a client of either module is answered. binary: of HTTP, whether tensors are sent and answered as JSON."""
    client = module.InferenceServerClient(address)
    how = {} if binary is None else {"binary_data": binary}
    said = {
        "live": client.is_server_live(),
        "ready": [client.is_server_ready(), client.is_model_ready("shapes"), client.is_model_ready("shapes", "1")],
        "metadata": plain(client.get_model_metadata("shapes")),
        "server": plain(client.get_server_metadata()),
        "index": plain(client.get_model_repository_index()),
    }
    if binary is False:  # its JSON takes bytes of UTF-8 only
        pixels = np.arange(64 * 64 * 3, dtype=np.uint32).reshape(1, 64, 64, 3) % 251
        given = module.InferInput("image", [1, 64, 64, 3], "UINT8")
        given.set_data_from_numpy(pixels.astype(np.uint8), **how)
    else:
        content = Path(PICTURE).read_bytes()
        given = module.InferInput("image", [2], "BYTES")
        given.set_data_from_numpy(np.array([content, content], dtype=object), **how)
    names = ["label", "index", "score"]
    wanted = [module.InferRequestedOutput(name, **how) for name in names]
    result = client.infer("shapes", [given], outputs=wanted, request_id="seven")
    said["outputs"] = {name: [text(value) for value in result.as_numpy(name).tolist()] for name in names}
    response = plain(result.get_response())
    said["names"] = [response["id"], response["model_name"], response["model_version"]]
    said["all"] = sorted(each["name"] for each in plain(client.infer("shapes", [given]).get_response())["outputs"])
    said["refused"] = []
    for model, version, outputs in (("shape", "", None), ("shapes", "9", None), ("shapes", "", "nothing")):
        try:
            client.infer(
                model, [given], model_version=version, outputs=outputs and [module.InferRequestedOutput(outputs)]
            )
        except InferenceServerException as error:
            said["refused"].append([error.status(), error.message()])
    client.unload_model("shapes")
    said["unloaded"] = [client.is_model_ready("shapes"), plain(client.get_model_repository_index())]
    client.load_model("shapes")
    said["loaded"] = client.is_model_ready("shapes")
    client.close()
    return said


def text(value):
    return str(value, "utf-8") if isinstance(value, bytes) else value


def plain(found):
    """A protobuf message, or what JSON said, as JSON."""
    if isinstance(found, (dict, list)):
        return found
    from google.protobuf import json_format

    return json_format.MessageToDict(found, preserving_proto_field_name=True)


print(
    json.dumps(
        {
            "grpc": asked(tritonclient.grpc, GRPC),
            "binary": asked(tritonclient.http, HTTP, binary=True),
            "json": asked(tritonclient.http, HTTP, binary=False),
        }
    )
)
