"""The node's networking: namespaces, the gateway bridge, published ports."""
