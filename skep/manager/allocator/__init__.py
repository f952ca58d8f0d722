"""Allocates published ports and network attachments, which services and tasks need before placement."""
