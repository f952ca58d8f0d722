"""The networks of containers, as the engine sees them. The data plane implements them."""
