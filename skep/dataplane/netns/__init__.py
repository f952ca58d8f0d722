"""Reads, compares and writes network namespaces as data.  A reconciler keeps each in its desired state.

``state`` and ``nft_table`` define the data.  ``read`` returns the kernel's state, ``diff`` the operations from there to
the desired state, and ``write`` executes them.  ``reconciler`` does this for one namespace and ``healer`` for all.
"""
