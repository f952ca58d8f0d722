"""One manager.  The cluster's part of the API, the dispatcher and the CA always run.  The control loops run while it
leads.
"""
