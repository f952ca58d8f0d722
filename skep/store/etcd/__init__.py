"""The store on etcd: a supervised member, and everything this manager asks of it.

::

    binary = find_binary(configured)
    async with Member(settings, binary, clock, Backoff()).running():
        await initialize(socket, wrapping_key, clock, found_cluster, ...)  # the first manager, once
        async with open_store(socket, node_id, wrapping_key, clock) as store:
            ...
"""
