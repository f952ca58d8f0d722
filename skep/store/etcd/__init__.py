"""The store on etcd, with a supervised member and its client.

::

    binary = find_binary(configured)
    async with Member(settings, binary, clock, Backoff()).running():
        await initialize(socket, wrapping_key, clock, body, ...)  # the first manager, once
        async with open_store(socket, node_id, wrapping_key, clock) as store:
            ...
"""
