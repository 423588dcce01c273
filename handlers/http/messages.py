"""The messages of Open Inference Protocol v2 over gRPC, without generated code.

Source: grpc_predict_v2.proto of KServe. Left out are the parameters, which nothing here reads;
protobuf passes over fields that it does not know.
"""

from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"
# Fields as NAME NUMBER TYPE; a star stands for a list. Dots name a message within another.
MESSAGES: dict[str, tuple[str, ...]] = {
    "ServerLiveRequest": (),
    "ServerLiveResponse": ("live 1 bool",),
    "ServerReadyRequest": (),
    "ServerReadyResponse": ("ready 1 bool",),
    "ModelReadyRequest": ("name 1 string", "version 2 string"),
    "ModelReadyResponse": ("ready 1 bool",),
    "ServerMetadataRequest": (),
    "ServerMetadataResponse": ("name 1 string", "version 2 string", "extensions 3 string*"),
    "ModelMetadataRequest": ("name 1 string", "version 2 string"),
    "ModelMetadataResponse": (
        "name 1 string",
        "versions 2 string*",
        "platform 3 string",
        "inputs 4 ModelMetadataResponse.TensorMetadata*",
        "outputs 5 ModelMetadataResponse.TensorMetadata*",
    ),
    "ModelMetadataResponse.TensorMetadata": (
        "name 1 string",
        "datatype 2 string",
        "shape 3 int64*",
    ),
    "InferTensorContents": (
        "bool_contents 1 bool*",
        "int_contents 2 int32*",
        "int64_contents 3 int64*",
        "uint_contents 4 uint32*",
        "uint64_contents 5 uint64*",
        "fp32_contents 6 float*",
        "fp64_contents 7 double*",
        "bytes_contents 8 bytes*",
    ),
    "ModelInferRequest": (
        "model_name 1 string",
        "model_version 2 string",
        "id 3 string",
        "inputs 5 ModelInferRequest.InferInputTensor*",
        "outputs 6 ModelInferRequest.InferRequestedOutputTensor*",
        "raw_input_contents 7 bytes*",
    ),
    "ModelInferRequest.InferInputTensor": (
        "name 1 string",
        "datatype 2 string",
        "shape 3 int64*",
        "contents 5 InferTensorContents",
    ),
    "ModelInferRequest.InferRequestedOutputTensor": ("name 1 string",),
    "ModelInferResponse": (
        "model_name 1 string",
        "model_version 2 string",
        "id 3 string",
        "outputs 5 ModelInferResponse.InferOutputTensor*",
        "raw_output_contents 6 bytes*",
    ),
    "ModelInferResponse.InferOutputTensor": (
        "name 1 string",
        "datatype 2 string",
        "shape 3 int64*",
        "contents 5 InferTensorContents",
    ),
    # Triton's extension: grpc_service.proto.
    "ModelStreamInferResponse": ("error_message 1 string", "infer_response 2 ModelInferResponse"),
}


def _classes() -> dict[str, Any]:
    file = FileDescriptorProto(name="rampart/inference.proto", package=PACKAGE, syntax="proto3")
    for name, fields in MESSAGES.items():
        outer, _, inner = name.rpartition(".")
        home = next(m for m in file.message_type if m.name == outer).nested_type if outer else None
        message = (file.message_type if home is None else home).add(name=inner)
        _add_fields(message, fields)
    pool = DescriptorPool()  # of our own: a client in this process may have another
    pool.Add(file)
    return {
        name: GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in MESSAGES
    }


def _add_fields(message: DescriptorProto, fields: tuple[str, ...]) -> None:
    for text in fields:
        name, number, kind = text.split()
        field = message.field.add(name=name, number=int(number))
        repeated = kind.endswith("*")
        field.label = (
            FieldDescriptorProto.LABEL_REPEATED if repeated else FieldDescriptorProto.LABEL_OPTIONAL
        )
        kind = kind.removesuffix("*")
        if kind[0].isupper():
            field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
        else:
            field.type = FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")


CLASSES = _classes()  # by name
