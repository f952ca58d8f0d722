"""The cluster's certificate authority: admission, certificates, revocation, and rotation of the root."""
