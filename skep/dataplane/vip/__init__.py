"""Virtual addresses: in each container's namespace nftables leads them to the tasks that serve.

``wanted`` says what a namespace is to have, ``rules`` how that reads for nftables; ``loader`` brings it there,
``conntrack`` moves UDP flows off backends that went, ``healing`` notices what somebody else changed.
"""
