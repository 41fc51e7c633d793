"""What messages a client's generated code has. Arguments: names of its modules. Prints each as base64."""

import base64
import importlib
import importlib.util
import json
import sys
import types

found = {}


def take(file):
    if file.name not in found:
        for other in file.dependencies:
            take(other)
        found[file.name] = base64.b64encode(file.serialized_pb).decode()


for name in sys.argv[1:]:
    parent = name.partition(".")[0]
    if parent == "kserve":  # its own beginning imports its server, which is not installed
        package = types.ModuleType(parent)
        package.__path__ = list(importlib.util.find_spec(parent).submodule_search_locations)
        sys.modules[parent] = package
    take(importlib.import_module(name).DESCRIPTOR)
print(json.dumps(list(found.values())))
