"""Networks and ports in the model: addresses, endpoints, routes, tables, published ports."""
