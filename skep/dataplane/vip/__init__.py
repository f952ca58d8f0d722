"""Virtual addresses: nftables rules in each container's namespace, which map them to serving tasks.

``plan.vip`` plans a namespace's rules.  ``virtual_addresses`` writes them, through ``elements`` if only elements of
maps change.  ``on_demand`` loads addresses of packets that were sent without a DNS query.
"""
