"""Services of a manager for nodes: streams, tunnels, images, network attachments, revocation."""
