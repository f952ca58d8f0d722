"""The layers of a node, which `node.node` composes."""
