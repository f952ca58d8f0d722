"""Protobuf without generated modules: those of a new protoc refuse older runtimes."""
