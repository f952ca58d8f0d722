"""Conversions between the model and protobuf, both ways."""
