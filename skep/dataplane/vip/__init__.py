"""Virtual addresses: nftables rules in each container's namespace, which map them to serving tasks.

``plan.vip`` plans a namespace's rules, ``virtual_addresses`` writes them, by ``elements`` where only elements of maps
change; ``on_demand`` loads the addresses of packets that were sent without a DNS query.
"""
