"""The routing mesh: a published port of any node leads to a serving task of any node."""
