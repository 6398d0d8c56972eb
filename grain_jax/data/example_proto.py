"""`tf.train.Example` by protobuf alone: the same bytes, without the seconds that TensorFlow loads.

Source: tensorflow/core/example/{example,feature}.proto, whose field numbers these are.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_FIELD = descriptor_pb2.FieldDescriptorProto
_LISTS = {
  "BytesList": _FIELD.TYPE_BYTES,
  "FloatList": _FIELD.TYPE_FLOAT,
  "Int64List": _FIELD.TYPE_INT64,
}


def _file() -> descriptor_pb2.FileDescriptorProto:
  file = descriptor_pb2.FileDescriptorProto(
    name="grain_jax/example.proto", package="grain_jax", syntax="proto3"
  )
  for name, kind in _LISTS.items():
    message = file.message_type.add(name=name)
    message.field.add(name="value", number=1, type=kind, label=_FIELD.LABEL_REPEATED)
  feature = file.message_type.add(name="Feature")
  feature.oneof_decl.add(name="kind")
  for number, name in enumerate(("bytes_list", "float_list", "int64_list"), start=1):
    feature.field.add(
      name=name,
      number=number,
      type=_FIELD.TYPE_MESSAGE,
      label=_FIELD.LABEL_OPTIONAL,
      type_name=f".grain_jax.{list(_LISTS)[number - 1]}",
      oneof_index=0,
    )
  features = file.message_type.add(name="Features")
  entry = features.nested_type.add(name="FeatureEntry")
  entry.options.map_entry = True
  entry.field.add(name="key", number=1, type=_FIELD.TYPE_STRING, label=_FIELD.LABEL_OPTIONAL)
  entry.field.add(
    name="value",
    number=2,
    type=_FIELD.TYPE_MESSAGE,
    label=_FIELD.LABEL_OPTIONAL,
    type_name=".grain_jax.Feature",
  )
  features.field.add(
    name="feature",
    number=1,
    type=_FIELD.TYPE_MESSAGE,
    label=_FIELD.LABEL_REPEATED,
    type_name=".grain_jax.Features.FeatureEntry",
  )
  example = file.message_type.add(name="Example")
  example.field.add(
    name="features",
    number=1,
    type=_FIELD.TYPE_MESSAGE,
    label=_FIELD.LABEL_OPTIONAL,
    type_name=".grain_jax.Features",
  )
  return file


def _make() -> Any:
  pool = descriptor_pool.DescriptorPool()  # its own: TensorFlow's has its own names
  pool.Add(_file())
  return message_factory.GetMessageClass(pool.FindMessageTypeByName("grain_jax.Example"))


Example: Any = _make()
