"""Published ports and network attachments: what a service and its tasks need before they can be placed."""
