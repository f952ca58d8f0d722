"""Network namespaces: their state as data, read, compared and written; one reconciler keeps each as wanted.

``state`` and ``nft_table`` are the data, ``read`` gives what the kernel holds, ``diff`` the operations from that to the
wanted state, ``write`` carries them out, ``reconciler`` does all of that for one namespace and ``healer`` for all.
"""
