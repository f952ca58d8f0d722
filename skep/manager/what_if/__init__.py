"""``skep what-if``: the decisions of the control loops on a copy of the cluster's state.  Nothing is written."""
