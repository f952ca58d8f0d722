"""The messages of ``skep.proto``; the stub beside this file lists them."""

from skep.wire.descriptors import module_of

globals().update(module_of("skep/wire/skep.proto"))
