"""Virtual addresses: nftables rules in each container's namespace, which map them to serving tasks.

``plan.vip`` plans a namespace's rules, and ``virtual_addresses`` writes them.  It uses ``elements`` if only elements of
maps change.  ``on_demand`` loads addresses to which a container sends packets without a DNS query.
"""
