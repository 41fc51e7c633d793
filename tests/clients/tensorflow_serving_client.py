"""Ask an endpoint with the stubs of TensorFlow Serving. Arguments: the address, and a picture."""

import json
import sys
from pathlib import Path

import grpc
from google.protobuf import json_format
from tensorflow.core.framework import tensor_pb2, tensor_shape_pb2, types_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    predict_pb2,
    prediction_service_pb2_grpc,
)

ADDRESS, PICTURE = sys.argv[1:]
content = Path(PICTURE).read_bytes()
channel = grpc.insecure_channel(ADDRESS)
stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)


def request(*shape):
    """As the client of TensorFlow's example sends it: one picture without dimensions, or several."""
    found = predict_pb2.PredictRequest()
    found.model_spec.name = "shapes"
    found.model_spec.signature_name = "serving_default"
    count = 1
    dimensions = tensor_shape_pb2.TensorShapeProto()
    for size in shape:
        dimensions.dim.add(size=size)
        count *= size
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, tensor_shape=dimensions, string_val=[content] * count)
    found.inputs["image"].CopyFrom(tensor)
    return found


def told(tensor):
    values = tensor.float_val if tensor.dtype == types_pb2.DT_FLOAT else [str(v, "utf-8") for v in tensor.string_val]
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    return {"dtype": types_pb2.DataType.Name(tensor.dtype), "shape": shape, "values": list(values)}


def predicted(asked):
    response = stub.Predict(asked, 10.0)
    spec = response.model_spec
    return {
        "outputs": {name: told(tensor) for name, tensor in response.outputs.items()},
        "spec": [spec.name, spec.version.value, spec.signature_name],
    }


def refused(change):
    asked = request()
    change(asked)
    try:
        stub.Predict(asked, 10.0)
    except grpc.RpcError as error:
        return [error.code().name, error.details()]
    return None


def renamed(asked):
    asked.inputs["picture"].CopyFrom(asked.inputs.pop("image"))


said = {"scalar": predicted(request()), "one": predicted(request(1)), "three": predicted(request(3))}
filtered = request()
filtered.output_filter.append("prediction")
said["filtered"] = predicted(filtered)
said["refused"] = {
    "model": refused(lambda asked: setattr(asked.model_spec, "name", "shape")),
    "no model": refused(lambda asked: asked.ClearField("model_spec")),
    "version": refused(lambda asked: setattr(asked.model_spec.version, "value", 9)),
    "label": refused(lambda asked: setattr(asked.model_spec, "version_label", "canary")),
    "signature": refused(lambda asked: setattr(asked.model_spec, "signature_name", "other")),
    "input": refused(renamed),
    "no input": refused(lambda asked: asked.inputs.clear()),
    "output": refused(lambda asked: asked.output_filter.append("nothing")),
    "shape": refused(lambda asked: asked.inputs["image"].tensor_shape.dim.add(size=2)),
    "type": refused(lambda asked: setattr(asked.inputs["image"], "dtype", types_pb2.DT_COMPLEX64)),
    "picture": refused(lambda asked: asked.inputs["image"].string_val.__setitem__(0, b"no picture")),
}
wanted = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
wanted.model_spec.name = "shapes"
found = stub.GetModelMetadata(wanted, 10.0)
signatures = get_model_metadata_pb2.SignatureDefMap()
assert found.metadata["signature_def"].Unpack(signatures)
said["metadata"] = [found.model_spec.version.value, json_format.MessageToDict(signatures)]
classify = classification_pb2.ClassificationRequest()
classify.model_spec.name = "shapes"
for _ in range(2):
    classify.input.example_list.examples.add().features.feature["image"].bytes_list.value.append(content)
said["classified"] = [
    {each.label: each.score for each in one.classes} for one in stub.Classify(classify, 10.0).result.classifications
]
print(json.dumps(said))
