"""Protobuf without generated modules, because modules of a new protoc refuse older runtimes."""
