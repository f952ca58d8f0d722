"""Virtual addresses: in each container's namespace nftables lead them to the tasks that serve.

``plan.vip`` is what a namespace is to have, ``virtual_addresses`` writes it, by ``elements`` where only elements of
maps change; ``on_demand`` notices packets to addresses that are not led yet.
"""
